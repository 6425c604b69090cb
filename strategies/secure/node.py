"""Names on which a node process and the secure sum in its app agree."""

IDENTITY = "secure-identity"
"""Key of a node's configuration: the file with its certificate, key and authority, or the three
files, separated as in PATH."""

EXTERNAL_SESSION = "umbel.secure.handover"
"""Record that a node process lays into `Context.state` for a session: it keeps sessions itself,
recognises replays of them, and writes them nowhere."""

SPENT = "umbel.secure.spent"
"""Record beside it: the last round of the run of which this node has given a masked update."""
