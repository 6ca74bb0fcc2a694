"""TRSP depth pruning, ONNX export, engines, and the proof that the result is faster."""

__version__ = "0.1.0"
