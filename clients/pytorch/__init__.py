"""Training with PyTorch on a node."""
