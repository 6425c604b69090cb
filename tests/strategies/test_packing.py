"""Updates in fewer bytes: right in the mean, within their bound, nothing lost, damage refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fakes import collected, gathering, reply
from tests.strategies.quadratics import NODES, Run, near, nodes, optimum
from tests.strategies.test_methods_composed import PROTECTIONS, options_of
from tests.strategies.test_random_k import digits, perceptron
from umbel.clients.data.examples import Node
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.core.errors import ConfigError, RunError, StackError
from umbel.core.names import UPDATE
from umbel.federation import Federation
from umbel.privacy.bounds.clipping import is_within
from umbel.running import run
from umbel.server.output.rundir import RunDirectory
from umbel.strategies.aggregators.fltrust import FLTrust
from umbel.strategies.collect import PlainSum
from umbel.strategies.composition import check_rounds, compose
from umbel.strategies.compression.half import Half
from umbel.strategies.compression.options import NAMES, CompressionOptions
from umbel.strategies.compression.qsgd import Qsgd
from umbel.strategies.compression.random_k import RandomK
from umbel.strategies.compression.sign import Sign
from umbel.strategies.compression.top_k import TopK
from umbel.strategies.contexts import NodeContext
from umbel.strategies.facts import Facts
from umbel.strategies.payload import TAIL, Packing, packed
from umbel.strategies.private.adaptive_clip import AdaptiveClip
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.stack import Stack

ROUNDED = (Qsgd(8), Qsgd(4), Qsgd(2), Half())
KEEPING = (TopK(0.1), Sign())
LAYERS = (*ROUNDED, *KEEPING)


def there_and_back(
    layer: Any, vector: Tensor, bound: float = math.inf, seed: int = 0, grid: float | None = None
) -> Tensor:
    """What the server gets of a vector, by way of real records."""
    parts = packed(layer, vector, len(vector), bound, NodeContext(seed=seed))
    record = reply(1, **parts, update=torch.zeros(0)).content[UPDATE]
    del record[UPDATE]
    facts = Facts(len(vector), grid=grid)
    return Packing(layer, len(vector), 0).read(record, vector.dtype, facts)[0]


def some(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """An update with large and small coordinates."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    return (values * torch.logspace(-3, 0, size, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantised_updates_are_right_in_the_mean(bits: Any) -> None:
    """By Hoeffding's inequality: an error is within an interval of one step, mean zero.

    Three sums are tried: all errors, all errors in the direction of their coordinate, and each
    coordinate alone. With these limits one false alarm has a chance below
    2 (2 exp(-2 x 9)) + 2 x 2,500 exp(-2 x 13) < 1e-7.
    """
    size, times = 2500, 400
    layer, vector = Qsgd(bits), some(2500)
    largest = torch.nn.functional.pad(vector.abs(), (0, -size % 1024)).reshape(-1, 1024).amax(1)
    step = (largest / layer.levels).repeat_interleave(1024)[:size].double()
    errors = torch.zeros(size, dtype=torch.float64)
    for seed in range(times):
        errors += (there_and_back(layer, vector, seed=seed).double() - vector.double()) / step
    count = size * times
    assert abs(float(errors.sum())) / count < math.sqrt(9 / count) + 2**-17
    assert abs(float((errors * vector.sign()).sum())) / count < math.sqrt(9 / count) + 2**-17
    assert float(errors.abs().max()) / times < math.sqrt(13 / times)
    assert float(errors.abs().max()) > 0, "it is rounded at all"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", ROUNDED, ids=str)
def test_what_arrives_is_near_and_as_short_as_is_said(layer: Any, dtype: torch.dtype) -> None:
    vector = some(3000, dtype=dtype)
    before = vector.clone()
    found = there_and_back(layer, vector)
    assert torch.equal(vector, before) and found.dtype == dtype
    step = 2.0**-11 if isinstance(layer, Half) else 1.01 / layer.levels
    assert float((found - vector).abs().max()) <= step * float(vector.abs().max())
    parts = packed(layer, vector, 3000, math.inf, NodeContext())
    sent = sum(part.numel() * part.element_size() for part in parts.values())
    bits = 16 if isinstance(layer, Half) else layer.bits
    assert sent <= 4 * 3 + 3072 * bits / 8
    assert torch.equal(there_and_back(layer, torch.zeros(5)), torch.zeros(5))


@pytest.mark.parametrize("layer", ROUNDED, ids=str)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 2100), power=st.integers(-30, 30))
@settings(max_examples=25, deadline=None)
def test_a_bound_holds_after_rounding(layer: Any, seed: int, size: int, power: int) -> None:
    norm = 2.0**power * 1.3
    vector = some(size, seed)
    vector *= norm / vector.norm() * (1 - 1e-6)
    found = there_and_back(layer, vector, norm, seed, 2.0**power / 2**16)
    assert is_within(found, norm)


