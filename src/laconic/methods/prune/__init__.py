"""Removing weights, channels, neurons and heads."""
