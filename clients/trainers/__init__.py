"""Trainers: how a node's model is made, trained and evaluated."""
