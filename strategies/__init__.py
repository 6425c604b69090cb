"""The protocol: layers with both halves, the stack, how replies become one sum, optimisers."""
