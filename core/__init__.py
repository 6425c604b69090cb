"""What every room stands on: errors, options, records, the app folder, the adapter to Flower."""

SAYS_NO_DATA = True
"""See `umbel.core.errors`."""
