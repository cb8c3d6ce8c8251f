"""Where a Program is exported to and run."""
