"""Methods: algorithms of federated optimisation, one file each, with both halves."""
