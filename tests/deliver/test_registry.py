"""The registry: versions never change, tags move, lineage says where a model comes from."""

from pathlib import Path

import pytest

from umbel import ConfigError
from umbel.deliver import registry
from umbel.deliver.export import Exported
from umbel.deliver.trained import TrainedModel


def test_versions_tags_and_lineage(
    trained: TrainedModel, onnx: Exported, private_onnx: Exported
) -> None:
    for path in (trained.run.path, onnx.path, private_onnx.path):
        registry.add("digits", path, registry.lineage_of(path))
    again = registry.add("digits", onnx.path, registry.lineage_of(onnx.path))
    assert again.number == 2  # the same file is the same version
    registry.tag("digits", 1, "production")
    registry.tag("digits", 2, "production")
    registry.tag("digits", 2, "small")
    found = registry.versions("digits")
    assert [one.tags for one in found] == [(), ("production", "small"), ()]
    assert registry.resolved("digits@production") == onnx.path.resolve()
    assert registry.resolved("digits@1") == trained.run.path.resolve()
    plain, private = found[1].lineage, found[2].lineage
    assert plain["run"] == trained.run.path.name and plain["certificate"] is None
    assert plain["app"] == "digits" and plain["populations"] == []
    assert private["certificate"] and len(private["populations"]) == 1


def test_what_is_not_there_is_said(trained: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no model 'cats'; it has none"):
        registry.resolved("cats@production")
    registry.add("digits", trained.run.path, registry.lineage_of(trained.run.path))
    with pytest.raises(ConfigError, match="no version or tag 'live'; it has the versions 1 and"):
        registry.resolved("digits@live")
    with pytest.raises(ConfigError, match="no version 7 of 'digits'; there are 1"):
        registry.tag("digits", 7, "production")
    with pytest.raises(ConfigError, match="looks like a version"):
        registry.tag("digits", 1, "3")
    with pytest.raises(ConfigError, match="give letters, digits"):
        registry.add("../escape", trained.run.path, {})
    with pytest.raises(ConfigError, match="neither a run nor a delivered model"):
        registry.lineage_of(tmp_path)
    gone = tmp_path / "gone"
    registry.add("digits", gone, {"sha256": "x"})
    with pytest.raises(ConfigError, match="which is gone; register it again"):
        registry.resolved("digits@2")
