"""One training loop for everything: any device, mixed precision, several processes, resumable."""
