"""Digits in scikit-learn: run it with `python -m umbel.examples.frameworks.sklearn_digits`."""

from sklearn.neural_network import MLPClassifier

import umbel
from umbel import Dirichlet, Federation, Partitioned, SklearnTrainer

model = MLPClassifier((32,), solver="sgd", batch_size=16, momentum=0.0)


federation = Federation(
    trainer=SklearnTrainer(model, features=64, classes=10),
    data=Partitioned("digits", Dirichlet(alpha=1.0)),
    options={"rounds": 10, "learning-rate": 0.3, "local-epochs": 2},
    name="digits-sklearn",
)

if __name__ == "__main__":
    print(umbel.run(federation)["metrics"])
