"""Bounding what one unit contributes."""
