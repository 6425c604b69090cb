"""Federated learning on Flower: the public names."""

__version__ = "0.1.0"
