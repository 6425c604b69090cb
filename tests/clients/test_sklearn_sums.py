"""Estimators made of sums are the pooled fit, and pipelines are fitted by the federation."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import DBSCAN, KMeans
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import NMF, PCA
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import LogisticRegression, SGDClassifier, SGDRegressor
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import BernoulliNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

import umbel
from umbel.clients.data.examples import Examples, Split
from umbel.clients.trainers.base import Job, Weights
from umbel.clients.trainers.sklearn import SklearnTrainer
from umbel.core.errors import ConfigError
from umbel.server.output.progress import SilentProgress
from umbel.testing import check_trainer

CANCER = load_breast_cancer(return_X_y=True)
DIGITS = load_digits(return_X_y=True)
EXACT = 1e-9


def parts(x: Any, y: Any) -> list[Examples]:
    """Four nodes of very different sizes, in the order of the file (some lack classes)."""
    edges = [0, 30, 200, 350, len(x)]
    return [Examples(x[a:b], y[a:b]) for a, b in pairwise(edges)]


def federated(trainer: SklearnTrainer, nodes: list[Examples], rounds: int = 1) -> Any:
    """The estimator after rounds of averaging by numbers of examples."""
    weights, total = trainer.initial(trainer.OPTIONS, 0), sum(map(len, nodes))
    for number in range(1, rounds + 1):
        found = [
            trainer.train(
                weights, node, Job(number, i, trainer.OPTIONS, node={"num-partitions": len(nodes)})
            )
            for i, node in enumerate(nodes)
        ]
        weights = Weights(
            {
                name: value
                + sum((f.weights.parameters[name] - value) * (f.examples / total) for f in found)
                for name, value in weights.parameters.items()
            },
            found[0].weights.buffers,
        )
    return trainer.ready(weights, trainer.OPTIONS)


def check_equal(found: Any, pooled: Any, *names: str) -> None:
    for name in names:
        expected = np.asarray(getattr(pooled, name))
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(
            getattr(found, name), expected, rtol=EXACT, atol=EXACT * scale, err_msg=name
        )


def test_scaling_is_the_pooled_fit() -> None:
    x, y = CANCER
    found = federated(SklearnTrainer(StandardScaler(), features=30), parts(x, y))
    check_equal(found, StandardScaler().fit(x), "mean_", "var_", "scale_", "n_samples_seen_")


def test_a_column_of_one_value_is_not_divided_by_zero() -> None:
    x, y = DIGITS  # the first pixel is always 0
    found = federated(SklearnTrainer(StandardScaler(), features=64), parts(x, y))
    check_equal(found, StandardScaler().fit(x), "mean_", "var_", "scale_")


def test_further_rounds_recover_digits_that_a_large_mean_has_cost() -> None:
    x, y = CANCER[0] + 1e7, CANCER[1]
    trainer = SklearnTrainer(StandardScaler(), features=30)
    pooled = StandardScaler().fit(x)
    assert np.abs(federated(trainer, parts(x, y), 1).var_ / pooled.var_ - 1).max() > 1e-3
    assert np.abs(federated(trainer, parts(x, y), 3).var_ / pooled.var_ - 1).max() < 1e-5


@pytest.mark.parametrize("count", [5, 30])
def test_principal_components_are_the_pooled_fit(count: int) -> None:
    x, y = CANCER
    found = federated(SklearnTrainer(PCA(count), features=30), parts(x, y))
    pooled = PCA(count, svd_solver="full").fit(x)
    check_equal(
        found,
        pooled,
        "mean_",
        "explained_variance_",
        "explained_variance_ratio_",
        "singular_values_",
        "noise_variance_",
        "n_samples_",
    )
    # The directions of the smallest variances (1e-8 of the largest) have fewer digits.
    np.testing.assert_allclose(found.components_[:5], pooled.components_[:5], atol=EXACT)


def test_gaussian_naive_bayes_is_the_pooled_fit() -> None:
    x, y = DIGITS
    found = federated(SklearnTrainer(GaussianNB(), features=64, classes=10), parts(x, y))
    pooled = GaussianNB().fit(x, y)
    check_equal(found, pooled, "theta_", "var_", "class_prior_", "class_count_", "epsilon_")
    assert (found.predict(x) == pooled.predict(x)).all()


@pytest.mark.parametrize("model", [MultinomialNB(), ComplementNB(), BernoulliNB(binarize=8)])
def test_counting_naive_bayes_is_the_pooled_fit(model: Any) -> None:
    x, y = DIGITS
    found = federated(SklearnTrainer(model, features=64, classes=10), parts(x, y))
    pooled = model.fit(x, y)
    check_equal(found, pooled, "feature_log_prob_", "class_log_prior_", "class_count_")
    assert (found.predict(x) == pooled.predict(x)).all()


def test_k_means_takes_the_steps_of_lloyd() -> None:
    x, y = DIGITS
    trainer = SklearnTrainer(KMeans(7, init=x[:7], n_init=1), features=64)
    found = federated(trainer, parts(x, y), 40)
    pooled = KMeans(7, init=x[:7], n_init=1, max_iter=40, tol=0, algorithm="lloyd").fit(x)
    check_equal(found, pooled, "cluster_centers_")
    assert (found.predict(x) == pooled.predict(x)).all()


def test_a_pipeline_is_fitted_by_the_federation_step_by_step() -> None:
    x, y = CANCER
    model = make_pipeline(StandardScaler(), PCA(10), LogisticRegression())
    trainer = SklearnTrainer(model, features=30, classes=2)
    found = federated(trainer, parts(x, y), 10)
    pooled = make_pipeline(StandardScaler(), PCA(10)).fit(x)
    check_equal(found[0], pooled[0], "mean_", "scale_")
    check_equal(found[1], pooled[1], "explained_variance_")
    assert found.score(x, y) > 0.97
    after_two = federated(trainer, parts(x, y), 2)
    assert not after_two[-1].coef_.any()  # nothing is trained behind steps that are not known


def test_k_means_behind_a_scaler_starts_by_itself() -> None:
    x, y = CANCER
    trainer = SklearnTrainer(make_pipeline(StandardScaler(), KMeans(2)), features=30)
    found = federated(trainer, parts(x, y), 12).predict(x)
    assert max((found == y).mean(), (found != y).mean()) > 0.89


LOSSES = [
    "hinge",
    "log_loss",
    "modified_huber",
    "squared_hinge",
    "perceptron",
    "squared_error",
    "huber",
    "epsilon_insensitive",
    "squared_epsilon_insensitive",
]


@pytest.mark.parametrize("loss", LOSSES)
def test_stochastic_gradient_descent_with_every_loss(loss: str) -> None:
    x, y = CANCER
    small = SGDClassifier(loss=loss, learning_rate="constant", eta0=1e-3)
    model = make_pipeline(StandardScaler(), small)
    found = federated(SklearnTrainer(model, features=30, classes=2), parts(x, y), 6)
    assert found.score(x, y) > 0.9
    if loss in LOSSES[5:]:
        regression = SGDRegressor(
            loss=loss, epsilon=1.0 if loss == "huber" else 0.1, learning_rate="constant", eta0=1e-3
        )
        model = make_pipeline(StandardScaler(), regression)
        found = federated(SklearnTrainer(model, features=30), parts(x, y.astype(float)), 20)
        assert found.score(x, y) > 0.5


@pytest.mark.parametrize(
    ("model", "classes"),
    [
        (StandardScaler(), 0),
        (PCA(3), 0),
        (KMeans(3), 0),
        (GaussianNB(), 2),
        (MultinomialNB(), 2),
        (make_pipeline(StandardScaler(), SGDClassifier()), 2),
        (make_pipeline(StandardScaler(), PCA(4), GaussianNB()), 2),
    ],
)
def test_they_keep_the_laws_of_trainers(model: Any, classes: int) -> None:
    check_trainer(SklearnTrainer(model, features=30, classes=classes), Examples(*CANCER))


@pytest.mark.parametrize(
    ("model", "classes", "why"),
    [
        (RandomForestClassifier(), 2, "made of trees"),
        (HistGradientBoostingClassifier(), 2, "made of trees"),
        (DecisionTreeClassifier(), 2, "a tree is made of splits"),
        (KNeighborsClassifier(), 2, "stay on their nodes; take LogisticRegression"),
        (SVC(), 2, "take LinearSVC"),
        (GaussianProcessRegressor(), 0, "take Ridge"),
        (GaussianMixture(), 0, "take KMeans"),
        (MinMaxScaler(), 0, "take StandardScaler"),
        (OneHotEncoder(), 0, "no sum over examples"),
        (DBSCAN(), 0, "take KMeans"),
        (NMF(), 0, "take PCA"),
        (PCA(0.9), 0, "give a whole number"),
        (make_pipeline(MinMaxScaler(), LogisticRegression()), 2, "'minmaxscaler'.*not fitted"),
    ],
)
def test_what_cannot_be_averaged_says_why_and_what_to_take(
    model: Any, classes: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        SklearnTrainer(model, features=30, classes=classes)


def test_counts_below_zero_are_refused() -> None:
    trainer = SklearnTrainer(MultinomialNB(), features=30, classes=2)
    examples = Examples(-CANCER[0], CANCER[1])
    with pytest.raises(ConfigError, match=r"go down to -.*take GaussianNB"):
        trainer.train(trainer.initial({}, 0), examples, Job(1, 1, {}))


def data(node: Any, options: Any) -> Split:  # noqa: ARG001
    return Split(parts(*CANCER)[node.partition])


def test_the_engine_makes_the_pooled_fit(tmp_path: Any) -> None:
    federation = umbel.Federation(
        trainer=SklearnTrainer(GaussianNB(), features=30, classes=2), data=data
    )
    result = umbel.run(
        federation, options={"rounds": 1}, nodes=4, out=tmp_path / "run", progress=SilentProgress()
    )
    pooled = GaussianNB().fit(*CANCER)
    check_equal(result.model(), pooled, "theta_", "var_", "class_prior_", "class_count_")


@pytest.mark.parametrize("option", [{"secure": True}, {"epsilon": 8.0, "clipping-norm": 5.0}])
def test_sums_under_secure_sums_and_noise(option: dict[str, Any], tmp_path: Any) -> None:
    federation = umbel.Federation(
        trainer=SklearnTrainer(
            make_pipeline(StandardScaler(), GaussianNB()), features=30, classes=2
        ),
        data=data,
    )
    result = umbel.run(
        federation,
        options={"rounds": 3, **option},
        nodes=4,
        out=tmp_path / "run",
        progress=SilentProgress(),
    )
    assert result["rounds"] == 3
    assert np.isfinite(result.model().predict_proba(CANCER[0])).all()
