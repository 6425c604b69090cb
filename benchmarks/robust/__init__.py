"""Nodes that lie against rules that are to stand them: on the built-in data, or on an app's own."""
