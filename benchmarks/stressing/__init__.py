"""What `benchmarks/stress.py` does."""
