"""Passes over an exported ONNX graph that make it quicker and leave its logits what they were."""
