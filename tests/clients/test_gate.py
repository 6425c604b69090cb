"""A node's policy against a coordinator that lies: what will run and leave, not what is said.

Every node here is a real one, with a policy file; what it refuses is refused by name, in a reply,
and nothing is trained for it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.clients.liar import NODES, SIZE, Liar, federation, refusal
from umbel.clients import gate
from umbel.clients.admission import admit
from umbel.clients.data.examples import Examples, Split
from umbel.clients.gate import AppError, guarded, kind_of
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.function import FunctionTrainer
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.core.errors import ConfigError
from umbel.core.records import from_array
from umbel.federation import Federation
from umbel.strategies.collect import EXAMPLES, METRICS, UPDATE
from umbel.strategies.layout import CONFIG, STATISTICS
from umbel.strategies.policy.node_policy import PolicyError
from umbel.strategies.policy.reading import load_policy
from umbel.strategies.private.private_mean import PrivateMean
from umbel.strategies.secure.wire import plain_of

NOISY: Mapping[str, Any] = {
    "secure": True,
    "secure-mode": "malicious",
    "noise-multiplier": 5.0,
    "secure-min-cohort": NODES,
}
SUMS: Mapping[str, Any] = {
    "secure": True,
    "secure-mode": "malicious",
    "secure-norm": 1.0,
    "secure-weighting": "equal",
    "secure-metrics": "",
    "secure-min-cohort": NODES,
}
LOCAL: Mapping[str, Any] = {"epsilon": 8.0, "mechanism": "local", "rounds": 3}
CENTRAL: Mapping[str, Any] = {"epsilon": 8.0, "noise-multiplier": 1.0}


def policy(folder: Path, text: str) -> Path:
    file = folder / "policy.toml"
    file.write_text(text)
    return file


def asked(folder: Path, text: str, options: Mapping[str, Any], **more: Any) -> str:
    """What a node with this policy says when it is asked to train; empty if it does."""
    liar = Liar(options, policy=policy(folder, text), **more)
    if liar.complete["secure"]:
        sum_ = liar.gather()
        return "" if sum_.replies == NODES else str(sum_.rejected[0].reason)
    reply = liar.ask(100)
    return "" if not reply.has_error() else refusal(reply)


# ── noise and norms ───────────────────────────────────────────────────────────────────────────


def test_noise_that_nobody_makes_does_not_count(tmp_path: Path) -> None:
    """A key of a message is no layer: it was believed, and the exact sum left."""
    text = 'mode = "malicious"\nmin-noise = 1.0\n'
    said = asked(tmp_path, text, SUMS)
    assert "policy (min-noise) refuses: updates leave with a noise multiplier of at least 1" in said
    fake = {"skellam.noise-multiplier": 5.0, "skellam.shares": 6, "local-gaussian.bound": 1.0}
    lie = {100 + i: fake for i in range(NODES)}
    assert "the nodes of this run make 0" in asked(tmp_path, text, SUMS, told=lie)
    assert asked(tmp_path, text, NOISY) == ""
    lie = {100 + i: {"skellam.noise-multiplier": 0.5} for i in range(NODES)}
    assert "make 0.5" in asked(tmp_path, text, NOISY, told=lie)
    assert "(mode) refuses: mode asks for secure sums" in asked(tmp_path, text, LOCAL)
    assert asked(tmp_path, "min-noise = 1.0", LOCAL) == ""
    assert "(min-noise)" in asked(tmp_path, "min-noise = 1.0", CENTRAL)  # it is the server's


@pytest.mark.parametrize("options", [NOISY, LOCAL])
def test_noise_that_can_be_repeated_is_none(tmp_path: Path, options: Mapping[str, Any]) -> None:
    seeded = {**options, "insecure-noise-seed": 1}
    for text in ("min-noise = 0.001", "epsilon = 100.0"):
        said = asked(tmp_path, text, seeded)
        assert "insecure-noise-seed makes noise that the coordinator can repeat" in said
        assert asked(tmp_path, text, options) == ""


def test_repeatable_noise_is_no_protection(tmp_path: Path) -> None:
    said = asked(tmp_path, "unprotected = false", {**LOCAL, "insecure-noise-seed": 1})
    assert "(unprotected) refuses: no bare update leaves" in said
    assert asked(tmp_path, "unprotected = false", LOCAL) == ""


def test_noise_for_a_smaller_bound_than_updates_have_is_refused(tmp_path: Path) -> None:
    lie = {100 + i: {"skellam.bound": 1e-3} for i in range(NODES)}
    said = asked(tmp_path, "min-noise = 1.0", NOISY, told=lie)
    assert "tells skellam to make noise for updates of norm 0.001" in said


def test_a_norm_is_that_of_the_layer_that_clips(tmp_path: Path) -> None:
    text = "max-norm = 1.0\n"
    assert asked(tmp_path, text, SUMS) == ""
    wide = {**SUMS, "secure-norm": 100.0}
    assert "those of this run have a norm of 100" in asked(tmp_path, text, wide)
    lie = {100 + i: {"clip.norm": 50.0} for i in range(NODES)}  # this is what clips
    assert "a norm of 50" in asked(tmp_path, text, SUMS, told=lie)
    lie = {100 + i: {"clip.norm": 1.0} for i in range(NODES)}  # no layer clips to it
    assert "have no bound" in asked(tmp_path, text, {}, told=lie)


# ── bare updates ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        'mode = "malicious"',
        'mode = "semi-honest"',
        "min-cohort = 2",
        "min-neighbours = 1",
        "bits = [8, 62]",
        "max-norm = 1e9",
        "min-noise = 1e-9",
        "epsilon = 1e9",
        "record-epsilon = 1e9",
        "unprotected = false",
    ],
)
def test_a_policy_that_asks_for_protection_lets_no_bare_update_leave(
    tmp_path: Path, text: str
) -> None:
    """With secure=false the file was not even read."""
    for options in ({}, {"secure": False, "clipping-norm": 1.0}, CENTRAL):
        said = asked(tmp_path, text, options)
        assert said.startswith("this node's policy ("), (text, options)
    assert asked(tmp_path, "", {}) == ""
    if not text.startswith("unprotected"):
        with pytest.raises(ConfigError, match="unprotected = true and"):
            load_policy(policy(tmp_path, f"{text}\nunprotected = true"))


def test_an_old_policy_file_under_its_old_key_is_read(tmp_path: Path) -> None:
    file = policy(tmp_path, 'mode = "malicious"\nmin-cohort = 6\n')
    liar = Liar({})
    liar.contexts[100].node_config["secure-policy"] = str(file)
    assert "(mode) refuses" in refusal(liar.ask(100))
    liar.contexts[100].node_config["policy"] = str(tmp_path / "another.toml")
    assert "(file) refuses" in refusal(liar.ask(100))


def test_a_policy_that_cannot_be_read_lets_nothing_leave(tmp_path: Path) -> None:
    for text in ("min-noise = 'much'", "nonsense = 1", "["):
        said = asked(tmp_path, text, {})
        assert "its file cannot be read" in said
        assert str(tmp_path) not in said
    file = policy(tmp_path, "")
    liar = Liar({}, policy=file)
    assert not liar.ask(100).has_error()
    file.write_text("min-noise = 1.0")  # it counts from the next message on
    assert "(min-noise)" in refusal(liar.ask(100))
    file.unlink()
    assert "(file)" in refusal(liar.ask(100))


def test_a_foreign_app_is_refused_by_a_policy_that_asks_for_protection(tmp_path: Path) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:  # noqa: ARG001
        return Message(RecordDict(), reply_to=message)

    liar = Liar({})

    def answer(text: str, **more: Any) -> Message:
        liar.contexts[100].node_config["policy"] = str(policy(tmp_path, text))
        message = Message(RecordDict(), 100, "train")
        return guarded(app, message, liar.contexts[100], **more)

    assert not answer("").has_error()
    assert not answer('answer = ["train"]').has_error()
    for text in ("min-noise = 1.0", 'metrics = "none"', "unprotected = false"):
        assert "an app without a Federation sends nobody here can tell" in refusal(answer(text))
    assert "(answer)" in refusal(answer('answer = ["evaluate"]'))
    assert "(options.gain)" in refusal(answer("[options]\ngain = 2.0"))
    digest = "a" * 64
    assert not answer(f'apps = ["{digest}"]', digest=digest).has_error()
    assert "(apps)" in refusal(answer(f'apps = ["{digest}"]', digest="b" * 64))
    assert "cannot tell which app" in refusal(answer(f'apps = ["{digest}"]'))


# ── what travels beside an update ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [SUMS, NOISY, LOCAL, CENTRAL])
def test_beside_a_protected_update_nothing_travels(options: Mapping[str, Any]) -> None:
    """Losses, accuracies and counts of single nodes went out in the clear at every run's end."""
    liar = Liar(options)
    reply = liar.ask(100, "evaluate")
    assert {name: dict(record) for name, record in reply.content.items()} == {METRICS: {}}
    liar.contexts[101].run_config["buffers"] = "mean"
    if not liar.complete["secure"]:
        update = liar.ask(100).content
        assert not update[METRICS] and list(update[UPDATE]) == [UPDATE]


