"""What one calibration pass collects."""
