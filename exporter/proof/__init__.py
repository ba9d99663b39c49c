"""Whether what was exported is what the adapter's formula says."""
