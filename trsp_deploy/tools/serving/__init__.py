"""What runs inside a Triton server: copied into a model repository (`model_repository/vendor.py`).

Imports numpy, tokenizers, pydantic, PyYAML and an engine's own package.
"""
