"""The laws of a trainer, in one framework: `python laws.py keras`, with KERAS_BACKEND, or `jax`."""

import os
import sys
from collections.abc import Callable
from typing import Any

if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # Keras would load it all the same

import numpy as np
from sklearn.datasets import load_digits

import umbel
from umbel import ConfigError, Examples, JaxTrainer, Job, KerasTrainer, Weights
from umbel.testing import check_trainer

X, Y = load_digits(return_X_y=True)
DIGITS = Examples((X[:80] / 16).astype(np.float32), Y[:80])


def refused(sentence: str, act: Callable[[], Any]) -> None:
    """Fail unless this is refused in these words."""
    try:
        act()
    except ConfigError as error:
        assert sentence in str(error), str(error)
        return
    raise AssertionError(f"it was taken, and should have been refused: {sentence}")


def pulled(make: Callable[[float], Any]) -> None:
    """A proximal term of strength mu on top of plain SGD is w <- w - rate (g + mu (w - w0))."""
    free, held = make(0.0), make(1.0)
    first = free.initial(free.OPTIONS, 1)
    one = {"local-steps": 1, "batch-size": 0, "learning-rate": 0.1}
    two = one | {"local-steps": 2}
    job = {n: Job(1, 1, {**free.OPTIONS, **o}) for n, o in (("one", one), ("two", two))}
    once = free.train(first, DIGITS, job["one"]).weights
    twice = free.train(first, DIGITS, job["two"]).weights
    with_pull = {**job["two"].options, "proximal-mu": 1.0}
    found = held.train(first, DIGITS, Job(1, 1, with_pull)).weights
    for name, start in first.parameters.items():
        pull = once.parameters[name] - start  # what the second step is pulled back by
        expected = twice.parameters[name] - 0.1 * pull
        assert float((found.parameters[name] - expected).abs().max()) < 1e-6, name


def limited(trainer: Any) -> None:
    """A step of plain SGD is no longer than rate x clip-gradient."""
    first = trainer.initial(trainer.OPTIONS, 1)
    options = {"local-steps": 1, "learning-rate": 1.0, "clip-gradient": 0.01}
    after = trainer.train(first, DIGITS, Job(1, 1, {**trainer.OPTIONS, **options})).weights
    moved = sum(
        float((after.parameters[n] - value).double().square().sum())
        for n, value in first.parameters.items()
    )
    assert 0.0099 < moved**0.5 < 0.0101, moved**0.5


def bad_data(trainer: Any) -> None:
    """Every trainer says the same of the same mistakes."""
    first = trainer.initial(trainer.OPTIONS, 1)

    def train(x: Any, y: Any) -> Callable[[], Any]:
        return lambda: trainer.train(first, Examples(x, y), Job(1, 1, trainer.OPTIONS))

    x, y = np.array(DIGITS.x), np.array(DIGITS.y)
    holed = x.copy()
    holed[3, 2] = np.nan
    refused("NaN in the data: inputs, row 3, column 2", train(holed, y))
    refused("do not fit the model's outputs (label 12 of 10 classes)", train(x, y + 3))
    refused("needs integer class labels", train(x, y.astype(np.float32)))
    refused("a node has no examples", train(x[:0], y[:0]))
    refused("the model or its loss fails on a batch", train(x[:, :5], y))
    other = Weights(dict(list(first.parameters.items())[1:]), first.buffers)
    refused(
        "the weights do not belong to this model",
        lambda: trainer.train(other, DIGITS, Job(1, 1, trainer.OPTIONS)),
    )
    refused(
        "learning-rate", lambda: trainer.check_options({**trainer.OPTIONS, "learning-rate": "fast"})
    )
    options = {**trainer.OPTIONS, "device": "gpu:7"}
    refused(
        "device is 'gpu:7', which this machine does not have",
        lambda: trainer.train(first, DIGITS, Job(1, 1, options)),
    )


