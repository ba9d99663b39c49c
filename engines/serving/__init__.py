"""From a task in a bundle to sessions that answer: one task loaded, or many in one process."""
