"""Robust rules against straightforward versions in NumPy, and what each of them refuses."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import collected, gathering, reply
from umbel.core.errors import ConfigError, StackError
from umbel.strategies.aggregator import Contribution
from umbel.strategies.aggregators.bucketing import Bucketing
from umbel.strategies.aggregators.bulyan import Bulyan
from umbel.strategies.aggregators.centred_clipping import CentredClipping
from umbel.strategies.aggregators.each import BLOCK_BYTES, EachRule
from umbel.strategies.aggregators.fltrust import FLTrust
from umbel.strategies.aggregators.geometric_median import GeometricMedian
from umbel.strategies.aggregators.krum import Krum, MultiKrum
from umbel.strategies.aggregators.median import Median
from umbel.strategies.aggregators.named import RULES, rule_named
from umbel.strategies.aggregators.norm_bound import NormBound
from umbel.strategies.aggregators.trimmed_mean import TrimmedMean
from umbel.strategies.exchange import PlainExchange
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts
from umbel.testing import check_aggregator, check_collect

Array = np.ndarray[Any, Any]


# ---- the straightforward versions, of rows of shape (n, d) with f liars


def np_median(x: Array, _: int) -> Array:
    return np.median(x, axis=0)


def np_trimmed(x: Array, f: int) -> Array:
    return np.sort(x, axis=0)[f : len(x) - f].mean(0)


def np_scores(x: Array, f: int) -> list[float]:
    found = []
    for i in range(len(x)):
        away = sorted(float(((x[i] - x[j]) ** 2).sum()) for j in range(len(x)) if j != i)
        found.append(sum(away[: max(1, len(x) - f - 2)]))
    return found


def np_krum(x: Array, f: int) -> Array:
    return np.asarray(x[int(np.argmin(np_scores(x, f)))])


def np_multi_krum(x: Array, f: int) -> Array:
    order = np.argsort(np_scores(x, f), kind="stable")[: max(1, len(x) - f - 2)]
    return x[sorted(order)].mean(0)


def np_bulyan(x: Array, f: int) -> Array:
    left, chosen = list(range(len(x))), []
    for _ in range(len(x) - 2 * f):
        first = int(np.argmin(np_scores(x[left], f)))
        chosen.append(left.pop(first))
    selected, keep = x[chosen], len(chosen) - 2 * f
    made = []
    for column in selected.T:
        middle = np.median(column)
        made.append(np.mean(sorted(sorted(column), key=lambda v: abs(v - middle))[:keep]))
    return np.array(made)


def np_centred(x: Array, _: int) -> Array:
    centre = np.zeros(x.shape[1])
    for _ in range(5):
        away = x - centre
        lengths = np.linalg.norm(away, axis=1)
        radius = np.sort(lengths)[(len(x) - 1) // 2]
        factors = [min(1.0, radius / length) if length > 0 else 1.0 for length in lengths]
        centre = centre + (away * np.array(factors)[:, None]).mean(0)
    return centre


def np_norm_bound(x: Array, _: int) -> Array:
    lengths = np.linalg.norm(x, axis=1)
    bound = np.sort(lengths)[(len(x) - 1) // 2]
    factors = [min(1.0, bound / length) if length > 0 else 1.0 for length in lengths]
    return (x * np.array(factors)[:, None]).mean(0)


PLAIN: dict[str, tuple[EachRule, Callable[[Array, int], Array]]] = {
    "median": (Median(), np_median),
    "trimmed-mean": (TrimmedMean(), np_trimmed),
    "krum": (Krum(), np_krum),
    "multi-krum": (MultiKrum(), np_multi_krum),
    "bulyan": (Bulyan(0.14), np_bulyan),
    "centred-clipping": (CentredClipping(), np_centred),
    "norm-bound": (NormBound(), np_norm_bound),
}


def made(rule: EachRule, rows: Array, **spec: Any) -> Any:
    acc = rule.empty(gathering(rows.shape[1], cohort=float(len(rows)), **spec))
    for i, row in enumerate(rows):
        rule.add(acc, Contribution(torch.from_numpy(row.copy()), node=i, position=i))
    return rule.result(acc)


def whole_numbers(least: int = 7) -> st.SearchStrategy[Array]:
    """Rows of few different whole numbers, so that there are ties, and whole rows twice."""
    return st.tuples(
        st.integers(least, 16), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31)
    ).map(
        lambda size: (
            np.random.default_rng(size[3])
            .integers(-size[2], size[2] + 1, (size[0], size[1]))
            .astype(np.float32)
        )
    )


@pytest.mark.parametrize("name", PLAIN)
@given(rows=whole_numbers())
def test_rules_are_what_their_papers_say(name: str, rows: Array) -> None:
    rule, expected = PLAIN[name]
    found = made(rule, rows)
    f = rule.count(len(rows))
    np.testing.assert_allclose(
        found.total / found.denominator, expected(rows.astype(np.float64), f), atol=1e-5
    )
    assert found.replies == len(rows)


@given(rows=whole_numbers(3))
def test_the_geometric_median_has_the_smallest_sum_of_distances(rows: Array) -> None:
    found = (made(GeometricMedian(), rows).total).numpy()

    def apart(point: Array) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    best = min(apart(point) for point in [*rows.astype(float), rows.mean(0), np.median(rows, 0)])
    assert apart(found) <= best * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("name", [n for n in RULES if n != "fltrust"])
@pytest.mark.parametrize("bucket", [1, 2])
def test_rules_keep_the_laws(name: str, bucket: int) -> None:
    options = {"liars": 0.1, "bucket-size": bucket}
    rule = rule_named(name, options)
    check_aggregator(rule, count=15)
    check_aggregator(replace(rule, hold_bytes=0), count=15)
    if rule.need(1)[0] <= 3:
        check_collect(PlainExchange(rule))


def test_coordinates_in_blocks_are_those_at_once() -> None:
    width = BLOCK_BYTES // 4 // 5
    rows = np.random.default_rng(0).normal(size=(5, 2 * width + 3)).astype(np.float32)
    np.testing.assert_allclose(made(Median(), rows).total, np.median(rows, 0), rtol=1e-6)
    np.testing.assert_allclose(made(TrimmedMean(), rows).total, np_trimmed(rows, 1), atol=1e-6)


LIAR = 8


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("norm-bound", "fltrust")])
@pytest.mark.parametrize("lie", [1e6, 30.0, -3.0])
def test_liars_do_not_move_the_result_and_are_named(name: str, lie: float) -> None:
    rows = np.random.default_rng(1).normal(1, 0.1, size=(11, 50)).astype(np.float32)
    rows[LIAR] *= lie
    rule = rule_named(name, {"liars": 0.1, "bucket-size": 1})
    found = made(rule, rows)
    assert np.abs(found.total.numpy() - 1).max() < 0.5
    assert LIAR in [one.node_id for one in found.judged]
    assert all(0 <= one.influence < 1 for one in found.judged)


def test_a_row_of_any_length_does_not_blur_the_others_distances() -> None:
    rows = np.random.default_rng(2).normal(size=(11, 20)).astype(np.float32)
    clean = np_multi_krum(rows[:10].astype(float), 2)
    rows[10] *= 1e7
    assert len(made(MultiKrum(0.2), rows).judged) == 4
    np.testing.assert_allclose(made(MultiKrum(0.2), rows).total, np_multi_krum(rows, 2), atol=1e-5)
    assert np.isfinite(clean).all()


@pytest.mark.parametrize("name", [n for n in RULES if n != "fltrust"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reply_that_is_not_finite_costs_its_sender_only(name: str, bad: float) -> None:
    rule = rule_named(name, {"liars": 0.1, "bucket-size": 1})
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    nodes = list(range(12))
    good = [reply(i, rows[i]) for i in nodes[:11]]
    spoilt = rows[11].clone()
    spoilt[2] = bad
    found = collected(PlainExchange(rule), [*good, reply(11, spoilt)], nodes, gathering(4))
    without = collected(PlainExchange(rule), good, nodes[:11], gathering(4))
    assert torch.equal(found.total, without.total)
    assert [one.node_id for one in found.rejected] == [11]
    acc = rule.empty(gathering(4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        rule.add(acc, Contribution(spoilt))


def test_the_servers_own_update_decides_whom_to_trust() -> None:
    own = torch.tensor([1.0, 0.0, 0.0])
    rule = FLTrust(0.2, reference=lambda _: own)
    rows = np.array([[2, 0, 0], [3, 3, 0], [-1, 0, 0], [0, 5, 0]], dtype=np.float32)
    request = reply(1, own)  # whatever was sent; the reference is asked with it
    acc = rule.empty(gathering(3, request=request))
    for i, row in enumerate(rows):
        rule.add(acc, Contribution(torch.from_numpy(row), node=i, position=i))
    found = rule.result(acc)
    trust = np.array([1, math.sqrt(0.5), 0, 0])
    units = np.array([[1, 0, 0], [math.sqrt(0.5), math.sqrt(0.5), 0], [0] * 3, [0] * 3])
    np.testing.assert_allclose(found.total, (trust[:, None] * units).sum(0) / trust.sum(), 1e-6)
    assert [one.node_id for one in found.judged] == [2, 3]


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Median(0.5), "liars is 0.5, but median stands fewer than 0.5 of the nodes"),
        (lambda: Bulyan(0.3), "bulyan stands fewer than 0.25"),
        (lambda: Krum(-0.1), "liars is -0.1"),
        (lambda: CentredClipping(radius=-1.0), "radius above 0"),
        (lambda: NormBound(norm=math.inf), "norm inf"),
        (
            lambda: Bucketing(0.2, rule=Median(0), size=3),
            "0.6 of the buckets, but median stands fewer than 0.5",
        ),
        (lambda: Bucketing(0.2), "needs a rule"),
    ],
)
def test_what_a_rule_does_not_stand_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(StackError, match=re.escape(sentence)):
        make()


@pytest.mark.parametrize(
    ("rule", "most", "sum_"),
    [
        (Median(), 2, "median needs 3 updates to stand 1 liar (2 x 1 + 1), but 2 are expected"),
        (Krum(), 4, "krum needs 5 updates to stand 1 liar (2 x 1 + 3), but 4 are expected"),
        (Bulyan(), 10, "bulyan needs 11 updates to stand 2 liars (4 x 2 + 3), but 10 are expected"),
        (
            Bucketing(0.2, rule=Krum(0), size=2),
            8,
            "needs 9 updates to stand 1 liar ((2 x 1 + 3 - 1) x 2 + 1)",
        ),
    ],
)
def test_a_cohort_that_is_too_small_is_refused_with_the_arithmetic(
    rule: EachRule, most: int, sum_: str
) -> None:
    with pytest.raises(StackError, match=re.escape(sum_)):
        Stack([], rule).check(Facts(3, max_replies=most), ())
    with pytest.raises(StackError, match=re.escape(sum_)):
        Stack([], rule).check(Facts(3, expected_replies=most), ())
    rows = np.random.default_rng(0).normal(size=(most, 3)).astype(np.float32)
    found = made(rule, rows)
    assert found.replies == 0 and found.aborted.endswith(f"and {most} could be used")


def test_one_node_is_no_cohort_for_a_rule_that_is_to_stand_a_liar() -> None:
    row = np.ones((1, 3), dtype=np.float32)
    for rule, _ in PLAIN.values():
        if rule.name != "norm-bound":
            assert made(rule, row).aborted
    assert made(NormBound(), row).total.tolist() == [1.0, 1.0, 1.0]
    assert made(Median(0.0), row).total.tolist() == [1.0, 1.0, 1.0]
    assert made(Median(), row[:0]).replies == 0


def test_names_and_options_that_make_no_rule_are_refused() -> None:
    with pytest.raises(ConfigError, match="it can be median, trimmed-mean"):
        rule_named("mode", {})
    with pytest.raises(ConfigError, match="liars is 1"):
        rule_named("median", {"liars": 1.0})
    with pytest.raises(ConfigError, match="leave bucket-size out"):
        rule_named("fltrust", {"liars": 0.1, "bucket-size": 2})
    with pytest.raises(StackError, match="take smaller buckets"):
        rule_named("median", {"liars": 0.3, "bucket-size": 2})


def test_a_server_without_examples_of_its_own_cannot_judge_by_them() -> None:
    with pytest.raises(StackError, match="Federation\\(root="):
        made(FLTrust(), np.ones((3, 2), dtype=np.float32))
    short = FLTrust(reference=lambda _: torch.ones(5))
    with pytest.raises(StackError, match=r"shape \(5,\), and nodes' have \(2,\)"):
        made(short, np.ones((3, 2), dtype=np.float32), request=reply(1, torch.ones(2)))


# ---- with privacy


def bottom(stack: Stack) -> Facts:
    before = Facts(4, round=1, expected_replies=32.0, max_replies=64)
    return stack.check(before, stack.init(4))


@pytest.mark.parametrize("name", [n for n in RULES if n != "norm-bound"])
def test_central_noise_over_a_choice_is_refused(name: str) -> None:
    stack = Stack([Clip(1.0), Gaussian(1.0)], rule_named(name, {"liars": 0.1}))
    with pytest.raises(StackError, match="choice among the updates"):
        stack.claims(bottom(stack))


def test_central_noise_over_a_norm_bound_is_claimed() -> None:
    stack = Stack([Clip(1.0), Gaussian(1.0)], NormBound(norm=2.0))
    (claim,) = stack.claims(bottom(stack))
    assert claim.against == "model-user"
    plain = Stack([Clip(1.0), Gaussian(1.0)], NormBound())
    with pytest.raises(StackError, match="choice among the updates"):
        plain.claims(bottom(plain))
    with pytest.raises(StackError, match=r"clip to 0\.5"):
        bottom(Stack([Clip(1.0), Gaussian(1.0)], NormBound(norm=0.5)))


@pytest.mark.parametrize("name", RULES)
def test_noise_of_the_nodes_own_stands_under_every_rule(name: str) -> None:
    stack = Stack([Clip(1.0), LocalGaussian(1.0, 1e-5)], rule_named(name, {"liars": 0.1}))
    assert [claim.against for claim in stack.claims(bottom(stack))] == ["server"]
