"""Fewer numbers for many weights: codebooks, common parts, low rank."""
