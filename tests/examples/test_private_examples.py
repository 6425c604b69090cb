"""The private examples run from their folders; the long one is cut to one round."""

from pathlib import Path

import pytest

from umbel.clients.data.datasets import place
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.federation import FederationServerApp
from umbel.opening import example
from umbel.running import run
from umbel.server.output.progress import SilentProgress
from umbel.server.private.verify import verify


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_KEY", str(tmp_path / "coordinator.pem"))


def test_clinics_keep_their_promise_to_every_record(tmp_path: Path) -> None:
    result = run(
        example("private-clinics"), workers=0, out=tmp_path / "run", progress=SilentProgress()
    )
    promises = [
        row["example epsilon"]
        for name, row in result["summary"].items()
        if name.startswith("hospital")
    ]
    assert len(promises) == 5
    assert all(2.9 < epsilon <= 3 for epsilon in promises)
    assert result["epsilon"] is None, "nothing is promised about whole hospitals"
    # Chance is 0.63; runs with real noise were between 0.93 and 0.96.
    assert result["metrics"]["accuracy"] > 0.8


@pytest.mark.slow
@pytest.mark.skipif(place("fashion-mnist") is None, reason="needs the images")
@pytest.mark.parametrize(
    ("recipe", "least"), [("quick", 0.8), ("best", 0.8), ("cnn", 0.5), ("few", 0.7)]
)
def test_sixty_thousand_photographs(recipe: str, least: float, tmp_path: Path) -> None:
    changes = {"recipe": recipe, "rounds": 20, "epsilon": 8.0}
    nodes, out = (6_000 if recipe == "few" else 60_000), tmp_path / "run"
    result = run(
        example("private-fashion"),
        options=changes,
        nodes=nodes,
        out=out,
        progress=SilentProgress(),
    )
    assert result["epsilon"] <= 8
    assert result["metrics"]["accuracy"] > least
    assert verify(out) == []


@pytest.mark.parametrize("recipe", ["quick", "best", "cnn", "few"])
def test_a_recipe_needs_no_other_option_on_any_engine(recipe: str) -> None:
    folder = open_app(example("private-fashion"))
    server = folder.server_app()
    assert isinstance(server, FederationServerApp)
    federation = server.federation
    ours = federation.override(federation.complete(folder.options), {"recipe": recipe})
    # Flower changes options that the pyproject names, and hands over the rest as it is there.
    assert {"recipe", "epsilon", "delta", "rounds"} <= folder.options.keys()
    assert federation.complete({**folder.options, "recipe": recipe}) == ours
    assert ours["rounds"] > 0
    assert federation.complete({**folder.options, "rounds": 7})["rounds"] == 7


def test_an_unknown_recipe_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it can be quick, best, cnn, few"):
        run(example("private-fashion"), options={"recipe": "quack"}, out=tmp_path / "run")
