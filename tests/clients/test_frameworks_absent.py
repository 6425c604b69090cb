"""Frameworks are loaded when they are needed and not before; a missing one is one sentence."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

import umbel
from umbel.clients.frameworks import extras
from umbel.core.errors import ConfigError, RunError

UNTOUCHED = """
import sys
import umbel
trainers = [umbel.KerasTrainer(lambda: None), umbel.JaxTrainer(lambda key: {}, lambda p, x: x)]
umbel.Federation(trainer=trainers[0], data=print)
assert all(trainer.OPTIONS["batch-size"] == 32 for trainer in trainers)
loaded = {"keras", "tensorflow", "jax", "flax", "optax"} & set(sys.modules)
assert not loaded, loaded
"""


def test_a_trainer_is_made_without_its_framework() -> None:
    subprocess.run([sys.executable, "-c", UNTOUCHED], check=True)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        (umbel.JaxTrainer(lambda _: {}, print), r"needs jax.*pip install 'umbel\[jax\]'"),
        (umbel.KerasTrainer(print, "jax"), r"jax needs jax.*pip install 'umbel\[jax\]'"),
        (umbel.KerasTrainer(print, "torch"), r"needs keras.*pip install 'umbel\[keras\]'"),
        (umbel.KerasTrainer(print), r"tensorflow.*pip install 'umbel\[tensorflow\]'"),
        (umbel.KerasTrainer(print, "theano"), "'theano'; it can be tensorflow, jax, torch"),
    ],
)
def test_a_framework_that_is_not_installed_is_one_sentence(
    trainer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    absent = {"jax", "keras", "tensorflow"}
    if getattr(trainer, "backend", "") == "":
        absent.add("torch")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in absent else there(name, *rest),
    )
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    with pytest.raises(ConfigError, match=said):
        trainer.initial(trainer.OPTIONS, 0)


def test_a_framework_that_a_fork_has_inherited_in_use_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extras, "_used", {"colorsys"})
    monkeypatch.setattr(extras, "_inherited", set())
    assert extras.needed("colorsys", "x", "It") is sys.modules["colorsys"]
    extras._forked()
    with pytest.raises(RunError, match=r"It would wait forever: .* forked .* used colorsys"):
        extras.needed("colorsys", "x", "It")


@pytest.mark.parametrize(
    ("module", "kind", "said"),
    [
        ("keras.src.models.model", "Model", r"trainer=KerasTrainer\(lambda: Own\(...\)\)"),
        ("flax.nnx.module", "Module", r"trainer=JaxTrainer\(lambda rngs: Own\(...\)\)"),
        ("flax.linen.module", "Module", r"trainer=JaxTrainer\(Own\(...\), inputs=...\)"),
    ],
)
def test_a_model_in_the_place_of_a_trainer_is_told_its_trainer(
    module: str, kind: str, said: str
) -> None:
    base = type(kind, (), {"__module__": module})
    own = type("Own", (base,), {})
    for given in (own, own()):
        with pytest.raises(ConfigError, match=said):
            umbel.Federation(trainer=given, data=print)


@pytest.mark.parametrize("name", ["device", "learning-rate", "proximal-mu", "batch-size"])
def test_options_are_checked_without_the_framework(name: str) -> None:
    for trainer in (umbel.KerasTrainer(print), umbel.JaxTrainer(print, print)):
        wrong: Any = 3 if name == "device" else "much"
        with pytest.raises(ConfigError, match=name):
            trainer.check_options({**trainer.OPTIONS, name: wrong})
        if name != "device":
            with pytest.raises(ConfigError, match=f"{name} is -1"):
                trainer.check_options({**trainer.OPTIONS, name: -1})