def test_a_plain_run_answers_as_before(tmp_path: Path) -> None:
    for text in (None, "", 'answer = ["train", "evaluate"]\nmetrics = "clear"'):
        liar = Liar({}, policy=None if text is None else policy(tmp_path, text))
        assert dict(liar.ask(100, "evaluate").content[METRICS]) == {
            EXAMPLES: 1,
            "loss": 0.5,
            "accuracy": 0.75,
        }
        reply = liar.ask(100).content
        assert dict(reply[METRICS]) == {EXAMPLES: 1, "loss": 0.25}
        assert float(from_array(reply[UPDATE][UPDATE]).norm()) > 0


def test_metrics_and_counts_are_taken_out_or_refused(tmp_path: Path) -> None:
    plain = Liar({}, policy=policy(tmp_path, 'metrics = "none"'))
    assert dict(plain.ask(100).content[METRICS]) == {EXAMPLES: 1}
    assert "(metrics) refuses: metrics may leave not at all" in refusal(plain.ask(100, "evaluate"))
    weighted = Liar({}, policy=policy(tmp_path, 'counts = "none"'))
    assert "(counts) refuses: counts may leave not at all" in refusal(weighted.ask(100))
    inside = {**SUMS, "secure-metrics": "loss:20"}
    assert "(metrics)" in asked(tmp_path, 'metrics = "noised"', inside)
    assert asked(tmp_path, 'metrics = "summed"', inside) == ""
    by_count = {**SUMS, "secure-weighting": "examples"}
    assert "(counts)" in asked(tmp_path, 'counts = "none"', by_count)
    assert asked(tmp_path, 'counts = "summed"\nmetrics = "none"', by_count) == ""
    noised = {**NOISY, "release-metrics": "loss:20"}
    assert asked(tmp_path, 'metrics = "noised"', noised) == ""
    assert "(metrics)" in asked(tmp_path, 'metrics = "none"', noised)
    central = {**CENTRAL, "release-metrics": "loss:20"}  # the server's noise comes after it looked
    assert "in the clear" in asked(tmp_path, 'metrics = "summed"', central)


