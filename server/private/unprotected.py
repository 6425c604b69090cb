"""Runs without privacy about people to whom something was promised.

    no ledger                             nothing was promised: the run is as free as ever
    a ledger, all of it with noise        refused, unless somebody says `--unprotected`; of
                                          simulated nodes that nobody named, written down and said
    a ledger that is infinite already     there is nothing left to break; it is written down again

A private mean that is asked in a run without epsilon is charged like any other; the training
beside it is recorded as what it is, a release without noise.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dp_accounting import NonPrivateDpEvent

from umbel.core.errors import ConfigError
from umbel.privacy.budget.events import ADD_OR_REMOVE, Charge
from umbel.server.output.session import Session
from umbel.server.privacy_gate import NoGuard
from umbel.server.private.coordinator_key import coordinator_key
from umbel.server.private.ledger import Ledger
from umbel.server.private.population import Register, place_of, state_of
from umbel.server.private.run import run_name
from umbel.server.roster import NodeRef
from umbel.server.training_spec import TrainingSpec
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.transform import Claim


@dataclass(frozen=True)
class Unprotected(NoGuard):
    """The guard of a run whose training is not private: its private means are charged."""

    ledger: Ledger | None = None
    run: str = ""

    def release(self, name: str, claims: Sequence[Claim]) -> None:
        """Commit what a private mean costs, before it is made. Every node is asked."""
        assert self.ledger is not None
        charges = [Charge(claim.event, claim.relation, claim.extra_delta) for claim in claims]
        self.ledger.charge(self.run, name, "model-user", charges)


def unprotected(
    job: TrainingSpec,
    privacy: PrivacyOptions,
    nodes: Sequence[NodeRef],
    session: Session,
    data: object,
    start: Mapping[str, Any],
) -> TrainingSpec:
    """The job of a run without privacy, with a guard where something about its people is kept.

    Raises:
        ConfigError: something was promised to real nodes, or to a population that has a name, and
            nobody said `--unprotected`.
    """
    place = place_of(privacy, session.run, data)
    key = coordinator_key(state_of(session.run))
    ledger = Ledger(place.path, place.population, key, Register(place.register))
    for line in ledger.notes():
        session.progress.note(line)
    promised = bool(ledger.spent("model-user") + ledger.spent("server")) and not ledger.is_open
    lasting = place.scope == "population"  # simulations are compared with and without privacy
    if promised and lasting and not session.run.config().get("unprotected"):
        ledger.close()
        raise ConfigError(
            f"releases about the population {place.population!r} were protected so far "
            f"({place.path}), and this run would release models of it without noise; add epsilon, "
            "or --unprotected, which records epsilon as infinite from now on"
        )
    if not (promised or ledger.is_open or job.questions):
        ledger.close()  # a ledger in which nothing was ever charged
        return job
    name = run_name(session.run)
    ledger.admit(name, place.labels(node.name for node in nodes))
    ledger.begin(name, unprotected=True, started_from=start["model"], nodes=len(nodes))
    open_ = Charge(NonPrivateDpEvent(), ADD_OR_REMOVE)
    ledger.charge(name, "training without noise", "model-user", [open_])
    session.progress.note(
        f"this run is not protected: the ledger of the population {place.population!r} says "
        "epsilon infinite from now on"
    )
    guard = Unprotected(ledger=ledger, run=name)
    weakref.finalize(guard, ledger.close)
    return replace(job, guard=guard)
