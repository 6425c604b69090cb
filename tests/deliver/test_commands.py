"""The commands as people type them: exit status, JSON keys, and one sentence for what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import APPS, WarmCommand
from umbel import ConfigError
from umbel.clients.data.datasets import load
from umbel.deliver.extras import needed


def test_from_a_run_to_its_use(umbel: WarmCommand, tmp_path: Path) -> None:
    ran = umbel.command(
        "run", APPS / "digits", "-c", "rounds=2", "--workers", 0, "--out", "run", cwd=tmp_path
    )
    assert ran.status == 0, ran.err
    made = umbel.command("export", "run", "--json", cwd=tmp_path)
    assert made.status == 0, made.err
    assert set(made.result) == {"path", "bytes", "metrics", "difference"}
    assert made.result["difference"] <= 1e-4 and made.result["path"] == "run/deliver/onnx"
    checked = umbel.command("verify", "run/deliver/onnx", "--json", cwd=tmp_path)
    assert checked.status == 0 and checked.result["ok"] and checked.result["guarantees"] == []
    (tmp_path / "run/deliver/onnx/README.md").write_text("other")
    assert umbel.command("verify", "run/deliver/onnx", cwd=tmp_path).status == 3

    data = load("digits")
    assert data.inputs is not None
    np.save(tmp_path / "rows.npy", np.asarray(data.test.x)[:3] * 16)
    answered = umbel.command("predict", "run", "rows.npy", "--json", cwd=tmp_path)
    assert answered.status == 0, answered.err
    assert [set(one) for one in answered.result["predictions"]] == [
        {"input", "class", "label", "score"}
    ] * 3
    listed = umbel.command("predict", "run", "rows.npy", "--format", "csv", cwd=tmp_path)
    assert listed.out.splitlines()[0] == "input,class,label,score"

    added = umbel.command("registry", "add", "run", "--tag", "production", "--json", cwd=tmp_path)
    assert added.status == 0 and added.result["tags"] == ["production"]
    tagged = f"{added.result['model']}@production"
    assert umbel.command("predict", tagged, "rows.npy", cwd=tmp_path).out.count("\n") == 3

    for arguments, said in (
        (("predict", "run"), "give an INPUT to predict for, or --listen HOST:PORT"),
        (("predict", "run", "rows.npy", "--key", "k"), "--key is for serving"),
        (("predict", "nothing", "rows.npy"), "there is no folder nothing"),
        (("predict", "run", "rows.npy", "--format", "xml"), "it can be table, json, csv"),
        (("predict", "run", "--listen", "here"), "give HOST:PORT"),
        (("predict", "run", "--listen", ":0", "--share", "2"), "from 0 to 1"),
        (("export", "nothing"), "nothing is not a directory"),
        (("export", "run", "--to", "tflite"), "it can be onnx, torch-export, safetensors, keras"),
        (("compress", "run", "--int8", "--int8-dynamic"), "two ways of rounding"),
        (("compress", "run", "--prune", "2"), "give a share from 0 to below 1"),
        (("registry", "tag", "digits", "production"), "names no version"),
        (("registry", "list", "cats"), "the registry has no model 'cats'"),
    ):
        ended = umbel.command(*arguments, cwd=tmp_path)
        assert (ended.status, said in ended.err) == (2, True), ended.err
        assert ended.err.startswith("umbel: ") and ended.err.count("\n") == 1, ended.err


def test_a_missing_package_is_a_sentence_with_the_command() -> None:
    with pytest.raises(ConfigError) as caught:
        needed("no_such_package.part", "export --to onnx")
    assert str(caught.value) == (
        "export --to onnx needs the package no_such_package: pip install 'umbel[deliver]'"
    )


def test_results_are_strict_json(umbel: WarmCommand, tmp_path: Path) -> None:
    ended = umbel.command("registry", "list", "--json", cwd=tmp_path)
    assert json.loads(ended.out) == {"models": []}
