"""Models of Hugging Face, whole and by adapters: laws, refusals, and federations on a text."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umbel
from tests.frameworks import tiny_transformers as tiny
from umbel import Examples, Federation, Job, Split, TransformersTrainer
from umbel.core.errors import ConfigError
from umbel.testing import check_trainer

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600)]
if importlib.util.find_spec("peft") is None:
    pytest.skip("transformers and peft are not installed", allow_module_level=True)

LORA = {"r": 2, "target_modules": ["query", "value"]}


def digest() -> str:
    with pytest.raises(ConfigError, match=r"need the digest .* give base='[0-9a-f]{64}'") as said:
        TransformersTrainer(tiny.classifier, lora=LORA).initial({}, 0)
    return str(said.value).split("base='")[1].split("'")[0]


def adapted(**settings: Any) -> TransformersTrainer:
    return TransformersTrainer(tiny.classifier, lora=LORA, base=digest(), **settings)


def size(trainer: TransformersTrainer) -> int:
    return sum(p.numel() for p in trainer.initial(trainer.OPTIONS, 0).parameters.values())


def test_it_keeps_the_laws_of_trainers_whole_and_by_adapters() -> None:
    few = tiny.digits_or_words().take(slice(0, 40))
    for trainer in (TransformersTrainer(tiny.classifier), adapted()):
        check_trainer(trainer, few)


def test_only_adapters_travel() -> None:
    small, whole = size(adapted()), size(TransformersTrainer(tiny.classifier))
    assert small <= 0.03 * whole
    names = adapted().initial({}, 0).parameters
    assert all("lora_" in name or "classifier" in name for name in names)


def test_adapters_that_do_not_fit_are_refused() -> None:
    base = digest()
    with pytest.raises(ConfigError, match=r"'nothing'.*do not match the base BertFor"):
        lora = {"r": 2, "target_modules": ["nothing"]}
        TransformersTrainer(tiny.classifier, lora=lora, base=base).initial({}, 0)
    with pytest.raises(ConfigError, match=f"has the digest {base}, and the app names abc"):
        TransformersTrainer(tiny.classifier, lora=LORA, base="abc").initial({}, 0)
    with pytest.raises(ConfigError, match="nothing is frozen"):
        TransformersTrainer(tiny.classifier, base=base)


def test_labels_beyond_the_outputs_are_named() -> None:
    few, trainer = tiny.digits_or_words().take(slice(0, 8)), TransformersTrainer(tiny.classifier)
    first = trainer.initial(trainer.OPTIONS, 0)
    with pytest.raises(ConfigError, match="class labels go from 0 to the number of outputs less 1"):
        trainer.train(first, Examples(few.x, np.asarray(few.y) + 5), Job(1, 0, trainer.OPTIONS))


def test_a_dataset_trains_as_the_arrays_that_it_was_made_of() -> None:
    datasets = pytest.importorskip("datasets")
    few, trainer = tiny.digits_or_words().take(slice(0, 20)), TransformersTrainer(tiny.classifier)
    rows = datasets.Dataset.from_dict(
        {"text": ["x"] * 20, "input_ids": np.asarray(few.x), "label": np.asarray(few.y)}
    )
    first, job = trainer.initial(trainer.OPTIONS, 0), Job(1, 0, trainer.OPTIONS)
    one, other = (trainer.train(first, given, job).weights.parameters for given in (few, rows))
    assert all(bool((one[name] == other[name]).all()) for name in one)


def rows_of(node: Any, options: Any) -> Split:  # noqa: ARG001
    x = tiny.stories()[node.partition :: node.partitions]
    return Split(Examples(x, x), Examples(x, x))


def labelled(node: Any, options: Any) -> Split:  # noqa: ARG001
    all_of = tiny.digits_or_words()
    mine = all_of.take(slice(node.partition, None, node.partitions))
    return Split(mine, mine)


def run(trainer: Any, data: Any, where: Path, **options: Any) -> dict[str, Any]:
    known = {"nodes": 3, "rounds": 8, "momentum": 0.9, **options}
    named = {name.replace("_", "-"): value for name, value in known.items()}
    federation = Federation(trainer=trainer, data=data, options=named, name="tiny")
    result: dict[str, Any] = umbel.run(federation, out=str(where / "out"))
    return result


def test_a_language_model_beats_the_unigrams(tmp_path: Path) -> None:
    """Perplexity below 0.6 of what the frequencies of the characters give."""
    trainer = TransformersTrainer(tiny.writer, learning_rate=0.1, batch_size=8, local_epochs=2)
    found = run(trainer, rows_of, tmp_path, rounds=10)["metrics"]
    share = np.bincount(tiny.stories().ravel()) / tiny.stories().size
    unigrams = -float((share[share > 0] * np.log(share[share > 0])).sum())
    assert math.exp(found["loss"]) < 0.6 * math.exp(unigrams)


@pytest.mark.parametrize("more", [{"secure": True}, {"epsilon": 8.0}])
def test_adapters_go_under_secure_sums_and_noise(more: dict[str, Any], tmp_path: Path) -> None:
    assert run(adapted(), labelled, tmp_path, rounds=2, **more)
