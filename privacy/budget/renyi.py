"""Epsilon of releases that are known by their Renyi divergence at whole orders only.

Noise that nodes add together lives in as many dimensions as the model has and has no privacy-loss
distribution of one variable; its Renyi divergences add up, and dp-accounting turns them into
epsilon (Canonne, Kamath and Steinke 2020, proposition 12).
"""

import math
from collections.abc import Mapping

from dp_accounting import DpEvent, ZCDpEvent
from dp_accounting.rdp import rdp_privacy_accountant

from umbel.privacy.noise.skellam import SkellamDpEvent

ORDERS = (*range(2, 65), 72, 80, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
"""Whole orders: the bound on Skellam noise is proven for no others."""


def has_curve(event: DpEvent) -> bool:
    """Whether this module knows an event."""
    return isinstance(event, SkellamDpEvent | ZCDpEvent)


def renyi_epsilon(events: Mapping[DpEvent, int], delta: float) -> float:
    """Epsilon at `delta` of all events together, under their own neighbouring relation.

    Raises:
        ValueError: an event that has no curve here.
    """
    totals = [
        math.fsum(times * _divergence(event, order) for event, times in events.items())
        for order in ORDERS
    ]
    return float(rdp_privacy_accountant.compute_epsilon(ORDERS, totals, delta)[0])


def _divergence(event: DpEvent, order: int) -> float:
    match event:
        case SkellamDpEvent():
            return event.rdp(order)
        case ZCDpEvent():
            return float(event.xi + event.rho * order)
    raise ValueError(f"{type(event).__name__} has no Renyi divergence here")
