"""What runs inside a Triton server: copied into a model repository with what `vendor.py` lists of trsp_deploy.

Imports numpy, tokenizers, pydantic, PyYAML and an engine's own package.
"""
