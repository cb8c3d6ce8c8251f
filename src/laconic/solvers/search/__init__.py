"""What may vary in a network, its members, and finding the best under a budget."""