def test_an_error_s_text_stays_where_the_data_are(tmp_path: Path) -> None:
    """It quotes records: here a name, in a KeyError a key, in a ValueError a value."""

    def text_of(options: Mapping[str, Any], words: str = "") -> str:
        file = policy(tmp_path, words)
        liar = Liar(options, policy=file, app=federation(broken=(0,)))
        if liar.complete["secure"]:
            return str(liar.gather().rejected)
        with pytest.raises(Exception, match=r"\w") as caught:
            liar.ask(100)
        return f"{type(caught.value).__name__}: {caught.value}"

    assert text_of({}) == "ValueError: patient Smith, born 1961, is not in the index"
    place = r"AppError: ValueError in liar.py, line \d+; its text stays on the node"
    assert re.match(place, text_of({}, 'errors = "place"'))
    for options in (LOCAL, CENTRAL):
        assert re.match(place, text_of(options))
        assert "Smith" in text_of(options, 'errors = "full"')
    with pytest.raises(AppError):
        Liar(SUMS, app=federation(broken=(0,))).gather()


def test_what_umbel_itself_says_about_a_message_is_told() -> None:
    liar = Liar(LOCAL, told={100: {"manifest": "another"}})
    with pytest.raises(ConfigError, match="start both with the same app and options"):
        liar.ask(100)


def test_the_files_that_may_speak_are_there() -> None:
    """One that was moved would fall silent: what is wrong with a message would stay on the node."""
    assert gate._PROTOCOL and all(Path(name).exists() for name in gate._PROTOCOL)


class WithStatistics(FunctionTrainer):
    """Its model has a running statistic."""

    def initial(self, options: Any, seed: int) -> Any:
        from umbel.clients.trainers.base import Weights

        first = super().initial(options, seed)
        return Weights(first.parameters, {"running_mean": torch.zeros(2)})


