"""The groups of options that every federation understands, whoever trains."""

from collections.abc import Mapping

from umbel.core.limits import check_values
from umbel.core.options import OptionGroup, Options, Value
from umbel.strategies.aggregators.named import RobustOptions
from umbel.strategies.async_options import AsyncOptions
from umbel.strategies.compression.options import CompressionOptions
from umbel.strategies.device_options import DeviceOptions
from umbel.strategies.methods.options import MethodOptions
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.secure.options import SecureOptions

GROUPS: Mapping[str, type[OptionGroup]] = {
    "every run": RunOptions,
    "asynchronous rounds": AsyncOptions,
    "simulated devices": DeviceOptions,
    "privacy": PrivacyOptions,
    "secure sum": SecureOptions,
    "method": MethodOptions,
    "compression": CompressionOptions,
    "robust aggregation": RobustOptions,
}
"""Who reads an option, and the group that holds it."""


def defaults() -> dict[str, Value]:
    """Every option of all groups, with its default."""
    return {name: v for group in GROUPS.values() for name, v in group.defaults().items()}


def check_alone(options: Options, *, registers: bool) -> None:
    """Look at each option of the groups alone; nothing is imported for it that trains.

    Args:
        options: some of a run, under today's names.
        registers: parts may still be registered, so an unknown name of one may be good.

    Raises:
        ConfigError: the first value that no federation can have.
    """
    for group in GROUPS.values():
        check_values(group, options, registers=registers)
