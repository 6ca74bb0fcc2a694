"""The bench for a machine with a GPU: `python -m benchmarks.gpu`."""
