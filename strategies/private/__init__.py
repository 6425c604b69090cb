"""Layers that promise differential privacy, and the stacks made of them."""
