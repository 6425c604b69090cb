"""A search: its space, its lock, its result, and what it costs under a promise."""

import json
import math
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

pytest.importorskip("optuna", reason="pip install 'umbel[tune]'")

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from sklearn.linear_model import LogisticRegression

from umbel import (
    BySize,
    ConfigError,
    Examples,
    Federation,
    Partitioned,
    PrivateSgd,
    SklearnTrainer,
    TorchTrainer,
)
from umbel.clients.data.datasets import load
from umbel.clients.data.sealed import sealed
from umbel.deliver.search.chance import Chance
from umbel.deliver.search.space import Dimension, parse_space
from umbel.privacy.budget.accounting import spent
from umbel.privacy.budget.selection import ORDERS
from umbel.privacy.noise.entropy import Entropy
from umbel.server.private.coordinator_key import coordinator_key
from umbel.server.private.ledger import Ledger
from umbel.tuning import divided, tune

KNOWN = {"learning-rate": 0.05, "batch-size": 32, "schedule": "none", "nesterov": False}


def clinics(**changes: Any) -> Federation:
    trainer = SklearnTrainer(LogisticRegression(), features=30, classes=2, local_iterations=1)
    made = Federation(trainer, Partitioned("breast-cancer", BySize(1.0)), name="clinics")
    return replace(made, **changes)


def linear() -> Federation:
    return Federation(
        TorchTrainer(lambda: nn.Linear(30, 2)), Partitioned("breast-cancer"), name="linear"
    )


