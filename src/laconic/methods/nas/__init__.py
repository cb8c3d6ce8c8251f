"""Architecture search: sub-networks that share weights, and the search among them."""
