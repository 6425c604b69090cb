"""With this module, every name of Umbel's own parts is known, and no part of them is imported.

Options are told and checked by it: a run that is refused shall not wait for torch.
"""

from umbel.strategies import optimizer_names as optimizer_names
from umbel.strategies import sampler_names as sampler_names
from umbel.strategies.aggregators import named as aggregator_names  # noqa: F401
from umbel.strategies.methods import named as method_names  # noqa: F401
