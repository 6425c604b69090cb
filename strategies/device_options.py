"""The options of simulated devices: how long virtual nodes would take, were they devices."""

from dataclasses import dataclass

from umbel.core.errors import ConfigError
from umbel.core.limits import above, at_least, check_limits, option
from umbel.core.options import OptionGroup

NONE = "none"
DRAWN = ("equal", "lognormal")
TABLE = ".csv"


@dataclass(frozen=True)
class DeviceOptions(OptionGroup):
    """How fast virtual nodes are; the option names are these with dashes for underscores.

    Attributes:
        devices: `none`: time is the machine's own; `equal`: a virtual clock runs, and all nodes are
            alike; `lognormal`: their speeds are drawn from that distribution; or the path of a CSV
            table with the columns partition, seconds, download_mbit, upload_mbit and latency.
        device_seconds: that a training takes on the middle device.
        device_spread: with `lognormal`, the standard deviation of the logarithm of speeds: 1 lets
            one device in six be 2.7 times slower than the middle one, or worse.
        device_download_mbit: Mbit/s to the middle device; 0 is no limit.
        device_upload_mbit: Mbit/s from it; 0 is no limit.
    """

    devices: str = NONE
    device_seconds: float = option(1.0, above(0))
    device_spread: float = option(1.0, at_least(0))
    device_download_mbit: float = option(0.0, at_least(0))
    device_upload_mbit: float = option(0.0, at_least(0))

    def __post_init__(self) -> None:
        check_limits(self)
        if self.devices != NONE and self.devices not in DRAWN and not self.table:
            raise ConfigError(
                f"devices is {self.devices!r}; it can be {NONE}, {', '.join(DRAWN)} or the path of "
                f"a table that ends in {TABLE}"
            )
        for name, value in self.changed().items():
            why = self._ignores(name)
            if why:
                raise ConfigError(f"{name} is {value:g}, but {why}, or leave it out")

    def _ignores(self, name: str) -> str:
        """Why an option would do nothing, and what else to ask for; empty where it does."""
        if name == "devices":
            return ""
        if not self.on:
            return "no devices are simulated; add devices=lognormal"
        if self.table:
            return f"{self.devices} says what each device is like; change that table"
        if name == "device-spread" and self.devices == "equal":
            return "devices=equal are all alike; take devices=lognormal"
        return ""

    @property
    def on(self) -> bool:
        """Whether a virtual clock runs."""
        return self.devices != NONE

    @property
    def table(self) -> bool:
        """Whether a table says what each device is like."""
        return self.devices.endswith(TABLE)
