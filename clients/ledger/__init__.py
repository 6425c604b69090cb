"""The node's own account of what its data have been used for."""
