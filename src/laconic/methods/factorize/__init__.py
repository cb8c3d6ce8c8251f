"""Large weights as products of smaller ones."""
