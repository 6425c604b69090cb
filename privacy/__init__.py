"""The mathematics of privacy: no Flower, no network."""
