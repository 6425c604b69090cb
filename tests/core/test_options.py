"""Options: read, checked, overridden; every mistake is one sentence with the cure."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.core.errors import ConfigError
from umbel.core.options import checked, flatten, override, parse
from umbel.strategies.run_options import RunOptions

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
VALUES = st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | NAMES


def written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@given(st.dictionaries(NAMES, VALUES, max_size=5))
def test_what_is_written_is_read(options: dict[str, Any]) -> None:
    line = " ".join(f"{name}={written(value)}" for name, value in options.items())
    assert parse([line]) == options
    assert parse([f"{name}={written(value)}" for name, value in options.items()]) == options


def test_words_need_no_quotes_and_later_values_win() -> None:
    assert parse(["a=1 b='two words' c = three", 'a=2.5 d="x=y" e=true f=1e3']) == {
        "a": 2.5,
        "b": "two words",
        "c": "three",
        "d": "x=y",
        "e": True,
        "f": 1000.0,
    }
    assert parse(["path=/data/x.toml list=[1,2]"]) == {"path": "/data/x.toml", "list": "[1,2]"}
    assert parse([]) == parse([""]) == {}


@pytest.mark.parametrize("text", ["rounds", "rounds=5 extra", "=5", "rounds=", "rounds 5"])
def test_what_is_not_name_and_value_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="is not name=value; write for example"):
        parse([text])


def test_a_file_of_options(tmp_path: Path) -> None:
    file = tmp_path / "quick.toml"
    file.write_text("rounds = 3\n[model]\nhidden = 8\n")
    assert parse([str(file), "rounds=4"]) == {"rounds": 4, "model.hidden": 8}
    file.write_text("rounds = = 3")
    with pytest.raises(ConfigError, match=r"quick\.toml cannot be read: "):
        parse([str(file)])
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read: "):
        parse([str(tmp_path / "missing.toml")])


def test_a_file_from_windows_is_read_and_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "windows.toml"
    file.write_bytes(b"\xef\xbb\xbfrounds = 3\r\nname = 'a'\r\n")
    assert parse([str(file)]) == {"rounds": 3, "name": "a"}
    for encoding in ("utf-16", "latin-1"):
        file.write_bytes("name = 'ä'".encode(encoding))
        with pytest.raises(ConfigError, match=r"windows\.toml cannot be read: it is not in UTF-8"):
            parse([str(file)])


def test_a_backslash_that_makes_a_control_character_is_refused() -> None:
    assert parse([r"path='C:\new'"]) == parse([r"path=C:\new"]) == {"path": r"C:\new"}
    with pytest.raises(ConfigError, match="write it in single quotes"):
        parse([r'path="C:\new"'])


def test_nested_tables_become_dotted_names() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": "x"}, "e": True}) == {
        "a.b.c": 1,
        "a.d": "x",
        "e": True,
    }
    with pytest.raises(ConfigError, match=r"the option a\.b is \[1, 2\]; options are"):
        flatten({"a": {"b": [1, 2]}})


@pytest.mark.parametrize(
    ("value", "default", "needed"),
    [
        ("5", 10, "a whole number, such as 10"),
        (5.0, 10, "a whole number, such as 10"),
        (True, 10, "a whole number, such as 10"),
        (True, 0.5, "a number, such as 0.5"),
        ("fast", 0.5, "a number, such as 0.5"),
        (1, True, "true or false, such as true"),
        ("True", False, "true or false, such as false"),
        (10**18 + 1, 0, "at most 18 digits"),
        (-(10**19), 0.5, "at most 18 digits"),
        (1, "adam", "a text, such as 'adam'"),
        (math.nan, 0.5, "give a number"),
    ],
)
def test_a_wrong_type_says_what_is_needed(value: Any, default: Any, needed: str) -> None:
    with pytest.raises(ConfigError, match=f"^speed is .*{needed}"):
        checked("speed", value, default)


def test_a_whole_number_is_a_number() -> None:
    assert checked("speed", 2, 0.5) == 2.0
    assert checked("budget", math.inf, 1.0) == math.inf
    assert type(checked("speed", 2, 0.5)) is float


def test_an_unknown_name_gets_the_closest_known_one() -> None:
    known = {"rounds": 5, "learning-rate": 0.1}
    assert override(known, {"rounds": 7, "learning-rate": 1}) == {"rounds": 7, "learning-rate": 1.0}
    assert known == {"rounds": 5, "learning-rate": 0.1}
    with pytest.raises(ConfigError, match="no option 'roundss'; did you mean rounds"):
        override(known, {"roundss": 7})
    with pytest.raises(ConfigError, match="no option 'xyz'; known are learning-rate, rounds"):
        override(known, {"xyz": 7})


def test_defaults_are_valid_and_complete() -> None:
    defaults = RunOptions.defaults()
    assert len(defaults) == len(fields(RunOptions))
    assert not any("_" in name for name in defaults)
    assert RunOptions.read(defaults) == RunOptions()
    assert RunOptions.read({"rounds": 3, "someone-elses": "x"}).rounds == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"evaluate-every": 0}, "evaluate-every is 0; it must be at least 1"),
        ({"client-eval-every": -2}, "client-eval-every is -2; it must be at least -1"),
        ({"cohort-size": -1.0}, "cohort-size is -1.0; it must be at least 0"),
        ({"round-timeout": -1.0}, "round-timeout is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"min-replies": -1}, "min-replies is -1"),
        ({"average-from": -1}, "average-from is -1"),
        ({"server-learning-rate": -1.0}, "server-learning-rate is -1.0; it must be at least 0"),
        ({"server-momentum": 1.0}, "server-momentum is 1.0; it must be from 0 up to 1"),
        ({"beta-1": -0.1}, "beta-1 is -0.1"),
        ({"beta-2": 1.0}, "beta-2 is 1.0"),
        ({"adaptive-epsilon": 0.0}, "adaptive-epsilon is 0.0; it must be above 0"),
        ({"round-timeout": math.inf}, "round-timeout is inf; it must be finite"),
        ({"server-learning-rate": math.nan}, "server-learning-rate is NaN"),
        ({"buffers": "keep"}, "buffers is 'keep'; it can be local, mean"),
        ({"keep-model": "first"}, "keep-model is 'first'; it can be last, best"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; it can be constant"),
        ({"schedule": "cosin", "warmup-rounds": 3}, "schedule is 'cosin'; it can be constant"),
        ({"schedule-gamma": -0.1}, "schedule-gamma is -0.1; it must be at least 0"),
        ({"cohort": "fxied"}, "cohort is 'fxied'; it can be all, fixed, poisson"),
        ({"cohort": "fixed"}, "cohort=fixed needs cohort-size"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; it can be fedavg"),
        ({"rounds": "5"}, "rounds is '5', but it must be a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_named_before_anything_starts(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        RunOptions.read(options)
    assert said in str(raised.value)
