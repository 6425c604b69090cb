"""A node: trainers, data and partitioners, the node's half of a round."""
