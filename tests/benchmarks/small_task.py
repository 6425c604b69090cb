"""A task that the scenes play in seconds."""

from umbel.benchmarks.attack.scenes import Task

TASK = Task(
    data="digits",
    hidden=32,
    nodes=20,
    cohort=10,
    rounds=5,
    suspects=400,
    pictures=16,
    optimised=1,
    iterations=120,
    bins=400,
    references=2,
    wide=64,
    wide_epochs=20,
    wide_rounds=5,
)