def test_a_space_is_read_in_the_types_of_the_options() -> None:
    found = parse_space(
        "learning-rate=log(0.001, 1)  batch-size=[16,32] schedule=[none,cosine]", KNOWN
    )
    assert [str(one) for one in found] == [
        "learning-rate=log(0.001,1)", "batch-size=[16,32]", "schedule=[none,cosine]",
    ]  # fmt: skip
    whole = parse_space("batch-size=log(8,512)", KNOWN)[0]
    chance = Chance(Entropy(insecure_seed=0))
    values = [whole.pick(chance) for _ in range(300)]
    assert all(isinstance(v, int) and 8 <= v <= 512 for v in values)
    assert np.median(values) < 150  # a third of the range in logarithms is below 32


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("learning-rte=log(0.001,1)", "'learning-rte', which there is not; did you mean learning-"),
        ("learning-rate=lgo(0.001,1)", r"cannot be read at 'learning-rate=lgo\(0.001,1\)'"),
        ("learning-rate=log(0.001,1", "cannot be read at"),
        ("learning-rate=log(0,1)", "the ends of a logarithm are above 0 and grow"),
        ("learning-rate=real(1,0.5)", "the ends grow"),
        ("learning-rate=real(1)", "a range has two numbers"),
        ("batch-size=int(1.5,3)", "the end 1.5, but it takes whole numbers"),
        ("batch-size=[16,a]", "batch-size is 'a', but it must be a whole number"),
        ("batch-size=[16,16]", "one value of batch-size twice"),
        ("batch-size=[16,]", "an empty value for batch-size"),
        ("schedule=real(0,1)", "it is str, such as 'none'; list its values"),
        ("batch-size=[1,2] batch-size=[3]", "names batch-size twice"),
        (" ", "--space is empty"),
    ],
)
def test_a_typo_in_a_space_is_one_sentence(space: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_space(space, KNOWN)
    assert "\n" not in str(caught.value)


def test_held_out_examples_are_divided_once_for_all() -> None:
    whole = Examples(np.arange(11.0)[:, None], np.arange(11))
    one, other = divided(whole)
    assert sorted([*one.y, *other.y]) == list(range(11))
    assert [list(part.y) for part in divided(whole)] == [list(one.y), list(other.y)]
    with pytest.raises(ConfigError, match="two halves need at least two"):
        divided(whole.take([0]))


def test_a_search_finds_better_options_than_bad_defaults(tmp_path: Path) -> None:
    """One iteration from zero in one round is poor; the search may take up to twenty."""
    lines: list[str] = []
    given: dict[str, Any] = {
        "space": "local-iterations=int(1,20)",
        "options": {"rounds": 1},
        "nodes": 5,
        "out": tmp_path / "search",
    }
    tune(clinics(), trials=4, say=lines.append, **given)
    found = tune(clinics(), trials=6, say=lines.append, **given)  # goes on: two more
    assert len(found["trials"]) == 6 and sum(line.startswith("trial") for line in lines) == 6
    assert found["trials"][0]["options"] == {"local-iterations": 1}  # the defaults come first
    assert found["best"]["validation"] > found["default"]["validation"]
    assert found["best"]["metrics"]["accuracy"] >= found["default"]["metrics"]["accuracy"] - 0.05
    assert found["epsilon"] is None
    stored = json.loads((tmp_path / "search/search.json").read_text())
    assert stored["best"]["options"] == found["best"]["options"]
    assert (tmp_path / "search/slices.png").is_file()
    kept = {trial.name for trial in (tmp_path / "search/trials").iterdir()}
    assert kept == {"default", Path(found["best"]["run"]).name}
    with pytest.raises(ConfigError, match="holds a search with the space"):
        tune(clinics(), trials=7, **{**given, "space": "local-iterations=int(1,9)"})


def test_no_trial_can_look_at_the_test_half(tmp_path: Path) -> None:
    """An app that tries: by its data set, by its summary, and by what it is judged on."""
    _, test = divided(load("breast-cancer").test)
    secret = {row.tobytes() for row in test.x}
    data = Partitioned("breast-cancer", BySize(1.0))
    seen: list[str] = []

    class Spy(SklearnTrainer):
        def train(self, weights: Any, examples: Any, job: Any) -> Any:
            with pytest.raises(ConfigError, match="held-out examples are locked while umbel tune"):
                data.central_test(job.options)
            seen.append("train")
            return super().train(weights, examples, job)

        def evaluate(self, weights: Any, examples: Any, options: Any) -> Any:
            if secret & {row.tobytes() for row in np.asarray(examples.x)}:
                seen.append("test")
            return super().evaluate(weights, examples, options)

    spy = Spy(LogisticRegression(), features=30, classes=2)
    peek = clinics(trainer=spy, data=data, summary=lambda *_: {"test": len(data.central_test({}))})
    tune(
        peek, space="local-iterations=[1,2]", trials=2, options={"rounds": 1}, nodes=2,
        out=tmp_path / "search",
    )  # fmt: skip
    first = seen.index("test")
    assert "train" not in seen[first:] and seen.count("test") == 2  # best and defaults, at the end
    assert len(data.central_test({}).x) == 114  # and the lock is open again


def test_a_lock_holds_for_everybody_until_it_is_opened() -> None:
    data = Partitioned("wine")
    with (
        sealed("a test runs"),
        sealed("another runs"),
        pytest.raises(ConfigError, match="locked while another runs"),
    ):
        data.central_test({})
    assert len(data.central_test({}).x) > 0


def test_a_search_under_a_promise_needs_a_way(tmp_path: Path) -> None:
    private: dict[str, Any] = {"options": {"epsilon": 8.0, "rounds": 2}, "nodes": 20}
    with pytest.raises(ConfigError, match=r"--charge poisson.*--public FILE.npz.*without a search"):
        tune(linear(), space="learning-rate=log(0.01,1)", out=tmp_path, **private)
    with pytest.raises(ConfigError, match="varies rounds, on which the cost of a trial depends"):
        tune(linear(), space="rounds=[2,3]", charge="poisson", out=tmp_path / "a", **private)
    with pytest.raises(ConfigError, match="can be poisson, geometric"):
        tune(linear(), space="momentum=[0.0,0.9]", charge="fixed", out=tmp_path / "a", **private)
    with pytest.raises(ConfigError, match="this app makes none"):
        tune(linear(), space="momentum=[0.0,0.9]", charge="poisson", out=tmp_path / "a")
    records = replace(linear(), trainer=PrivateSgd(trainer=TorchTrainer(lambda: nn.Linear(30, 2))))
    with pytest.raises(ConfigError, match="each node keeps the budget of its own records"):
        tune(records, space="momentum=[0.0,0.9]", charge="poisson", out=tmp_path / "a")
    fixed = {**private, "options": {**private["options"], "sampling": "fixed", "cohort-size": 5.0}}
    with pytest.raises(ConfigError, match="accounted for Poisson cohorts"):
        tune(linear(), space="momentum=[0.0,0.9]", charge="poisson", out=tmp_path / "b", **fixed)


def test_a_private_search_is_charged_and_costs_what_the_formulas_say(tmp_path: Path) -> None:
    found = tune(
        linear(),
        space="learning-rate=log(0.01,1)",
        trials=3,
        charge="poisson",
        options={"epsilon": 8.0, "rounds": 2, "cohort-size": 10.0, "population": "patients"},
        nodes=20,
        out=tmp_path / "search",
    )
    # The epsilon of the search, once more by dp-accounting's own implementation of the theorem.
    run = SelfComposedDpEvent(
        PoissonSampledDpEvent(0.5, GaussianDpEvent(found["noise_multiplier"])), 2
    )
    theirs = RdpAccountant(ORDERS).compose(RepeatAndSelectDpEvent(run, 3.0, math.inf))
    again = theirs.get_epsilon(1e-5)
    assert found["epsilon"] == pytest.approx(again, rel=1e-4) and found["epsilon"] <= 8.0
    assert found["epsilon_of_one_trial"] < found["epsilon"]
    # It is in the population's ledger, whatever came out, and a run after it knows.
    place = Path(os.environ["XDG_DATA_HOME"]) / "umbel/populations/patients.sqlite"
    with Ledger(place, "patients", coordinator_key()) as ledger:
        assert spent(ledger.spent("model-user"), 1e-5).epsilon == pytest.approx(found["epsilon"])
    # Nothing of the other trials is left, and the best one claims nothing of its own.
    left = {p.name for p in (tmp_path / "search").iterdir()}
    assert left <= {"config.json", "search.json", "best"} and found["trials"] is None
    if found["best"] is not None:
        assert not (tmp_path / "search/best/certificate.json").exists()
    with pytest.raises(ConfigError, match="holds a private search already"):
        tune(
            linear(), space="learning-rate=log(0.01,1)", trials=3, charge="poisson",
            options={"epsilon": 8.0, "rounds": 2}, nodes=20, out=tmp_path / "search",
        )  # fmt: skip


def test_a_search_on_public_examples_asks_no_node(tmp_path: Path) -> None:
    data = load("breast-cancer").train
    np.savez(tmp_path / "public.npz", x=np.asarray(data.x)[:100], y=np.asarray(data.y)[:100])

    def nobody(*_: Any) -> Any:
        raise AssertionError("a trial asked for a node's own examples")

    app = replace(linear(), data=nobody, test=lambda _: load("breast-cancer").test)
    found = tune(
        app, space="learning-rate=[0.1,0.5]", trials=2, public=tmp_path / "public.npz",
        options={"epsilon": 8.0, "rounds": 1}, nodes=10, out=tmp_path / "search",
    )  # fmt: skip
    assert len(found["trials"]) == 2 and found["best"]["metrics"]["accuracy"] > 0.3


def test_what_cannot_be_searched_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--space allows local-epochs=0: local-epochs and local"):
        tune(linear(), space="local-epochs=int(0,2)", trials=1, out=tmp_path / "a")
    with pytest.raises(ConfigError, match="--metric is 'auc', but this app measures loss, acc"):
        tune(clinics(), space="local-iterations=[1]", metric="auc", trials=1, out=tmp_path / "a")
    with pytest.raises(ConfigError, match="no held-out examples, so nothing could judge"):
        tune(replace(linear(), data=lambda *_: None), space="momentum=[0.0]", out=tmp_path / "a")
    with pytest.raises(ConfigError, match="--trials is 0"):
        tune(clinics(), space="local-iterations=[1]", trials=0)
    assert isinstance(parse_space("momentum=[0.5]", {"momentum": 0.0})[0], Dimension)


def test_the_nodes_of_a_trial_run_on_a_pool(tmp_path: Path) -> None:
    """Same choices, same scores; the threads are not this one."""
    seen: set[int] = set()
    task = clinics()
    own: Any = task.data

    class Watched:
        def __call__(self, node: Any, options: Any) -> Any:
            seen.add(threading.get_ident())
            return own(node, options)

        def central_test(self, options: Any) -> Any:
            return own.central_test(options)

    watched = replace(task, data=Watched())
    space, given = "local-iterations=[1,2]", {"rounds": 2}
    here = tune(watched, space=space, trials=2, options=given, nodes=4, out=tmp_path / "here")
    assert seen == {threading.get_ident()}
    seen.clear()
    there = tune(
        watched, space=space, trials=2, options=given, nodes=4, out=tmp_path / "there",
        pool="threads",
    )  # fmt: skip
    assert seen and threading.get_ident() not in seen
    assert there["best"]["metrics"] == here["best"]["metrics"]
    assert there["best"]["options"] == here["best"]["options"]
    for pool, words in (("processes", "take --pool threads"), ("dask://x:1", "take --pool threads"),
                        ("treads", "--pool is 'treads'; it can be")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            tune(watched, space=space, trials=1, nodes=2, out=tmp_path / "no", pool=pool)
