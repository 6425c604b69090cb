"""The node process of the link engine."""
