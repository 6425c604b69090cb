"""`umbel new`: an ordinary Flower app, and no way to lose one's own files."""

from pathlib import Path

import pytest

from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.scaffold import OPTIONS, TEMPLATE, new_app


@pytest.mark.parametrize("name", ["my-app", "a", "Clinic_7", "x.y"])
def test_it_is_an_app_of_that_name(name: str, tmp_path: Path) -> None:
    folder = new_app(tmp_path / "deep" / name)
    app = open_app(folder)
    assert app.name == name
    assert app.nodes is not None and app.options["rounds"]
    assert {file.name for file in folder.iterdir()} == {
        file.name.removesuffix(".tmpl") for file in TEMPLATE.iterdir() if file.suffix == ".tmpl"
    }
    assert not any("$" in file.read_text() for file in folder.iterdir())


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert (new_app(tmp_path / "here") / "task.py").is_file()


@pytest.mark.parametrize("name", ["-x", "x-", "a b", "é", "..."])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no name for an app; use letters"):
        new_app(tmp_path / name)


@pytest.mark.parametrize("framework", sorted(OPTIONS))
def test_each_framework_has_a_template(framework: str, tmp_path: Path) -> None:
    app = open_app(new_app(tmp_path / "app", framework))
    assert app.options["learning-rate"] > 0
    task = (tmp_path / "app" / "task.py").read_text()
    compile(task, "task.py", "exec")
    trainer = {"numpy": "Function"}.get(framework, framework.title())
    assert f"trainer={trainer}Trainer(" in task


def test_another_framework_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no template .* .mxnet.; choose one of torch, keras"):
        new_app(tmp_path / "app", "mxnet")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "task.py").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match="exists already; choose another name"):
            new_app(tmp_path / name)
    assert (tmp_path / "mine" / "task.py").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        new_app(tmp_path / "file" / "app")
