"""Names on which a node process and the ledger that its app charges agree."""

STATE = "umbel-state"
"""Key of a node's configuration: the folder with its ledger. `umbel client` sets it; on Flower's
own SuperNodes their owner does. Without it the ledger lasts as long as `Context.state`."""

COORDINATOR = "umbel-coordinator"
"""Key of a node's configuration: whose messages it answers, for people."""

DATA = "data"
"""Key of a node's configuration: the owner's name for the data. Without it all that the node
answers is about the same data, whatever app or population a coordinator names."""

LEDGER = "ledger.sqlite"
"""The ledger's file in that folder."""

IDENTITY_FILE = "identity.pem"
"""The enrolled node's key and certificates, in that folder."""
