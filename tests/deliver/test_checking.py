"""`umbel verify` of a delivered folder: what holds, and what a forger gets for an answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from umbel.deliver.checking import check_delivery
from umbel.deliver.export import Exported
from umbel.deliver.parcel import sha256


def test_the_claims_of_a_private_run_hold_for_its_export(private_onnx: Exported) -> None:
    found = check_delivery(private_onnx.path)
    assert found.problems == []
    said = "\n".join(found.lines())
    assert "against model-user: epsilon" in said and "computed again" in said
    assert "shown here: all 4 tensors of the released model are in it" in said
    card = (private_onnx.path / "MODEL_CARD.md").read_text()
    assert "post-processing of the released model, without any data" in card
    assert {row["against"] for row in found.to_json()["guarantees"]} == {"model-user", "server"}


def test_a_run_without_promise_claims_nothing(onnx: Exported) -> None:
    found = check_delivery(onnx.path)
    assert found.problems == [] and found.claims == ["no claim: the run promised no privacy"]
    assert check_delivery(onnx.path, key="x").problems == [
        "there is no certificate, so nobody's key signed this"
    ]


def _edit(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _resealed(folder: Path, *names: str) -> None:
    """Hashes that fit again, without the coordinator's key."""

    def change(value: dict[str, object]) -> None:
        files = value["files"]
        assert isinstance(files, dict)
        files |= {name: sha256(folder / name) for name in names}

    _edit(folder / "delivery.json", change)


def _better_epsilon(folder: Path) -> None:
    def change(value: dict[str, object]) -> None:
        for row in value["guarantees"]:  # type: ignore[attr-defined]
            row["epsilon"] = 0.1

    _edit(folder / "claims/certificate.json", change)
    _resealed(folder, "claims/certificate.json")


def _other_model(folder: Path) -> None:
    tensors = load_file(folder / "claims/model.safetensors")
    save_file({n: v + 1 for n, v in tensors.items()}, folder / "claims/model.safetensors")
    _resealed(folder, "claims/model.safetensors")


def _hidden_step(folder: Path) -> None:
    _edit(folder / "delivery.json", lambda value: value.update(steps=[]))


def _unsigned(folder: Path) -> None:
    _edit(folder / "delivery.json", lambda value: (value.pop("signature"), value.pop("key")))  # type: ignore[func-returns-value]


LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the file": (lambda f: (f / "model.onnx").write_bytes(b"x"), "model.onnx is not what it was"),
    "a new file": (lambda f: (f / "more.txt").write_text("x"), "more.txt is not one of the files"),
    "a missing card": (lambda f: (f / "claims/MODEL_CARD.md").unlink(), "is missing"),
    "the epsilon": (_better_epsilon, "the signature does not fit the certificate"),
    "the model": (_other_model, "is not the model that this was made of"),
    "the steps": (_hidden_step, "the list of steps was changed after it was signed"),
    "no signature": (_unsigned, "nobody signed the list of steps"),
    "no json": (
        lambda f: ((f / "claims/certificate.json").write_text("{"), _resealed(f)),
        "certificate.json cannot be read",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_forger_is_seen(private_onnx: Exported, tmp_path: Path, lie: str) -> None:
    folder = tmp_path / "forged"
    shutil.copytree(private_onnx.path, folder)
    tell, problem = LIES[lie]
    tell(folder)
    found = check_delivery(folder)
    assert any(problem in one for one in found.problems), found.problems
    assert found.to_json()["guarantees"] == []


def test_another_coordinators_key_is_not_this_ones(private_onnx: Exported) -> None:
    assert check_delivery(private_onnx.path, key="AAAA").problems == [
        "the certificate is signed with another key than the one given"
    ]


def test_numbers_of_another_model_are_not_called_the_same(
    private_onnx: Exported, tmp_path: Path
) -> None:
    """Whoever has the key can sign anything; the file's own numbers are looked at all the same."""
    import onnx

    from umbel.deliver.claims import delivered_text
    from umbel.server.private.coordinator_key import coordinator_key, sign

    folder = tmp_path / "forged"
    shutil.copytree(private_onnx.path, folder)
    graph = onnx.load(str(folder / "model.onnx"))
    for one in graph.graph.initializer:
        value = onnx.numpy_helper.to_array(one)
        if value.dtype == np.float32 and value.ndim == 2:
            one.CopyFrom(onnx.numpy_helper.from_array(value * 1.01, one.name))
    onnx.save(graph, str(folder / "model.onnx"))
    _resealed(folder, "model.onnx")
    _edit(
        folder / "delivery.json",
        lambda value: (
            value.pop("signature"),
            value.update(signature=sign(coordinator_key(), delivered_text(value))),
        )[1],
    )
    found = check_delivery(folder)
    assert found.problems == []
    assert "on the coordinator's word: 2 of 4 tensors" in found.claims[-1]
