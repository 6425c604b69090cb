"""For the tests of people who use Umbel.

    def test_my_stack_keeps_its_promise():
        assert_private("path/to/my-app", epsilon=8)

`assert_private` puts canary nodes under the very stack of an app, a federation or a finished run,
and fails where the stack claims nothing, claims more than is allowed, or does not keep its claim.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbel.benchmarks.attack.audits import Audit
    from umbel.federation import Federation


def assert_private(
    run: "Federation | Path | str",
    *,
    epsilon: float | None = None,
    against: str = "model-user",
    options: Mapping[str, Any] | None = None,
    canaries: int = 500,
    seed: int = 0,
) -> "Audit":
    """Fail unless the stack's privacy claim stands up to an audit.

    One round of canary nodes runs on the embedded engine, in a second or two. The audit is a
    one-run lower bound (Steinke, Nasr, Jagielski 2023): a correct stack fails it with a
    probability far below 5 %, and more canaries find smaller faults.

    Args:
        run: a federation, an app's folder, or a run directory.
        epsilon: the most that the run itself may have claimed (run directories), or that the
            audited round may claim (others); None does not look.
        against: `model-user` or `server`.
        options: changes to the options.
        canaries: nodes of the audit.
        seed: of the coins.

    Returns:
        The audit, for further assertions.

    Raises:
        AssertionError: nothing is claimed, too much is, or the claim is refuted.
        ConfigError: there is no such app or run.
    """
    from umbel.benchmarks.attack.own import audit

    federation, known, name, spent = _subject(run)
    given = {**known, **(options or {})}
    found = audit(federation, given, name=name, canaries=canaries, seed=seed)
    result = next(one for one in found if one.adversary == against)
    if result.claimed is None:
        raise AssertionError(
            f"{name} ({federation.stack_for(federation.complete(given))}) promises nothing against "
            f"{against}; a canary audit measured an epsilon of at least {result.measured:.2f}"
        )
    if result.refuted:
        raise AssertionError(
            f"{name} claims epsilon {result.claimed:.3f} against {against}, but at least "
            f"{result.measured:.3f} was measured on {canaries} canaries"
        )
    claimed = result.claimed if spent is None else spent
    if epsilon is not None and claimed > epsilon:
        raise AssertionError(
            f"{name} claims epsilon {claimed:.3f} against {against}, but {epsilon:g} is allowed"
        )
    return result


def _subject(
    run: "Federation | Path | str",
) -> tuple[Any, dict[str, Any], str, float | None]:
    """The federation, its options, its name, and what a finished run has spent."""
    from umbel.bench_privacy import opened
    from umbel.server.output.rundir import RunDirectory

    if not isinstance(run, Path | str):
        return run, {}, run.name, None
    path = Path(run)
    if not (path / "config.json").is_file():
        federation, options, _, name = opened(path, [])
        return federation, options, name, None
    directory = RunDirectory.open(path)
    config = directory.config()
    federation, options, _, name = opened(Path(config["app_path"]), [])
    spent = directory.result().get("epsilon")
    changes = {**options, **config["options"]}
    return federation, changes, name, None if spent is None else float(spent)
