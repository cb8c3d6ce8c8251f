"""Channels, heads and neurons: which stay, and how the rest makes up for the others."""
