"""Digits in Keras: run it with `python -m umbel.examples.frameworks.keras_digits`."""

import umbel
from umbel import Dirichlet, Federation, KerasTrainer, Partitioned


def net():
    import keras  # here and not above: the backend is loaded where the model is trained

    hidden = keras.layers.Dense(32, activation="relu")
    return keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10)])


federation = Federation(
    trainer=KerasTrainer(net),
    data=Partitioned("digits", Dirichlet(alpha=1.0)),
    options={"rounds": 10, "learning-rate": 0.3, "batch-size": 16, "local-epochs": 2},
    name="digits-keras",
)

if __name__ == "__main__":
    print(umbel.run(federation)["metrics"])
