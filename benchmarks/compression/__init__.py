"""What compression costs in accuracy, and saves in bytes."""
