"""A first look at an app: what is refused before anything heavy is imported.

Importing torch and Flower takes seconds; a slip in a file or in an option needs none of them.
"""

from collections.abc import Sequence
from pathlib import Path

from umbel.core.app_folder import open_app
from umbel.core.limits import check_alone
from umbel.core.options import OptionGroup, Options
from umbel.strategies.aggregators.named import RobustOptions
from umbel.strategies.methods.options import MethodOptions
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.secure.options import SecureOptions

GROUPS: Sequence[type[OptionGroup]] = (
    RunOptions,
    PrivacyOptions,
    SecureOptions,
    MethodOptions,
    RobustOptions,
)
"""The groups whose modules import no torch."""


def look(app: Path, changes: Options | None = None) -> None:
    """Refuse an app that is none, that is no Python, or whose options have impossible values.

    Options that only the imported app can judge are left to it, and so are all of an app that
    makes no `Federation`: its `rounds` may be another thing.

    Args:
        app: the folder.
        changes: to the app's options.

    Raises:
        ConfigError: with the cure.
    """
    folder = open_app(app)
    if "Federation" in folder.check_syntax():
        options = {**folder.options, **(changes or {})}
        for group in GROUPS:
            check_alone(group, options)
