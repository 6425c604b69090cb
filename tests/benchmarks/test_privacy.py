"""The whole benchmark on a small plan, in processes, as the command runs it."""

import math
from dataclasses import replace

import pytest

from tests.benchmarks.small_task import TASK
from umbel.benchmarks.attack import scenes
from umbel.benchmarks.attack import suite as privacy
from umbel.benchmarks.attack.defences import Defence, example_rows, nothing, rows, secure_rows
from umbel.benchmarks.attack.jobs import jobs_of
from umbel.benchmarks.attack.plans import Plan
from umbel.benchmarks.attack.suite import Report, run
from umbel.federation import Federation

DEFENCES = [rows([8.0], 8.0)[0], rows([8.0], 8.0)[-1], *example_rows([8.0])]
PLAN = Plan(
    tasks=(replace(TASK, optimised=0, references=2, online=2),),
    defences={"digits": DEFENCES},
    canaries=1000,
)


def test_jobs_put_each_defence_where_it_can_be_seen() -> None:
    keys = set(jobs_of(Federation, PLAN, {}))
    assert "row/digits/none/hospitals" in keys
    assert "row/digits/example DP 8/hospitals" in keys
    assert "row/digits/central DP 8/hospitals" not in keys
    assert "row/digits/example DP 8/training" not in keys
    assert "row/digits/central DP 8/training" in keys
    assert "audit/example DP 8" not in keys
    assert {f"fault/{name}" for name in ("noise x 0.25", "clip skipped")} <= keys


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_plan_from_beginning_to_end() -> None:
    seen: list[tuple[int, int]] = []
    report = run(Federation, PLAN, workers=2, say=lambda done, total, _: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert report.problems() == []
    assert [row.name for row in report.rows] == ["none", "central DP 8", "example DP 8"]
    none, central, example = report.rows
    assert none.claimed("model-user") is None
    assert central.claimed("model-user") == pytest.approx(8.0, rel=1e-2)
    assert example.claimed("server") == 8.0
    assert all(row.accuracy() is not None for row in report.rows)
    assert len(report.faults) == 3
    assert len(report.checks) == 18  # 400 suspects are too few to judge a membership AUC
    assert {audit.unit for row in report.rows for audit in row.audits} == {"client", "example"}
    values = [one.value for row in report.rows for _, one in row.findings]
    assert values
    assert all(math.isfinite(value) for value in values)


def test_a_secure_sum_that_leaves_an_attack_alive_is_said_aloud() -> None:
    task = PLAN.tasks[0]
    secure = secure_rows([5], [], 5)[0]
    done = {"row/digits/secure sum of 5/pictures": scenes.pictures(Federation, task, secure)}
    row = privacy.row_of(task, secure, done)
    report = Report([row])
    assert report.problems() == []
    assert any("leaves closed form alive" in warning for warning in report.warnings())
    open_ = Defence("none", "", nothing)
    assert privacy.row_of(task, open_, {}).notes == []


def test_a_scene_that_could_not_run_is_a_note() -> None:
    done = {"row/digits/none/crowd": "crowd could not run: too few nodes"}
    row = privacy.row_of(PLAN.tasks[0], DEFENCES[0], done)
    assert row.measured == {}
    assert row.notes == ["crowd could not run: too few nodes"]
