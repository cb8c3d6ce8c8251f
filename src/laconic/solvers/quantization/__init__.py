"""Grids: ranges, rounding, scales that train, where the nodes stand."""
