"""Simulated time: virtual nodes answer when devices of theirs would."""
