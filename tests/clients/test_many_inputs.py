"""Arrays and rows in the shapes that people have them in: they work, or a sentence says why not."""

# ruff: noqa: ARG005 - what is given to a function that a test makes

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from torch import Tensor, nn

from tests.clients.tasks import classes, close, job, linear
from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.function import FunctionTrainer
from umbel.clients.trainers.sklearn import SklearnTrainer
from umbel.clients.trainers.softmax import SoftmaxTrainer
from umbel.core.errors import ConfigError, described
from umbel.federation import Federation


def counts(kind: Any, n: int = 12) -> Examples:
    y = np.arange(n) % 3
    x = np.random.default_rng(0).integers(0, 2, (n, 6)) + 3 * y[:, None]
    return Examples(x.astype(kind), y)


# --- integers


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">u2", ">i4"]
)
def test_integers_are_computed_with_as_real_numbers(kind: str) -> None:
    trainer = TorchTrainer(linear, batch_size=4, learning_rate=0.01)
    weights = trainer.initial({}, 1)
    real = trainer.train(weights, counts("float32"), job())
    close(trainer.train(weights, counts(kind), job()).weights, real.weights)
    assert trainer.evaluate(weights, counts(kind), {}) == trainer.evaluate(
        weights, counts("float32"), {}
    )
    if not kind.startswith(">"):
        tensors = Examples(torch.as_tensor(counts(kind).x), torch.as_tensor(counts(kind).y))
        close(trainer.train(weights, tensors, job()).weights, real.weights)


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "int32", "uint32", "uint64", "bool"])
def test_labels_of_any_integer_type(kind: str) -> None:
    trainer = TorchTrainer(linear, batch_size=4)
    weights, (x, y) = trainer.initial({}, 1), (classes(12).x, np.arange(12) % 2)
    expected = trainer.train(weights, Examples(x, y), job())
    close(trainer.train(weights, Examples(x, y.astype(kind)), job()).weights, expected.weights)


