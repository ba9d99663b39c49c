"""Building engines for tasks, and whether they are what they should be."""
