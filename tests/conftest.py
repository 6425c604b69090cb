"""What every test of this project starts from."""

import os

from hypothesis import settings

# Flower asks for this when it is imported; no test makes a connection of its own accord.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

# How long an example takes says nothing on a busy machine.
settings.register_profile("umbel", deadline=None, derandomize=False)
settings.load_profile("umbel")
