"""The protocol: layers with both halves, the stack, how replies become one sum, optimisers."""

SAYS_NO_DATA = True
"""See `umbel.core.errors`."""
