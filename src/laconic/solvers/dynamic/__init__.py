"""Work that depends on the input: tokens, gates, confidence, sizes to compile for."""
