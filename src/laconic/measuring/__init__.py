"""Measuring what would ship: accuracy, latency, size, memory, and that an export is the Program."""
