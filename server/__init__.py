"""The coordinator: engines, rounds, checkpoints, run directory, report."""
