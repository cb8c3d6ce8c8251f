"""The captured model and everything that reads or rewrites its graph."""
