"""What a run gives back to Python: the numbers that the command line prints, and what they are of.

>>> result = umbel.run(federation, options={"rounds": 5})          # doctest: +SKIP
>>> result.metrics["accuracy"], result.path                        # doctest: +SKIP
>>> model = result.model()                                         # doctest: +SKIP
"""

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.core.errors import ConfigError
from umbel.server.output.rundir import RunDirectory

if TYPE_CHECKING:
    import pandas

    from umbel.federation import Federation


class Result(dict[str, Any]):
    """The outcome of a run. As a mapping it is what `umbel run --json` prints.

    Attributes:
        path: the run directory.
        metrics: the final metrics, such as {"accuracy": 0.97, "loss": 0.1}.
    """

    def __init__(self, found: dict[str, Any], federation: "Federation | None" = None) -> None:
        super().__init__(found)
        self._federation = federation
        self.path = Path(found["run"])
        self.metrics: dict[str, float] = dict(found.get("metrics") or {})

    def model(self) -> Any:
        """The model that the run ended with, ready to use; see `umbel.load`.

        Raises:
            ConfigError: the app has changed since, or keeps its model itself.
        """
        from umbel.loading import load

        return load(self.path, self._federation)

    def lines(self) -> list[dict[str, Any]]:
        """One mapping a round, as `metrics.jsonl` has them."""
        return RunDirectory(self.path).rounds()

    def rounds(self) -> "pandas.DataFrame":
        """One row a round; nested columns have dotted names, such as `metrics.accuracy`.

        Raises:
            ConfigError: pandas is not installed; `lines` needs no other package.
        """
        try:
            import pandas
        except ImportError:
            raise ConfigError(
                "a frame of the rounds needs pandas: pip install pandas; result.lines() gives the "
                "same rows without it"
            ) from None
        flat = pandas.json_normalize(self.lines())
        return flat.set_index("round") if "round" in flat else flat

    def report(self) -> Path:
        """Write the report and its plots into the run directory; the page's path."""
        from umbel.server.output.report import write_report

        return write_report(self.path)

    def plots(self) -> list[Path]:
        """The plots of the run as PNG files, drawn by `report`."""
        self.report()
        return sorted(self.path.glob("*.png"))

    def _repr_html_(self) -> str:
        """What a notebook shows: the last lines of a run and its first plot."""
        from umbel.summary import lines

        said = "<br>".join(html.escape(line) for line in lines(self, self.path / "report.html"))
        for plot in self.plots()[:1]:
            data = base64.b64encode(plot.read_bytes()).decode()
            said += f'<br><img alt="{html.escape(plot.stem)}" src="data:image/png;base64,{data}">'
        return said
