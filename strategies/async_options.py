"""The options of asynchronous rounds, and what cannot be asked for under them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from umbel.core.errors import ConfigError
from umbel.core.limits import at_least, check_limits, one_of, option
from umbel.core.options import OptionGroup
from umbel.strategies.run_options import RunOptions

if TYPE_CHECKING:  # options are told without torch, which takes a second
    from umbel.strategies.stack import Stack


@dataclass(frozen=True)
class AsyncOptions(OptionGroup):
    """How rounds follow each other; the option names are these with dashes for underscores.

    Attributes:
        mode: `sync`: a round waits for the nodes that it asked; `async`: it ends after so many
            replies of whoever is quick (FedBuff), and the slow go on.
        async_buffer: good replies of an asynchronous round; 1 is FedAsync.
        async_concurrency: how many nodes are at work at any time; 0 is twice the buffer.
        async_staleness: a reply that is s rounds behind counts for (1 + s) to the power of minus
            this.
        async_limit: a reply that is further behind is not used; 0 uses every one.
    """

    mode: str = option("sync", one_of("sync", "async"))
    async_buffer: int = option(10, at_least(1))
    async_concurrency: int = option(0, at_least(0))
    async_staleness: float = option(0.5, at_least(0))
    async_limit: int = option(0, at_least(0))

    def __post_init__(self) -> None:
        check_limits(self)
        if self.on:
            return
        for name, value in self.changed().items():
            raise ConfigError(
                f"{name} is {value}, but the rounds of mode=sync wait for their nodes; add "
                "mode=async, or leave it out"
            )

    @property
    def on(self) -> bool:
        """Whether rounds are asynchronous."""
        return self.mode == "async"

    @property
    def at_once(self) -> int:
        """How many nodes are at work at any time."""
        return self.async_concurrency or 2 * self.async_buffer

    def factor(self, behind: int) -> float:
        """What an update counts for that is so many rounds behind."""
        return float((1 + behind) ** -self.async_staleness)

    def check(self, run: RunOptions, stack: "Stack", promised: bool) -> None:
        """Refuse what asynchronous rounds cannot give.

        Args:
            run: the run's options.
            stack: that is built of them.
            promised: whether nodes' training hides single examples.

        Raises:
            ConfigError: with the cure.
        """
        if not self.on:
            return
        from umbel.strategies.collect import Seals
        from umbel.strategies.declared import OfOneRound

        cure = "wait for cohorts (mode=sync)"
        if stack.private or promised:
            raise ConfigError(
                "mode=async takes replies from whoever is quick, and no accounting of this run "
                f"says how often that is the same node: {cure}, or train without privacy"
            )
        if isinstance(stack.collect, Seals):
            raise ConfigError(
                f"mode=async cannot sum in secret: {stack.collect.name} needs a cohort whose nodes "
                f"are there together; {cure}, or leave secure out"
            )
        for layer in stack.layers:
            if isinstance(layer, OfOneRound) and layer.of_one_round:
                raise ConfigError(
                    "mode=async adds up updates that began in different rounds, and "
                    f"{layer.name} sends other coordinates in each; {cure}, or leave the "
                    "compression out"
                )
        if run.cohort != "all":
            raise ConfigError(
                f"cohort is {run.cohort!r}, but mode=async has no cohorts; leave it out, and say "
                "with async-concurrency how many nodes are at work"
            )
        if run.min_replies > self.async_buffer:
            raise ConfigError(
                f"min-replies is {run.min_replies}, but a round of mode=async ends after "
                f"{self.async_buffer} (async-buffer); lower one or raise the other"
            )
