"""What a run does once: options are read, layers checked, heavy packages imported."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel import Examples, Federation, FunctionTrainer, run
from umbel.server.output.progress import SilentProgress
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.stack import Stack

HEAVY = ("torch", "flwr", "numpy", "scipy", "pandas", "dp_accounting", "cryptography", "matplotlib")


def federation() -> Federation:
    def data(node: Any, options: Any) -> Examples:  # noqa: ARG001
        x = np.random.default_rng(node.partition).normal(size=(20, 2))
        return Examples(x, x @ np.array([1.0, -1.0]))

    def train(arrays: Any, examples: Any, job: Any) -> Any:
        error = examples.x @ arrays["w"] - examples.y
        return {"w": arrays["w"] - job.learning_rate * examples.x.T @ error}, len(error), {}

    trainer = FunctionTrainer(lambda options: {"w": np.zeros(2)}, train)  # noqa: ARG005
    return Federation(trainer, data, options={"learning-rate": 0.02})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """The calls that a run makes of some methods, by their names."""

    def count(**options: Any) -> Counter[str]:
        calls: Counter[str] = Counter()
        watched: list[tuple[type, str]] = [(Stack, "check"), (Stack, "init"), (Clip, "check")]
        with monkeypatch.context() as patch:
            for kind, name in watched:
                inner = getattr(kind, name)

                def outer(
                    *given: Any, inner: Any = inner, what: str = f"{kind.__name__}.{name}"
                ) -> Any:
                    calls[what] += 1
                    return inner(*given)

                patch.setattr(kind, name, outer)
            for group in (PrivacyOptions, RunOptions):
                read = group.read.__func__  # type: ignore[attr-defined]

                def reading(kind: Any, given: Any, read: Any = read) -> Any:
                    calls[f"{kind.__name__}.read"] += 1
                    return read(kind, given)

                patch.setattr(group, "read", classmethod(reading))
            run(federation(), options=options, nodes=4, progress=SilentProgress())
        return calls

    return count


def test_a_private_round_checks_its_layers_once(
    counted: Callable[..., Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"epsilon": 8.0, "delta": 1e-3, "clipping-norm": 1.0, "client-eval-every": -1}
    few, many = counted(rounds=2, **given), counted(rounds=6, **given)
    rounds = 4
    each = {name: (many[name] - few[name]) / rounds for name in many}
    assert each == {
        "Stack.check": 1.0,
        "Stack.init": 0.0,
        "Clip.check": 1.0,
        "PrivacyOptions.read": 0.0,
        "RunOptions.read": 0.0,
    }
    # by the command, by the server's half and by the nodes' half, which here are one process
    assert few["PrivacyOptions.read"] <= 3


def test_the_learning_rate_follows_its_schedule_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"rounds": 3, "schedule": "step", "schedule-every": 1, "schedule-gamma": 0.5}
    found = run(federation(), options=options, nodes=1, progress=SilentProgress())
    w = np.zeros(2)
    x = np.random.default_rng(0).normal(size=(20, 2))
    for rate in (0.02, 0.01, 0.005):
        w = w - rate * x.T @ (x @ w - x @ np.array([1.0, -1.0]))
    np.testing.assert_allclose(found.model()["w"], w, rtol=1e-5)
    assert [line["learning_rate"] for line in found.lines()] == [0.02, 0.01, 0.005]


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import umbel", 60),
        ("import umbel.commands.cli as c, sys; sys.argv = ['umbel', '--help']; c.main()", 250),
        ("import umbel.commands.cli as c, sys; sys.argv = ['umbel', 'run', '.']; c.main()", 250),
    ],
    ids=["import umbel", "umbel --help", "umbel run, of no app"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(
    code: str, most: int, tmp_path: Path
) -> None:
    program = (
        "import sys\nbefore = set(sys.modules)\n"
        f"try:\n    exec({code!r})\nexcept SystemExit: pass\n"
        f"new = set(sys.modules) - before\nheavy = sorted(new & set({HEAVY!r}))\n"
        f"assert not heavy, heavy\nassert len(new) < {most}, len(new)\nprint('ok')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.endswith("ok\n"), done.stderr