@pytest.mark.parametrize("options", [SUMS, NOISY, LOCAL, CENTRAL])
def test_running_statistics_are_not_told_where_updates_are_protected(
    options: Mapping[str, Any],
) -> None:
    with pytest.raises(ConfigError, match="running statistics would travel in the clear"):
        Liar(options).ask(100, "query.umbel_statistics")


@pytest.mark.parametrize("options", [LOCAL, CENTRAL])
def test_running_statistics_never_travel_beside_a_protected_update(
    options: Mapping[str, Any],
) -> None:
    def initial(options: Any) -> Any:  # noqa: ARG001
        return {"w": np.zeros(SIZE)}

    def train(*_: Any) -> Any:
        raise AssertionError("it was trained")

    app = Federation(WithStatistics(initial, train), lambda *_: 1)
    liar = Liar({**options, "buffers": "mean"}, app=app)
    with pytest.raises(ConfigError, match="buffers=mean would send running statistics"):
        liar.ask(100)


def test_an_exact_answer_to_a_private_mean_leaves_no_node_that_hides_its_update() -> None:
    question = PrivateMean("centre", lambda *_: torch.ones(1, 3), (3,), 1.0)
    app = federation(questions=(question,))
    for options in (SUMS, NOISY, LOCAL):
        liar = Liar(options, app=app)
        content = liar.content()
        content[CONFIG]["question"] = "centre"
        for kind in ("query.umbel_ask", "query.umbel_pool"):
            with pytest.raises(ConfigError, match="nothing exact leaves a node"):
                liar.ask(100, kind, content)
        with pytest.raises(ConfigError, match="the private mean 'centre' takes its noise at"):
            app.job(liar.complete, NODES)
    liar = Liar(CENTRAL, app=app)  # there the coordinator sees every update too
    content = liar.content()
    content[CONFIG]["question"] = "centre"
    assert not liar.ask(100, "query.umbel_ask", content).has_error()


def test_running_statistics_are_no_way_around_a_policy(tmp_path: Path) -> None:
    kind = f"query.{STATISTICS}"
    assert not Liar({}).ask(100, kind).has_error()
    for text, key in (
        ('counts = "none"', "counts"),
        ("unprotected = false", "unprotected"),
        ('answer = ["train"]', "answer"),
    ):
        assert f"({key})" in refusal(Liar({}, policy=policy(tmp_path, text)).ask(100, kind))
    for options in (SUMS, NOISY, LOCAL):
        with pytest.raises(ConfigError, match="beside protected updates"):
            Liar(options).ask(100, kind)


def test_records_that_training_protects_are_told_about_by_nothing_else(tmp_path: Path) -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(lambda: torch.nn.Linear(2, 2), learning_rate=0.1))
    examples = Examples(np.zeros((8, 2), np.float32), np.arange(8) % 2)
    app = Federation(trainer, lambda *_: Split(examples, examples))
    liar = Liar({"example-epsilon": 2.0}, app=app)
    reply = liar.ask(100, "evaluate", RecordDict())
    assert {name: dict(record) for name, record in reply.content.items()} == {METRICS: {}}
    with pytest.raises(ConfigError, match="running statistics would travel in the clear"):
        liar.ask(100, "query.umbel_statistics", RecordDict())

    def admitted(text: str, **options: Any) -> str:
        context = Liar({"example-epsilon": 2.0, **options}, app=app).contexts[100]
        message = Message(RecordDict({CONFIG: ConfigRecord({"round": 1})}), 100, "train")
        rules = load_policy(policy(tmp_path, text))
        try:
            admit(rules, "train", message, liar.client, liar.client.known(context), alone=True)
        except PolicyError as refusal:
            return refusal.key
        return ""

    assert admitted("record-epsilon = 3.0") == admitted("unprotected = false") == ""
    assert admitted("min-noise = 1.0") == "min-noise"  # it is about the node's whole update
    assert admitted("epsilon = 3.0") == "epsilon"
    seeded = {"insecure-noise-seed": 1}
    assert admitted("record-epsilon = 3.0", **seeded) == "record-epsilon"
    assert admitted("unprotected = false", **seeded) == "unprotected"


# ── kinds, options, apps ──────────────────────────────────────────────────────────────────────


