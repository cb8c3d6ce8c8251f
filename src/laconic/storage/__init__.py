"""The .laconic container."""
