"""Audits of privacy as assertions: of stacks, of single records, and against a lying server."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbel.benchmarks.attack.audits import Audit
    from umbel.benchmarks.attack.verdicts import Verdict
    from umbel.federation import Federation


def assert_private(
    run: "Federation | Path | str",
    *,
    epsilon: float | None = None,
    against: str = "model-user",
    options: Mapping[str, Any] | None = None,
    canaries: int = 500,
    nodes: int = 0,
    seed: int = 0,
) -> "Audit":
    """Fail unless the stack's privacy claim stands up to an audit.

    Rounds of canary nodes run on the embedded engine, in some seconds. The audit is a one-run
    lower bound (Steinke, Nasr, Jagielski 2023): a correct stack fails it with a probability far
    below 5 %, and more canaries find smaller faults. Noise, and where `nodes` is given the
    sampling of the app's own schedule, are tested by their form, with a probability below 1e-6.

    Args:
        run: a federation, an app's folder, or a run directory.
        epsilon: the most that the run itself may have claimed (run directories), or that the
            audited round may claim (others); None does not look.
        against: `model-user` or `server`.
        options: changes to the options.
        canaries: nodes of the audit.
        nodes: of the app, whose sampling is then tested; 0 is those of an app's own folder.
        seed: of the coins.

    Returns:
        The audit, for further assertions.

    Raises:
        AssertionError: nothing is claimed, too much is, or the claim is refuted or not tested.
        ConfigError: there is no such app or run.
    """
    from umbel.benchmarks.attack.own import audit
    from umbel.benchmarks.attack.promises import noise, sampling

    federation, known, name, spent, count = subject(run)
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
    verdicts = noise(federation, given, seed=seed)
    if nodes or count:
        verdicts += sampling(federation, given, nodes or count, seed=seed)
    _all_hold(name, [one for one in verdicts if one.adversary == against])
    return result


def assert_records_private(
    run: "Federation | Path | str",
    *,
    epsilon: float | None = None,
    options: Mapping[str, Any] | None = None,
    nodes: int = 0,
) -> None:
    """Fail unless single records are hidden as a `PrivateSgd` trainer claims.

    A record of the first node is trained on several times: the noise must be as large as the
    claim needs and new each time, and the record no further visible than its clipped gradient.

    Args:
        run: a federation, an app's folder, or a run directory.
        epsilon: the most that one step on one record may claim; None does not look.
        options: changes to the options.
        nodes: of the app; 0 is those of its folder, else 10.

    Raises:
        AssertionError: nothing is claimed, too much is, or the claim is broken or not tested.
        ConfigError: there is no such app or run.
    """
    from umbel.benchmarks.attack.promises import records

    federation, known, name, _, count = subject(run)
    verdicts = records(federation, {**known, **(options or {})}, nodes or count or 10)
    if not verdicts:
        raise AssertionError(f"{name} promises nothing for single records; use PrivateSgd")
    _all_hold(name, verdicts)
    claimed = verdicts[0].claimed
    if epsilon is not None and claimed is not None and claimed > epsilon:
        raise AssertionError(f"{name} claims epsilon {claimed:.3f}, but {epsilon:g} is allowed")


def assert_withstands_lies(
    run: "Federation | Path | str",
    *,
    options: Mapping[str, Any] | None = None,
    nodes: int = 0,
) -> "list[Verdict]":
    """Fail if a coordinator that lies learns what the app's stack is there to hide.

    It tells nodes different options, asks for a round twice, listens to everything that is sent
    beside updates, makes the app fail, and looks for released numbers without noise.

    Args:
        run: a federation, an app's folder, or a run directory.
        options: changes to the options.
        nodes: of the app; 0 is those of its folder, else 10.

    Returns:
        What became of every lie, for further assertions; none where nothing is promised.

    Raises:
        AssertionError: a lie went through, or could not be tried.
        ConfigError: there is no such app or run.
    """
    from umbel.benchmarks.attack.lies import tell

    federation, known, name, _, count = subject(run)
    verdicts = tell(federation, {**known, **(options or {})}, nodes or count or 10)
    _all_hold(name, verdicts)
    return verdicts


def _all_hold(name: str, verdicts: "list[Verdict]") -> None:
    bad = [one.sentence for one in verdicts if one.bad or one.outcome == "not tested"]
    if bad:
        raise AssertionError(f"{name}: {'; '.join(bad)}")


def subject(
    run: "Federation | Path | str",
) -> tuple[Any, dict[str, Any], str, float | None, int]:
    """The federation, its options, its name, what a finished run has spent, and its nodes."""
    from umbel.commands.bench_privacy import opened
    from umbel.server.output.rundir import RunDirectory

    if not isinstance(run, Path | str):
        return run, {}, run.name, None, 0
    path = Path(run)
    if not (path / "config.json").is_file():
        federation, options, nodes, name = opened(path, [])
        return federation, options, name, None, nodes
    directory = RunDirectory.open(path)
    config = directory.config()
    federation, options, nodes, name = opened(Path(config["app_path"]), [])
    spent = directory.result().get("epsilon")
    changes = {**options, **config["options"]}
    return federation, changes, name, None if spent is None else float(spent), nodes
