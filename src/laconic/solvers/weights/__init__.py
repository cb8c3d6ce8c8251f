"""Single weights: what each is worth, which stay, and how the others make up."""
