"""Secure sums: the protocol, its checks, and the layers that go with it."""
