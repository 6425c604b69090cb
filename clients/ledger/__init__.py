"""The node's own account of what its data have been used for."""

SAYS_NO_DATA = True
"""See `umbel.core.errors`."""
