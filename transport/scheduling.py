"""How Linux is told that the link's processes are to finish a step before another takes the core.

A secure round of ten nodes on two cores is two hundred short steps of twenty processes. By default
whoever is woken may take the core from whoever is at work, who then finds the caches full of
others' memory; as batch tasks all of them wait for the end of a step, which takes a tenth off such
a round. Threads and processes that are started later inherit it.
"""

import contextlib
import os
import sys


def work_in_batches() -> None:
    """Make this thread a batch task, and those that it starts from now on."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # forbidden in some containers
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
