"""Several weights, or several layers, that share what is stored."""
