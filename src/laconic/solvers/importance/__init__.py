"""Scores of what a channel is worth, one file each."""
