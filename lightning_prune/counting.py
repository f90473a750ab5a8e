"""How many entries the reference implementations remove: each turns a fraction into another count.

Asked for 20 % of ten distinct values they remove one, two or three. The rules exist so that their published masks can
be reproduced; :func:`lightning_prune.selection.select` uses none of them unless told by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import SelectionError


@dataclass(frozen=True)
class Competition:
    """What a rule may look at.

    Args:
        ordered: Function that gives the competing scores, ascending.
        remaining: How many scores compete.
        total: Entries of the competing tensors, pruned ones included.
        ignored: Kept entries of tensors that are never pruned (a rate of 0).
    """

    ordered: Callable[[], Tensor]
    remaining: int
    total: int
    ignored: int


@dataclass(frozen=True)
class CountingRule:
    """A reference's way from what was asked to a number of entries.

    Args:
        takes: ``"fraction"`` (of what remains, to remove) or ``"density"`` (of the original total, to keep).
        count: From the competition and the number asked, how many of the lowest scores leave.
    """

    takes: str
    count: Callable[[Competition, float], int]


def _up_to_cutoff(field: Competition, index: int, rule: str) -> int:
    """Everything up to and including the ``index``-th (from 0) of the ascending scores, and all that equal it."""
    if index >= field.remaining:
        raise SelectionError(
            f"counting={rule!r} takes the score at place {index} (from 0) as its threshold, but only {field.remaining} "
            "scores compete (the reference fails there with an index out of range); ask for less."
        )
    ordered = field.ordered()
    return int(torch.searchsorted(ordered, ordered[index], right=True))


def _network_slimming(field: Competition, fraction: float) -> int:
    return _up_to_cutoff(field, int(field.remaining * fraction), "network_slimming")


def _open_lth(field: Competition, fraction: float) -> int:
    return _up_to_cutoff(field, int(np.ceil(fraction * (field.remaining + field.ignored))), "open_lth")


def _google_lth(field: Competition, fraction: float) -> int:
    return _up_to_cutoff(field, int(np.round(fraction * field.remaining)), "google_lth")


def _renda(field: Competition, density: float) -> int:
    ordered = field.ordered().numpy()
    entered = np.concatenate([np.zeros(field.total - field.remaining, ordered.dtype), ordered])
    return int(np.sum(ordered < np.percentile(entered, 100 - 100 * density)))


def _hrank(field: Competition, fraction: float) -> int:
    return int(fraction * field.remaining)


def _hrankplus(field: Competition, fraction: float) -> int:
    kept = int(field.remaining * (1 - fraction))
    if kept == 0:
        raise SelectionError(
            f"counting='hrankplus' keeps int({field.remaining} * (1 - {fraction})) = 0 (the reference fails there with "
            "an empty layer); ask for less."
        )
    return field.remaining - kept


def _deconstructing_lt(field: Competition, fraction: float) -> int:
    percent = (1 - (1 - fraction)) * 100.0  # their argument is the fraction kept; this does not cancel in floats
    return int(field.remaining * percent / 100)


def _edge_popup(field: Competition, density: float) -> int:
    pruned = field.total - field.remaining
    return max(0, int((1 - density) * field.total) - pruned)


RULES: Mapping[str, CountingRule] = MappingProxyType(
    {
        "network_slimming": CountingRule("fraction", _network_slimming),
        "open_lth": CountingRule("fraction", _open_lth),
        "google_lth": CountingRule("fraction", _google_lth),
        "renda": CountingRule("density", _renda),
        "hrank": CountingRule("fraction", _hrank),
        "hrankplus": CountingRule("fraction", _hrankplus),
        "deconstructing_lt": CountingRule("fraction", _deconstructing_lt),
        "edge_popup": CountingRule("density", _edge_popup),
    }
)
"""The references' rules by name."""
