"""What measures, checks and trains, run from the repository: python -m scripts.benchmarks.merge."""
