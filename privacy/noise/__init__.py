"""Noise whose distribution is exact: tables, lattices, shares."""
