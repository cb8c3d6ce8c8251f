"""Whole layers: residual branches, affine chains, what folds into what."""
