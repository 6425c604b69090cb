"""The name under which a node process tells its app where the node's identity is."""

IDENTITY = "secure-identity"
"""Key of a node's configuration: the file with its certificate, key and authority, or the three
files, separated as in PATH."""