def test_a_model_that_looks_integers_up_still_gets_integers() -> None:
    class Table(nn.Module):
        """Reads a table of its own: no layer tells that these are places in it."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.table[x].sum(1)

    trainer = TorchTrainer(Table)
    weights = trainer.initial({}, 1)
    for kind in ("int16", "uint16", "int64"):
        assert trainer.train(weights, counts(kind), job()).examples == 12


def test_many_nodes_with_integers_train_as_one() -> None:
    trainer = TorchTrainer(linear, batch_size=4, learning_rate=0.01)
    weights, jobs = trainer.initial({}, 1), [job(seed) for seed in range(9)]
    nodes = [counts("uint16", 10 + i) for i in range(9)]
    together = trainer.train_cohort([weights] * 9, nodes, jobs)
    assert together is not None
    for one, examples, work in zip(together, nodes, jobs, strict=True):
        close(one.weights, trainer.train(weights, examples, work).weights)


def test_integers_that_a_float_cannot_hold_are_refused() -> None:
    trainer = TorchTrainer(linear)
    times = Examples(np.full((4, 6), 1_700_000_001), np.zeros(4, int))
    with pytest.raises(ConfigError, match=r"up to 1700000001.*exact up to 16777216 only"):
        trainer.train(trainer.initial({}, 1), times, job())
    huge = Examples(np.full((4, 6), 2**63, np.uint64), np.zeros(4, int))
    with pytest.raises(ConfigError, match="2\\^63"):
        trainer.train(trainer.initial({}, 1), huge, job())


# --- rows


class Rows:
    def __init__(self, row: Callable[[int], Any], n: int = 12) -> None:
        self.row, self.n = row, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: int) -> Any:
        return self.row(at)


def vector(at: int) -> Tensor:
    return torch.full((6,), float(at % 3))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, pixels: Tensor, extra: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(pixels)
        return out if extra is None else out + extra


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (lambda i: (vector(i), i % 3, 1.0), "row 0 .* is a tuple of 3 values"),
        (vector, "is a Tensor alone"),
        (lambda i: (torch.ones(1 + i % 3), i % 3), r"row 1 has the shape \(2,\), that of row 0"),
        (lambda i: ("a sentence", 0), "input of row 0 is the text 'a sentence'"),
        (lambda i: (vector(i), "cat"), "target of row 0 is the text 'cat'; number the classes"),
        (lambda i: (vector(i), None), "target of row 0 is a NoneType"),
        (lambda i: (vector(i), 1 // (i - 7)), r"row 7 .* ZeroDivisionError.*test_many_inputs"),
        (lambda i: {"pixels": vector(i), "kind": i % 3}, "keys pixels, kind; say which"),
    ],
)
def test_rows_that_make_no_batch_are_a_sentence(row: Any, said: str) -> None:
    trainer = TorchTrainer(Named)
    with pytest.raises(ConfigError, match=said):
        trainer.train(trainer.initial({}, 1), Rows(row), job())


def test_rows_that_are_dicts_train_once_the_target_has_a_name() -> None:
    plain = TorchTrainer(Named, batch_size=4)
    weights = plain.initial({}, 1)
    expected = plain.train(weights, Rows(lambda i: (vector(i), i % 3)), job()).weights
    named = TorchTrainer(Named, batch_size=4, target="kind")
    row = {"pixels": vector, "kind": lambda i: i % 3, "id": lambda i: f"no. {i}"}
    rows = Rows(lambda i: {name: make(i) for name, make in row.items()})
    close(named.train(weights, rows, job()).weights, expected)
    with pytest.raises(ConfigError, match="no 'label', which is to be the target"):
        TorchTrainer(Named, target="label").train(weights, rows, job())


class Table(Rows):
    """What Umbel asks of a `datasets.Dataset`: columns by name, features, a format."""

    def __init__(self, columns: dict[str, Any], kind: str | None = None) -> None:
        super().__init__(self.take, len(next(iter(columns.values()))))
        self.columns, self.format = columns, {"type": kind}
        self.column_names, self.features = list(columns), dict.fromkeys(columns)

    def with_format(self, kind: str) -> "Table":
        return Table(self.columns, kind)

    def take(self, at: int) -> dict[str, Any]:
        assert self.format["type"] == "numpy"
        return {name: np.asarray(values[at]) for name, values in self.columns.items()}


@dataclass
class Output:
    """What models of Hugging Face return."""

    logits: Tensor
    loss: Tensor | None = None


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Output:
        assert labels is None
        weight = attention_mask.float()[..., None]
        return Output(self.head((self.words(input_ids) * weight).sum(1)))


def test_a_hugging_face_data_set_and_model() -> None:
    ids = np.random.default_rng(0).integers(0, 9, (12, 5)).tolist()
    table = Table(
        {
            "sentence": ["words"] * 12,
            "label": [i % 3 for i in range(12)],
            "input_ids": ids,
            "attention_mask": [[1, 1, 1, 1, 0]] * 12,
        }
    )
    trainer = TorchTrainer(Classifier, batch_size=4)
    weights = trainer.initial({}, 1)
    trained = trainer.train(weights, table, job())
    assert trained.examples == 12
    assert not torch.equal(
        trained.weights.parameters["words.weight"], weights.parameters["words.weight"]
    )
    assert set(trainer.evaluate(weights, table, {}).metrics) == {"loss", "accuracy"}


def test_outputs_that_are_no_tensor() -> None:
    class Dict(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"out": super().forward(x), "aux": super().forward(x)}

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    plain = TorchTrainer(linear)
    weights = plain.initial({}, 1)
    expected = plain.train(weights, classes(9), job()).weights
    close(TorchTrainer(lambda: Dict(6, 3)).train(weights, classes(9), job()).weights, expected)
    with pytest.raises(ConfigError, match="returned a tuple of 2 values; return one tensor"):
        TorchTrainer(lambda: Pair(6, 3)).train(weights, classes(9), job())


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ("/no/such/folder", "are the text '/no/such/folder'"),
        ({"x": np.ones(3), "y": np.ones(3)}, "a dict with the keys x, y"),
        (Examples(np.ma.masked_greater(np.ones((4, 6)), 2), np.zeros(4, int)), "masked array"),
        (Examples(np.ones((4, 6)), np.array(["cat"] * 4)), "such as 'cat'; number the classes"),
        (Examples([[1.0], [1.0, 2.0]], [0, 0]), "rows unequal"),  # type: ignore[arg-type]
        (Examples(np.ones((4, 5), "float32"), np.zeros(4, int)), r"inputs float32 \(4, 5\)"),
    ],
)
def test_examples_of_a_wrong_kind_are_a_sentence(examples: Any, said: str) -> None:
    trainer = TorchTrainer(linear)
    with pytest.raises(ConfigError, match=said):
        trainer.train(trainer.initial({}, 1), examples, job())


def test_unequal_lengths_are_a_sentence() -> None:
    with pytest.raises(ConfigError, match="40 inputs and 39 targets; give one target"):
        Examples(np.ones((40, 4)), np.zeros(39))


@pytest.mark.parametrize("values", [3, None, np.float64(3), (x for x in [1])])
def test_what_has_no_rows_is_a_sentence(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"x of Examples is a .* without a first axis"):
        Examples(values, np.zeros(1))


def test_sparse_inputs_are_made_dense() -> None:
    trainer = TorchTrainer(linear, batch_size=4)
    weights, examples = trainer.initial({}, 1), counts("float32")
    expected = trainer.train(weights, examples, job()).weights
    for sparse in (scipy.sparse.csr_array(examples.x), torch.as_tensor(examples.x).to_sparse()):
        found = trainer.train(weights, Examples(sparse, examples.y), job())
        close(found.weights, expected)


# --- numbers that are none


def broken() -> Examples:
    examples = classes(8)
    x = np.array(examples.x)
    x[3, 2] = np.nan
    return Examples(x, examples.y)


@pytest.mark.parametrize(
    "trainer",
    [
        TorchTrainer(linear),
        SklearnTrainer(LogisticRegression(), features=6, classes=3),
        SoftmaxTrainer(6, classes=3),
        FunctionTrainer(
            lambda options: {"w": np.zeros(6)},
            lambda arrays, examples, work: ({"w": arrays["w"] + examples.x.sum(0)}, 8, {}),
        ),
    ],
    ids=lambda trainer: type(trainer).__name__,
)
def test_nan_in_the_data_is_called_that(trainer: Any) -> None:
    weights = trainer.initial(trainer.OPTIONS, 1)
    with pytest.raises(ConfigError, match="NaN in the data: inputs, row 3, column 2"):
        trainer.train(weights, broken(), job(learning_rate=0.1, local_epochs=1))


# --- classes and functions in the wrong place


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SklearnTrainer(LogisticRegression, 6, 3), "give it an object: Logistic"),
        (
            lambda: SklearnTrainer(make_pipeline(MinMaxScaler(), LogisticRegression()), 6, 3),
            "is not fitted, and nodes",
        ),
        (lambda: TorchTrainer(linear, loss=nn.CrossEntropyLoss), r"give an object: loss=Cross"),
        (lambda: TorchTrainer(linear, optimizer=torch.optim.SGD([Tensor(1)])), "the class: opt"),
        (lambda: Federation(nn.Linear(6, 3), data=print), "trainer=TorchTrainer"),
        (lambda: Federation(nn.Linear, data=print), r"trainer=TorchTrainer\(Linear\)"),
        (lambda: Federation(LogisticRegression(), data=print), "trainer=SklearnTrainer"),
        (lambda: Federation(TorchTrainer, data=print), "is the class TorchTrainer"),
        (lambda: Federation(linear, data=print), r"TorchTrainer\(linear\) if it makes a model"),
        (lambda: Federation(TorchTrainer(linear), data=[1]), "data is a list"),
        (lambda: FunctionTrainer({}, print), "initial is a dict"),  # type: ignore[arg-type]
    ],
)
def test_an_object_of_another_kind_is_a_sentence(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


# --- exceptions of users


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise KeyError("no text")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("no positives"), r"ZeroDivisionError: no positives \(.*test_many_inp"),
        (ValueError(), r"^ValueError \(.*line \d+\)$"),
        (UnspeakableError(), "UnspeakableError: its text cannot be made, that raises KeyError"),
        (ConfigError("a sentence"), "^ConfigError: a sentence$"),
        (RuntimeError("x" * 200_000), r"x \.\.\. \(200,000 characters\) \("),
    ],
)
def test_an_exception_is_told_with_its_place_and_a_bounded_text(
    error: Exception, said: str
) -> None:
    with pytest.raises(type(error)) as caught:
        raise error
    text = described(caught.value)
    assert len(text) < 1000
    assert re.search(said, text), text