@pytest.mark.parametrize("layer", KEEPING, ids=str)
@given(
    size=st.integers(1, 2500),
    away=st.sets(st.integers(1, 8), max_size=6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_what_arrived_and_what_is_kept_are_the_sum_of_the_updates(
    layer: Any, size: int, away: set[int], seed: int
) -> None:
    """Through a stack, the node's own records and the wire; also when it was away."""
    stack, state = Stack((layer,)), RecordDict()
    arrived, made = torch.zeros(2, size, dtype=torch.float64)
    states = stack.init(size)
    for number in sorted({1, *range(2, 9)} - away):
        before = Facts(size, round=number)
        told = NodeContext(stack.publish(states, before), round=number, seed=seed)
        update = some(size, seed + number, torch.float64)
        sent, _ = stack.encode(update, told.config, state, {}, told)
        parts = stack.pack(sent, told.config, state, told)
        record = reply(1, torch.zeros(0), **parts).content[UPDATE]
        del record[UPDATE]
        packing = stack.packing(before, states)
        assert packing is not None
        arrived += packing.read(record, torch.float64, before)[0]
        made += update
    from umbel.strategies.contexts import Memory

    memory = Memory(state, layer.name)
    kept = memory["unsent"] if "unsent" in memory else torch.zeros(size, dtype=torch.float64)
    assert torch.allclose(arrived + kept, made, rtol=0, atol=1e-12)


def test_the_largest_leave_and_the_places_take_two_bytes() -> None:
    vector = some(200_000)
    layer = TopK(0.01)
    sent = layer.encode(vector, NodeContext())
    assert int((sent != 0).sum()) == 2000
    assert float(sent[sent != 0].abs().min()) >= float(vector[sent == 0].abs().max())
    assert torch.equal(there_and_back(layer, sent), sent)
    parts = layer.pack(sent, math.inf, NodeContext())
    assert sum(p.numel() * p.element_size() for p in parts.values()) == 2000 * 6 + 4 * 4


def test_layers_below_may_put_something_behind_it() -> None:
    stack = Stack((TopK(0.2), AdaptiveClip(0.5)))
    before = Facts(10, round=1)
    states = stack.init(10)
    told = NodeContext(stack.publish(states, before), round=1)
    sent, _ = stack.encode(some(10), told.config, RecordDict(), {}, told)
    parts = stack.pack(sent, told.config, RecordDict(), told)
    assert set(parts) == {f"{UPDATE}.{k}" for k in ("counts", "places", "values", TAIL)}
    packing = stack.packing(before, states)
    assert packing is not None and packing.behind == 1
    record = reply(1, torch.zeros(0), **parts).content[UPDATE]
    del record[UPDATE]
    bottom = stack.check(before, states)
    assert torch.equal(packing.read(record, torch.float32, bottom)[0], sent)


# ---- damage


def whole(layer: Any, size: int, seed: int) -> tuple[dict[str, Tensor], Any]:
    vector = layer.encode(some(size, seed), NodeContext())
    parts = dict(packed(layer, vector, size, math.inf, NodeContext(seed=seed)))
    return parts, gathering(size, packing=Packing(layer, size, 0))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@given(data=st.data(), seed=st.integers(0, 1000), size=st.sampled_from([1, 7, 1024, 3000]))
@settings(max_examples=60, deadline=None)
def test_a_damaged_payload_is_refused_by_name_and_the_round_goes_on(
    layer: Any, data: st.DataObject, seed: int, size: int
) -> None:
    parts, round_ = whole(layer, size, seed)
    name = data.draw(st.sampled_from(sorted(parts)))
    part = parts[name]
    how = data.draw(st.sampled_from(["flip", "cut", "longer", "type", "gone", "shape", "more"]))
    bad = dict(parts)
    if how == "flip":
        raw = bytearray(part.numpy().tobytes())
        for at in data.draw(st.lists(st.integers(0, max(0, len(raw) - 1)), max_size=8)):
            if raw:
                raw[at] ^= data.draw(st.integers(1, 255))
        bad[name] = torch.from_numpy(np.frombuffer(raw, part.numpy().dtype).copy())
    elif how == "cut":
        bad[name] = part[: data.draw(st.integers(0, max(0, part.numel() - 1)))]
    elif how == "longer":
        bad[name] = torch.from_numpy(np.concatenate([part.numpy()] * 2 + [part.numpy()[:1]] * 3))
        bad[name] = torch.from_numpy(np.resize(bad[name].numpy(), 2 * size + 9))
    elif how == "type":
        bad[name] = torch.from_numpy(part.numpy().astype(np.int64))
    elif how == "gone":
        del bad[name]
    elif how == "shape":
        bad[name] = part.reshape(1, -1)
    else:
        bad[f"{UPDATE}.other"] = torch.zeros(3)
    found = collected(
        PlainSum("equal"),
        [_reply(1, bad), _reply(2, parts)],
        [1, 2],
        round_,
    )
    good = collected(PlainSum("equal"), [_reply(2, parts)], [2], round_)
    assert good.replies == 1 and not good.rejected and good.bytes_up > 0
    if how != "flip" and not (how == "cut" and part.numel() == 0):
        assert [one.node_id for one in found.rejected] == [1], (how, name)
    if found.rejected:
        assert found.rejected[0].reason and torch.equal(found.total, good.total)
    assert bool(torch.isfinite(found.total).all())


def _reply(node: int, parts: dict[str, Tensor]) -> Any:
    made = reply(node, torch.zeros(0), **parts)
    del made.content[UPDATE][UPDATE]
    return made


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_an_update_that_is_not_finite_is_refused_by_name(layer: Any) -> None:
    for value in (math.nan, math.inf):
        vector = some(50)
        vector[3] = value
        sent = layer.encode(vector, NodeContext())
        parts = dict(packed(layer, sent, 50, math.inf, NodeContext()))
        round_ = gathering(50, packing=Packing(layer, 50, 0))
        found = collected(PlainSum(), [_reply(1, parts)], [1], round_)
        assert found.replies == 0 and "NaN or infinity" in found.rejected[0].reason


def test_a_dense_update_is_no_payload() -> None:
    round_ = gathering(50, packing=Packing(Qsgd(8), 50, 0))
    found = collected(PlainSum(), [reply(1, some(50))], [1], round_)
    assert "qsgd is made of 'update.codes', 'update.steps'" in found.rejected[0].reason


# ---- stacks


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_compression_with_every_protection_works_or_is_refused(
    name: str, protection: str
) -> None:
    options = {**options_of("fedavg", protection), "compression": name}
    asked = CompressionOptions.read(options)
    secret = bool(options["secure"])
    try:
        stack = compose(asked.around(Stack(), 0, secret), options, lambda: 64)
        decided = stack.with_noise(1e-3)
        facts = Facts(64, expected_replies=NODES, max_replies=NODES, population=NODES)
        check_rounds(decided, facts)
    except (ConfigError, StackError) as error:
        packs = name in ("top-k", "sign")
        assert (secret and (packs or "half" in name)) or (protection == "local" and packs), error
        return
    assert not (secret and stack.packs)
    before = facts.replace(round=1)
    states = decided.init(64)
    bottom = decided.check(before, states)
    if bottom.l2_bound is not None and not secret:
        told = NodeContext(decided.publish(states, before), round=1, seed=4)
        state = RecordDict()
        sent, _ = decided.encode(some(64) * 1e3, told.config, state, {}, told)
        parts = dict(decided.pack(sent, told.config, state, told))
        round_ = gathering(bottom.size, facts=bottom, packing=decided.packing(before, states))
        made = _reply(1, parts) if decided.packs else reply(1, sent)
        found = collected(decided.collect, [made], [1], round_)
        assert found.replies == 1, found.rejected


def test_what_does_not_go_together_is_refused_with_the_cure() -> None:
    def check(*layers: Any, **more: Any) -> None:
        stack = Stack(layers, **more)
        stack.check(Facts(SIZE_, round=1), stack.init(SIZE_))

    SIZE_ = 16
    with pytest.raises(StackError, match="would both write the update down; leave out one"):
        check(Qsgd(8), Half())
    with pytest.raises(StackError, match="take random-k or qsgd-8"):
        check(TopK(), Clip(1.0), Rotate())
    with pytest.raises(StackError, match="take random-k or qsgd-8"):
        check(Sign(), Clip(1.0), LocalGaussian(1.0, 1e-5))
    with pytest.raises(StackError, match="has to arrive whole; leave out the compression"):
        TopK().check(Facts(4).longer("control", 4), None)
    with pytest.raises(StackError, match=r"give 0 < f <= 0\.5"):
        TopK(0.7)
    with pytest.raises(StackError, match="give 8, 4 or 2"):
        Qsgd(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="take random-k or qsgd-8, which do"):
        CompressionOptions("top-k").around(Stack(), 0, secret=True)
    with pytest.raises(ConfigError, match="take qsgd-8, which says how fine"):
        CompressionOptions("half").around(Stack(), 0, secret=True)
    with pytest.raises(ConfigError, match="the app's own stack has layers that do"):
        CompressionOptions("qsgd-8").around(Stack((Clip(1.0), Rotate())), 0, secret=True)
    with pytest.raises(ConfigError, match="compression=sign sends every coordinate"):
        CompressionOptions("sign", 0.1)
    trust = Stack((), FLTrust())
    with pytest.raises(ConfigError, match="with which fltrust compares them"):
        CompressionOptions("qsgd-8").around(trust, 0, secret=False)
    with pytest.raises(StackError, match="which are summed in secret"):
        check(Qsgd(8), Clip(1.0), *_whole(), collect=SecureSum())
    with pytest.raises(RunError, match="compression=random-k"):
        TopK(0.1).pack(torch.ones(20), math.inf, NodeContext())
    with pytest.raises(RunError, match="compression=qsgd-2"):
        Sign().pack(some(20), math.inf, NodeContext())
    with pytest.raises(RunError, match="start both with the same app"):
        Stack((Qsgd(8),)).pack(some(5), {}, RecordDict(), NodeContext())


def _whole() -> tuple[Any, ...]:
    from umbel.strategies.secure.quantize import Quantize

    return Rotate(), Quantize(1 << 12)


@pytest.mark.parametrize("layer", [TopK(0.25), Sign()], ids=str)
def test_with_error_feedback_small_steps_find_the_optimum(layer: Any) -> None:
    """As near as the steps are small: what a node keeps was found at an older model."""
    found = Run(Stack((layer,)), nodes(), [1] * NODES, rate=0.002).rounds(1500)
    assert near(found, optimum(nodes()), 0.03)


# ---- runs


def test_runs_send_so_much_less_and_learn_and_are_repeated(tmp_path: Path) -> None:
    federation = Federation(
        TorchTrainer(perceptron, learning_rate=0.3, local_epochs=4),
        digits,
        test=lambda options: digits(Node(0, 4, {}), options),
    )
    up: dict[str, int] = {}
    least = {
        "qsgd-8": 3.6,
        "qsgd-4": 7,
        "half": 1.9,
        "top-k": 12,
        "sign": 28,
        "random-k+qsgd-4": 50,
    }
    for name, options in {
        "none": {},
        **{name: {"compression": name} for name in least},
        "private": {"compression": "qsgd-4", "epsilon": 1e4},
        "async": {"compression": "qsgd-8", "mode": "async", "async-buffer": 3},
        "secure": {"compression": "qsgd-8", "secure": True, "secure-norm": 5.0},
    }.items():
        result = run(federation, options={"rounds": 8, **options}, nodes=4, out=tmp_path / name)
        lines = RunDirectory.open(tmp_path / name).rounds()
        assert not any(line.get("failed") for line in lines), name
        up[name] = lines[-1]["bytes_up"]
        assert result.metrics["accuracy"] > (0.8 if "random-k" not in name else 0.5), name
    for name, times in least.items():
        assert up["none"] / up[name] > times, (name, up)
    assert up["none"] / up["private"] > 7
    assert up["none"] / up["secure"] > 1.5
    again = run(
        federation, options={"rounds": 8, "compression": "qsgd-4"}, nodes=4, out=tmp_path / "again"
    )
    assert again.metrics["accuracy"] > 0
    models = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("again", "qsgd-4")]
    assert models[0] == models[1], "the same seed, the same bits"


@pytest.mark.parametrize("name", ["top-k", "random-k", "sign"])
def test_a_run_that_is_resumed_has_lost_nothing(tmp_path: Path, name: str) -> None:
    """What nodes keep is in the checkpoint: in two pieces a run gives the same bits."""
    federation = Federation(TorchTrainer(perceptron, learning_rate=0.1), digits)
    for out, rounds in (("once", 4), ("twice", 2), ("twice", 4)):
        run(
            federation,
            options={"rounds": rounds, "compression": name},
            nodes=3,
            **{"resume" if (tmp_path / out).exists() else "out": tmp_path / out},
        )
    once, twice = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("once", "twice"))
    assert once == twice


def test_random_k_and_quantisation_go_together() -> None:
    stack = CompressionOptions("random-k+qsgd-4", 0.1).around(Stack(), 3, secret=False)
    assert [type(layer) for layer in stack.layers] == [RandomK, Qsgd]
    secret = CompressionOptions("random-k+qsgd-4", 0.1).around(Stack(), 3, secret=True)
    assert [layer.name for layer in secret.layers] == ["random-k", "rotate", "quantize"]
