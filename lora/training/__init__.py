"""A small fine-tuner: an adapter out of texts and targets, on transformers' Trainer."""
