"""Recipe in, Result out."""
