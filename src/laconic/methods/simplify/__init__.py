"""Exact or measured rewrites that make a graph smaller."""
