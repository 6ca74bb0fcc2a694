"""PyTorch to ONNX: Optimum's exporter and torch's own, with one result."""
