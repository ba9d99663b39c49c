"""Figures: how fast, how large, how it scales."""
