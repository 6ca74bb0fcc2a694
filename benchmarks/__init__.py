"""Benchmarks: long measurements whose rows are kept in `benchmarks/results/`."""
