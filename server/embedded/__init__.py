"""The embedded engine: virtual nodes on this machine."""
