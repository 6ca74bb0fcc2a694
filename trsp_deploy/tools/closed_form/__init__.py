"""Least squares in place of training: what a removed span did, or kept layers lack, written into weights that stay."""
