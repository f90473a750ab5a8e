"""Rates of HRank: how much of each layer leaves, in the papers' syntax, and what ranks are worth as scores."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.channels.feature_maps import RankSums, find_taps
from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.channels.scores import score_norms
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.counting import RULES, Competition
from lightning_prune.errors import ConfigError, SelectionError
from lightning_prune.prunable import matching

Rates = str | Sequence[float] | Mapping[str, float]
_TERM = re.compile(r"\[\s*([0-9.]+)\s*\](?:\s*\*\s*([0-9]+))?")
SPREAD = 0.01
"""Mean ranks that differ by less than this fraction of the largest possible rank carry no order."""
LEAST = 3
"""Maps narrower than this carry no order either."""


def parse_rates(rates: Rates) -> list[float] | dict[str, float]:
    """Read rates: ``"[0.95]+[0.5]*6"`` as the papers' code writes them, a list, or ``{layer or pattern: rate}``.

    Raises:
        ConfigError: Not readable, or a rate outside [0, 1).
    """
    if isinstance(rates, str):
        found: list[float] = []
        for term in rates.split("+"):
            match = _TERM.fullmatch(term.strip())
            try:
                if match is None:
                    raise ValueError
                found += [float(match[1])] * int(match[2] or 1)
            except ValueError as error:
                raise ConfigError(f"rates={rates!r}: {term!r} is not like '[0.5]' or '[0.5]*6'.") from error
        result: list[float] | dict[str, float] = found
    elif isinstance(rates, Mapping):
        result = {str(name): rate for name, rate in rates.items()}
    else:
        result = list(rates)
    for rate in result.values() if isinstance(result, dict) else result:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ConfigError(f"rates: {rate!r} must lie in [0, 1): the fraction of a layer that leaves, never all.")
    return result


def rates_of_layers(graph: ChannelGraph, rates: list[float] | dict[str, float]) -> dict[str, float]:
    """A rate for each 2d convolution, in the order in which they run.

    Raises:
        ConfigError: A list of the wrong length, or a name that matches no convolution.
    """
    layers = [tap.name for tap in find_taps(graph)]
    if isinstance(rates, dict):
        found = dict.fromkeys(layers, 0.0)
        for pattern, rate in rates.items():
            found |= dict.fromkeys(matching(pattern, layers, "rates"), rate)
        return found
    if len(rates) != len(layers):
        shown = ", ".join(layers[:4]) + (f", ..., {layers[-1]}" if len(layers) > 4 else "")
        raise ConfigError(
            f"rates has {len(rates)} entries; expected {len(layers)}, one for each 2d convolution in the order in "
            f"which they run ({shown})."
        )
    return dict(zip(layers, rates, strict=True))


def widths_by_rates(graph: ChannelGraph, rates: Mapping[str, float], counting: str, least: int = 1) -> dict[str, int]:
    """How many channels of each group stay: a group that several convolutions make loses the mean of their rates.

    Args:
        graph: The traced network.
        rates: By convolution.
        counting: ``"hrank"``: ``int(rate * n)`` leave; ``"hrankplus"``: ``int(n * (1 - rate))`` stay.
        least: No group gets narrower.

    Returns:
        ``{group name: width}``; groups that no 2d convolution makes stay whole.

    Raises:
        ConfigError: A layer would be emptied.
    """
    widths = {}
    for group in graph.groups:
        makers = [name.rpartition(".")[0] or name for name, _ in group.makers]
        own = [rates[name] for name in makers if name in rates]
        rate = sum(own) / len(own) if own else 0.0
        nothing = Competition(lambda: torch.empty(0), group.size, group.size, 0)
        try:
            removed = RULES[counting].count(nothing, rate)
        except SelectionError as error:
            raise ConfigError(f"{group.name} would be emptied at a rate of {rate}: {error}") from error
        widths[group.name] = max(group.size - removed, min(least, group.size))
    return widths


def rank_scores(graph: ChannelGraph, ranks: RankSums) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores of groups from ranks of maps: the mean rank as a fraction of ``min(H, W)``, averaged over its layers.

    Where ranks carry no order the L2 norm of the filters stands in.

    Returns:
        Scores, and for each group whose ranks carry no order, why.
    """
    means = ranks.means()
    scores, weak = {}, {}
    for group in graph.groups:
        score, why = _score(group, means, ranks.limits)
        if why:
            weak[group.name] = why
        scores[group.name] = score if score is not None and not why else _norms(group, graph.model)
    return scores, weak


def _score(group: ChannelGroup, means: Mapping[str, Tensor], limits: Mapping[str, int]) -> tuple[Tensor | None, str]:
    found, widest = [], 0
    for name, axis in group.makers:
        layer = name.rpartition(".")[0] or name
        if layer in means:
            places = torch.from_numpy(group.positions(name, axis))
            found.append(means[layer][places].mean(dim=1) / limits[layer])
            widest = max(widest, limits[layer])
    if not found:
        return None, "no 2d convolution makes its channels"
    score = torch.stack(found).mean(dim=0)
    if widest < LEAST:
        return score, f"its maps are {widest} pixels high or wide"
    if group.size > 1 and float(score.max() - score.min()) < SPREAD:
        return score, f"its mean ranks lie between {float(score.min()):.3f} and {float(score.max()):.3f} of the largest"
    return score, ""


def _norms(group: ChannelGroup, model: nn.Module) -> Tensor:
    return score_norms(group, model, reduction="mean")
