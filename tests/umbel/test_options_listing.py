"""`umbel options`: the list is what the readers read, and the page is the list."""

import json
from pathlib import Path

import pytest

from umbel.commands.options_listing import listing, meanings_of, reference
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.core.limits import limits_of
from umbel.federation import FederationServerApp
from umbel.opening import example
from umbel.strategies.run_options import RunOptions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


@pytest.mark.parametrize("name", ["fashion", "clinics", "private-clinics", "private-fashion"])
def test_every_option_of_an_example_is_listed_with_its_meaning(name: str) -> None:
    folder = open_app(example(name))
    app = folder.server_app()
    assert isinstance(app, FederationServerApp)
    rows = listing(app.federation, folder.options)
    complete = app.federation.complete(folder.options)
    assert {row.name for row in rows} == set(complete)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        default = row.default if row.default != "inf" else float("inf")
        assert default == complete[row.name]
    silent = [row.name for row in rows if row.reader != "the app" and not row.meaning]
    assert silent == [] or name == "clinics"  # scikit-learn's options are described in its class
    json.dumps([row.default for row in rows], allow_nan=False)


def test_the_page_is_what_the_command_prints() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference()


def test_the_values_that_are_listed_are_those_that_are_taken() -> None:
    for name, limit in limits_of(RunOptions).items():
        default = RunOptions.defaults()[name]
        if limit.choices:
            for choice in limit.choices:
                assert limit.admits(choice)
            bad: object = "no such choice"
        else:
            bad = type(default)(limit.least - 1)
        with pytest.raises(ConfigError, match=f"{name} is "):
            RunOptions.read({name: bad})  # type: ignore[dict-item]


def test_meanings_are_read_from_docstrings() -> None:
    class Some:
        """A class.

        Attributes:
            first_one: what it does: this,
                and that.
            second: another.

        More text: not an attribute.
        """

    assert meanings_of(Some) == {"first-one": "what it does: this, and that.", "second": "another."}
