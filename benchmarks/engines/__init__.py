"""Engines against their peers and against the machine's floor: `python -m benchmarks.engines`."""
