"""Computation that depends on the input: exits, gates, tokens, cascades, shapes."""
