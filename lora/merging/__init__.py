"""From a base and adapters to merged tensors: what a change is for and does, and writing the result."""
