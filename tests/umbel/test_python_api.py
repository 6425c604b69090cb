"""`umbel` in Python: a `Federation` object is run, and the result has what people look for."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umbel
from umbel.core.errors import ConfigError
from umbel.notebook import NotebookProgress
from umbel.server.output.progress import SilentProgress


def line(node: Any, options: Any) -> umbel.Examples:  # noqa: ARG001
    x = np.random.default_rng(node.partition).normal(size=(20, 2))
    return umbel.Examples(x, x @ np.array([1.0, -1.0]))


def train(arrays: Any, examples: Any, job: Any) -> Any:
    x, y = np.asarray(examples.x), np.asarray(examples.y)
    error = x @ arrays["w"] - y
    step = job.options["learning-rate"] * x.T @ error / len(y)
    return {"w": arrays["w"] - step}, len(y), {"loss": float((error**2).mean())}


def federation() -> umbel.Federation:
    trainer = umbel.FunctionTrainer(lambda _: {"w": np.zeros(2)}, train)
    return umbel.Federation(trainer=trainer, data=line, options={"learning-rate": 0.3}, name="line")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_federation_is_run_and_gives_its_model_rounds_and_plots(here: Path) -> None:
    result = umbel.run(
        federation(), options={"rounds": 40}, nodes=3, out="run", progress=SilentProgress()
    )
    assert result.path == Path("run")
    assert result["rounds"] == 40
    assert [row["round"] for row in result.lines() if row["round"]] == list(range(1, 41))
    assert result.model()["w"] == pytest.approx([1.0, -1.0], abs=0.1)
    assert all(plot.is_file() for plot in result.plots())
    assert "40 rounds in" in result._repr_html_()
    assert (here / "run" / "report.html").is_file()
    frame = pytest.importorskip("pandas") and result.rounds()
    assert frame.loc[40, "clients"] == 3


@pytest.mark.usefixtures("here")
def test_a_federation_goes_on_where_it_was_stopped() -> None:
    keywords: dict[str, Any] = {"nodes": 3, "progress": SilentProgress()}
    whole = umbel.run(federation(), options={"rounds": 4}, out="whole", **keywords)
    umbel.run(federation(), options={"rounds": 2}, out="part", **keywords)
    more = umbel.run(federation(), options={"rounds": 4}, resume="part", **keywords)
    assert more.model()["w"].tolist() == whole.model()["w"].tolist()
    with pytest.raises(ConfigError, match=r"run of a Federation object; .*umbel\.run\(federation"):
        umbel.run(resume="part", progress=SilentProgress())


def test_worker_processes_need_an_app_folder() -> None:
    with pytest.raises(ConfigError, match="workers is 2, but a Federation object is trained in"):
        umbel.run(federation(), workers=2)


def test_the_names_are_those_of_the_page_whatever_was_imported_first() -> None:
    code = (
        "import umbel.commands.cli, umbel.run, umbel.running, umbel.loading, umbel.federation\n"
        "from umbel.run import run\n"
        "assert run is umbel.run\n"
        "import umbel\n"
        "assert callable(umbel.run) and callable(umbel.load), umbel.run\n"
        "assert {'run', 'load', 'Federation', 'TorchTrainer'} <= set(dir(umbel))\n"
        "missing = [name for name in umbel.__all__ if not hasattr(umbel, name)]\n"
        "assert not missing, missing\n"
        "import pkgutil\n"
        "inside = {module.name for module in pkgutil.iter_modules(umbel.__path__)}\n"
        "assert not inside & set(umbel.__all__), inside & set(umbel.__all__)\n"
        "assert issubclass(umbel.ConfigError, umbel.UmbelError)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cell_shows_one_line_that_is_redrawn_and_the_notes() -> None:
    shown: list[Any] = []

    class Handle:
        def update(self, what: Any) -> None:
            shown[-1] = what

    def display(what: Any) -> Handle:
        shown.append(what)
        return Handle()

    progress = NotebookProgress(display, clock=lambda: 0.0)
    progress.start("a <b> title", 2, 3)
    progress.note("look here")
    for number in (1, 2):
        progress.round_done({"round": number, "metrics": {"loss": 0.5}, "seconds": 1.0})
    progress.finish("")
    (cell,) = shown
    assert "a &lt;b&gt; title: 2 rounds, 3 nodes" in cell._repr_html_()
    assert 'value="2" max="2"' in cell._repr_html_()
    assert "note: look here" in repr(cell)
