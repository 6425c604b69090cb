"""Layers that send less than the whole update."""
