"""Starting a network from what another one knows."""