def test_only_the_kinds_that_the_owner_lists_are_answered(tmp_path: Path) -> None:
    liar = Liar({}, policy=policy(tmp_path, 'answer = ["train"]'))
    assert not liar.ask(100).has_error()
    assert "(answer) refuses: it answers train, and not evaluate" in refusal(
        liar.ask(100, "evaluate")
    )
    assert not liar.ask(100, "query.umbel_hello").has_error()
    own = ("query.umbel_ask", "query.umbel_pool", "query.umbel_statistics")
    for kind in (*own, "query.anything", "query"):
        assert "(answer)" in refusal(liar.ask(100, kind)), kind
    assert kind_of("train.other") == "train"
    sums = Liar(SUMS, policy=policy(tmp_path, 'answer = ["train"]'))
    assert sums.gather().replies == NODES  # a sum's later trips belong to training


def test_where_no_bare_update_leaves_nothing_as_telling_does(tmp_path: Path) -> None:
    liar = Liar({}, policy=policy(tmp_path, "unprotected = false"))
    for kind in ("query.umbel_ask", "query.umbel_statistics", "query.anything"):
        assert "(unprotected)" in refusal(liar.ask(100, kind))


def test_a_node_process_never_answers_as_a_pool() -> None:
    liar = Liar({})
    message = Message(liar.content(), 100, "query.umbel_pool")
    reply = guarded(liar.client, message, liar.contexts[100], alone=True)
    assert "a node answers for itself alone" in refusal(reply)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("gain = {min = 0.5, max = 2}", 1.5, 1e-30),
        ("gain = {min = 0.5}", 1e9, 0.0),
        ("gain = {max = 2.0}", -1.0, 2.5),
        ("gain = [1.0, 3.0]", 3.0, 2.0),
        ("gain = 1", 1.0, 1.5),
        ('optimizer = ["fedavg", "fedadam"]', "fedadam", "fedyogi"),
        ("secure = false", False, True),
        ("round-timeout = {min = 1}", 5.0, 0.0),
    ],
)
def test_options_have_the_values_that_the_owner_allows(
    tmp_path: Path, rule: str, good: Any, bad: Any
) -> None:
    name = rule.partition(" ")[0]
    text = f"[options]\n{rule}\n"
    assert asked(tmp_path, text, {name: good}) == ""
    said = asked(tmp_path, text, {name: bad})
    assert f"policy (options.{name}) refuses: {name} may be " in said
    assert f"the run has {bad!r}" in said


def test_other_options_as_in_the_app(tmp_path: Path) -> None:
    file = policy(tmp_path, 'other-options = "app"\n[options]\nrounds = {max = 50}\n')

    def ask(**options: Any) -> str:
        liar = Liar({"gain": 2.0, **options}, policy=file)
        liar.client.installed("a" * 64, {"gain": 2.0})
        reply = liar.ask(100)
        return refusal(reply) if reply.has_error() else ""

    assert ask() == ask(rounds=20) == ""
    assert "(other-options) refuses: gain is 3.0, and the app's own value is 2.0" in ask(gain=3.0)
    assert "(options.rounds)" in ask(rounds=51)
    assert "(other-options)" in ask(unheard=1)
    assert "this engine does not show" in refusal(Liar({}, policy=file).ask(100))


def test_only_the_apps_that_the_owner_lists_run(tmp_path: Path) -> None:
    liar = Liar({}, policy=policy(tmp_path, f'apps = ["{"A" * 64}"]'))
    assert "this engine cannot tell which app runs" in refusal(liar.ask(100))
    liar.client.installed("b" * 64, {})
    assert "this app is bbbbbbbbbbbb" in refusal(liar.ask(100))
    liar.client.installed("a" * 64, {})
    assert not liar.ask(100).has_error()


def test_a_refusal_costs_no_training_and_the_node_answers_on(tmp_path: Path) -> None:
    trained = []

    def train(arrays: Any, _: Any, job: Any) -> Any:
        trained.append(job.round)
        return arrays, 1, {}

    app = Federation(FunctionTrainer(lambda _: {"w": np.zeros(SIZE)}, train), lambda *_: 1)
    file = policy(tmp_path, "unprotected = false")
    liar = Liar({}, policy=file, app=app)
    assert liar.ask(100).has_error()
    secure = Liar(
        {**SUMS, "secure-min-cohort": 3}, policy=policy(tmp_path, "min-cohort = 9"), app=app
    )
    assert "cohort: sums of 3 nodes; the policy wants 9" in str(secure.gather().rejected)
    bare = secure.ask(100)  # a secure run's node that is asked without a session
    assert "without a secure sum" in str(plain_of(bare.content)["refused"])
    assert not trained
    file.write_text("")
    assert not liar.ask(100).has_error()
    assert trained == [1]
