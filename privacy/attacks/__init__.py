"""Attacks, and audits made of them."""
