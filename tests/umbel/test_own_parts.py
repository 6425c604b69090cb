"""Parts that an app brings, in whole runs: what they see, and that a resumed run sees it too."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel import Examples, Federation, FunctionTrainer, SamplingContext, run
from umbel.core.errors import ConfigError
from umbel.server.output.progress import SilentProgress

SEEN: list[tuple[int, dict[str, tuple[int, int, bool]]]] = []


@dataclass(frozen=True)
class Worst:
    """Those with the largest loss, and first those that were never asked."""

    size: int = 2
    name: str = "worst"
    sampling: None = None

    def bounds(self, population: int) -> tuple[float, int]:
        return float(min(self.size, population)), min(self.size, population)

    def select(self, nodes: Any, ctx: SamplingContext) -> Any:
        seen = {node.name: ctx.of(node) for node in nodes}
        SEEN.append((ctx.number, {k: (v.asked, v.last, bool(v.metrics)) for k, v in seen.items()}))
        order = sorted(nodes, key=lambda n: (seen[n.name].asked > 0, -_loss(seen[n.name])))
        return order[: self.size]


def _loss(history: Any) -> float:
    return float(history.metrics.get("loss", 0.0))


def data(node: Any, options: Any) -> Examples:  # noqa: ARG001
    x = np.random.default_rng(node.partition).normal(size=(20, 2))
    return Examples(x, x @ np.array([1.0, -1.0 - node.partition]))


def train(arrays: Any, examples: Any, job: Any) -> Any:  # noqa: ARG001
    error = examples.x @ arrays["w"] - examples.y
    w = arrays["w"] - 0.02 * examples.x.T @ error
    return {"w": w}, len(error), {"loss": float((error**2).mean())}


federation = Federation(
    FunctionTrainer(lambda options: {"w": np.zeros(2)}, train),  # noqa: ARG005
    data,
    sampler=Worst(),
)


def fit(app: Federation, **more: Any) -> Any:
    return run(app, nodes=None if "resume" in more else 5, progress=SilentProgress(), **more)


def test_a_run_that_goes_on_chooses_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SEEN.clear()
    straight = fit(federation, options={"rounds": 6})
    rounds, SEEN[:] = list(SEEN), []
    first = fit(federation, options={"rounds": 4})
    resumed = fit(federation, resume=first["run"], options={"rounds": 6})
    assert rounds == SEEN
    assert rounds[0][1] == dict.fromkeys("01234", (0, 0, False))
    assert sum(asked for asked, _, _ in rounds[-1][1].values()) == 10
    np.testing.assert_array_equal(straight.model()["w"], resumed.model()["w"])


def test_a_private_run_shows_a_sampler_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SEEN.clear()
    found = fit(federation, options={"rounds": 3, "epsilon": 8.0, "delta": 1e-3})
    assert [number for number, _ in SEEN] == [1, 2, 3]
    assert not any(measured for _, seen in SEEN for _, _, measured in seen.values())
    assert sum(asked for asked, _, _ in SEEN[-1][1].values()) == 4
    assert found["epsilon"] <= 8.0


def test_an_option_of_the_apps_own_part_that_it_lacks_is_refused() -> None:
    for option in ("optimizer", "cohort"):
        with pytest.raises(ConfigError, match=f"{option}=app is the part that the app brings"):
            fit(replace(federation, sampler=None), options={"rounds": 1, option: "app"})
