"""Loads a framework that not everybody has installed, when it is needed and never before.

A framework that has started its threads does not survive a fork: in the child, TensorFlow and JAX
wait forever for threads that only the parent has (seen with both). So nothing here is imported with
Umbel, worker processes load their frameworks after they were forked, and a process that has
inherited a framework in use says so in place of waiting.
"""

import importlib
import importlib.util
import os
import sys
from typing import Any

import torch

from umbel.core.errors import ConfigError, RunError

_used: set[str] = set()
_inherited: set[str] = set()


def _forked() -> None:
    _inherited.update(_used)


os.register_at_fork(after_in_child=_forked)


def needed(module: str, extra: str, who: str) -> Any:
    """A module of a framework, imported.

    Args:
        module: such as `flax.nnx`.
        extra: of Umbel, which installs it.
        who: needs it.

    Raises:
        ConfigError: it is not installed.
        RunError: this process was forked from one that had used the framework.
    """
    root = module.partition(".")[0]
    if root in _inherited:
        raise RunError(
            f"{who} would wait forever: this process was forked from one that had used {root} "
            "already; start processes by spawn, or use the framework in the child only"
        )
    _check_installed(root, extra, who)
    _limit_threads(root)
    found = importlib.import_module(module)
    _used.add(root)
    return found


def installed(module: str, extra: str, who: str) -> Any:
    """A package that builds on PyTorch, imported: it survives a fork as PyTorch does.

    Raises:
        ConfigError: it is not installed.
    """
    _check_installed(module.partition(".")[0], extra, who)
    return importlib.import_module(module)


def _check_installed(root: str, extra: str, who: str) -> None:
    if importlib.util.find_spec(root) is None:
        raise ConfigError(
            f"{who} needs {root}, which is not installed; run: pip install 'umbel[{extra}]'"
        )


def _limit_threads(root: str) -> None:
    """Give a framework that is about to load as many threads as this process has for PyTorch.

    Two busy processes with two threads each on two cores were measured fifteen times as slow as
    with one thread each; engines divide the cores, and say so to PyTorch first.
    """
    if root in sys.modules:
        return
    threads = torch.get_num_threads()
    if root == "jax" and threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_cpu_multi_thread_eigen" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    if root == "tensorflow":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
        os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(threads))
