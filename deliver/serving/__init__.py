"""A model that answers: files as inputs, and HTTP."""