def keras_laws() -> None:
    def whole() -> Any:
        import keras

        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((64,)),
                layers.Dense(8),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Dropout(0.5),
                layers.Dense(10),
            ]
        )

    trainer = KerasTrainer(whole, batch_size=16)
    check_trainer(trainer, DIGITS)
    first = trainer.initial(trainer.OPTIONS, 0)
    gathered = [n for n in first.buffers if "moving" in n]
    assert len(gathered) == len(first.buffers) == 2
    assert sorted(trainer.statistics(trainer.OPTIONS)) == sorted(gathered)
    assert list(trainer.initial(trainer.OPTIONS, 0).parameters) == list(first.parameters)
    bad_data(trainer)

    def compiled(options: Any) -> Any:
        import keras

        class Scaled(keras.layers.Layer):
            """A layer that nobody here wrote, with a frozen weight."""

            def build(self, shape: Any) -> None:
                self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

            def call(self, x: Any) -> Any:
                return x * self.scale

        frozen = keras.layers.Dense(12, name="frozen")
        frozen.trainable = False
        inputs = keras.Input((64,))
        last = keras.layers.Dense(10, activation="softmax")
        model = keras.Model(inputs, last(Scaled()(frozen(inputs))))
        model.compile(
            keras.optimizers.Adam(options["rate"]), "sparse_categorical_crossentropy", ["accuracy"]
        )
        return model

    own = KerasTrainer(compiled, batch_size=16)
    options = {**own.OPTIONS, "rate": 0.01}
    check_trainer(own, DIGITS, options)
    first = own.initial(options, 0)
    assert list(first.buffers) == ["frozen/kernel", "frozen/bias"], list(first.buffers)
    assert own.statistics(options) == ()  # frozen is not gathered
    trained = own.train(first, DIGITS, Job(1, 1, {**options, "local-epochs": 20}))
    assert own.evaluate(trained.weights, DIGITS, options).metrics["accuracy"] > 0.8
    assert (trained.weights.buffers["frozen/kernel"] == first.buffers["frozen/kernel"]).all()
    import keras

    assert isinstance(own.ready(trained.weights, options), keras.Model)

    def linear() -> Any:
        import keras

        return keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])

    pulled(lambda mu: KerasTrainer(linear, proximal_mu=mu))
    limited(KerasTrainer(linear))
    refused("exists already; give it the function", lambda: KerasTrainer(linear()))
    refused("has to return a keras.Model", lambda: KerasTrainer(lambda: 3).initial({}, 0))
    other = "jax" if keras.backend.backend() != "jax" else "torch"
    refused(f"set KERAS_BACKEND={other}", lambda: KerasTrainer(linear, other).initial({}, 0))
    unbuilt = KerasTrainer(lambda: keras.Sequential([keras.layers.Dense(10)]))
    refused("say KerasTrainer(..., inputs=", lambda: unbuilt.initial({}, 0))
    scheduled = {**own.OPTIONS, "schedule": "cosine"}
    refused("learning-rate, which is 0", lambda: own.check_options(scheduled))


def jax_laws() -> None:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen, nnx

    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(64, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(8, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))

    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
            return linen.Dense(10)(linen.Dropout(0.3, deterministic=not train)(linen.relu(x)))

    def init(key: Any) -> Any:
        return {"w": 0.1 * jax.random.normal(key, (64, 10)), "b": jnp.zeros(10)}

    def apply(params: Any, x: Any, key: Any, train: bool) -> Any:
        kept = jax.random.bernoulli(key, 0.8, x.shape) if train else 0.8
        return (x * kept) @ params["w"] + params["b"]

    flax = JaxTrainer(Net, optimizer=optax.adam, batch_size=16, learning_rate=0.01)
    plain = JaxTrainer(Plain(), inputs=(64,), batch_size=16)
    pure = JaxTrainer(init, apply, batch_size=16)
    for trainer in (flax, plain, pure):
        check_trainer(trainer, DIGITS)
        bad_data(trainer)
    assert flax.statistics(flax.OPTIONS) == ("norm.mean", "norm.var")
    assert flax.group_size(flax.OPTIONS) == 1  # statistics of batches
    assert pure.group_size(pure.OPTIONS) == 32
    assert set(flax.initial(flax.OPTIONS, 0).parameters) >= {"first.kernel", "norm.scale"}
    with_decay = JaxTrainer(init, lambda p, x: x @ p["w"] + p["b"], momentum=0.9, weight_decay=0.01)
    check_trainer(with_decay, DIGITS)
    pulled(lambda mu: JaxTrainer(init, lambda p, x: x @ p["w"] + p["b"], proximal_mu=mu))
    limited(JaxTrainer(init, lambda p, x: x @ p["w"] + p["b"]))
    together(pure)

    refused("exists already; give it the class", lambda: JaxTrainer(Net(nnx.Rngs(0))))
    refused("does not know its inputs", lambda: JaxTrainer(Plain()).initial({}, 0))
    counted = JaxTrainer(lambda _: {"n": jnp.zeros(3, int)}, lambda _, x: x)
    refused("trains real numbers", lambda: counted.initial({}, 0))
    on = {**flax.OPTIONS, "batched": "on"}
    refused("batched=on cannot be had", lambda: flax.group_size(on))
    both = {**flax.OPTIONS, "momentum": 0.9}
    refused("an optimizer of its own", lambda: flax.check_options(both))


def together(trainer: Any) -> None:
    """Nodes of different sizes get in one computation what each gets alone."""
    first = trainer.initial(trainer.OPTIONS, 0)
    nodes = [DIGITS.take(slice(0, n)) for n in (3, 16, 17, 40, 80)]
    jobs = [Job(1, seed, {**trainer.OPTIONS, "local-epochs": 2}) for seed in range(5)]
    found = trainer.train_cohort([first] * 5, nodes, jobs)
    assert found is not None
    for node, job, got in zip(nodes, jobs, found, strict=True):
        alone = trainer.train(first, node, job)
        assert got.examples == alone.examples == len(node)
        assert abs(got.metrics["loss"] - alone.metrics["loss"]) < 1e-5
        for name, value in alone.weights.parameters.items():
            assert float((value - got.weights.parameters[name]).abs().max()) < 1e-5


if __name__ == "__main__":
    {"keras": keras_laws, "jax": jax_laws}[sys.argv[1]]()
    print("kept", umbel.__version__)
