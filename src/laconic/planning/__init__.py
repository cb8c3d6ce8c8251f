"""Budget in, recipe out."""
