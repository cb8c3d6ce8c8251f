"""A zoo of small awkward models, the masked reference and contract tests."""
