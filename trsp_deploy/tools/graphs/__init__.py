"""ONNX graphs: passes that make one quicker and leave its logits what they were, and what computes in fewer bits.

Integers (`quantize`, `qdq`, with `smoothing` and `rounding`) and halves (`half`) change the logits; `check` is of the
passes alone.
"""
