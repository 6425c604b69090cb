"""Where a node's policy lies."""

from pathlib import Path

from umbel.clients.process.membership import NodeSettings
from umbel.core.errors import ConfigError
from umbel.strategies.policy.keys import default_file
from umbel.strategies.policy.reading import FORMER, POLICY


def policy_file(folder: Path, settings: NodeSettings) -> Path:
    """The node's policy file; a commented one that changes nothing is written where there is none.

    Args:
        folder: of the node's state.
        settings: of the node; they may name a file elsewhere.

    Raises:
        ConfigError: two files are named, or none can be written.
    """
    config = settings.node_config
    named = {str(config[key]) for key in (POLICY, FORMER) if config.get(key)}
    named |= {settings.policy} if settings.policy else set()
    if len(named) > 1:
        raise ConfigError(
            f"this node's policy is {' and '.join(sorted(named))}; name one file, by --policy"
        )
    if named:
        return Path(named.pop())
    file = folder.absolute() / "policy.toml"
    try:
        if not file.exists():
            file.write_text(default_file())
    except OSError as problem:
        raise ConfigError(f"{file} cannot be written: {problem.strerror}") from problem
    return file
