"""Whether the arms of a sweep compare: what each spent of its limit, what is missing, what was measured differently."""

from collections.abc import Iterable, Sequence

from lightning_prune.record import Arm
from lightning_prune.reports.sweep.cells import Cell, is_number, place_of

TOLERANCE = 0.02
"""How far an arm's cost may be from its limit, as a part of it."""
MOST_NAMES = 8
_ROUNDING = 1e-9


def label_of_arm(arm: Arm) -> str:
    """Network, method, budget and seed in words."""
    budget = "" if arm.budget is None else f" {100 * arm.budget:.4g} %"
    return f"{arm.network} {arm.method}{budget} seed {arm.seed}"


def off_limit(arms: Sequence[Arm], tolerance: float = TOLERANCE) -> list[tuple[Arm, float]]:
    """Arms whose cost differs from their limit by more than ``tolerance``, the farthest first, with the difference."""
    found = [(arm, arm.cost.deviation) for arm in arms]
    off = [(arm, own) for arm, own in found if own is not None and abs(own) > tolerance + _ROUNDING]
    return sorted(off, key=lambda pair: -abs(pair[1]))


def fairness_of(arms: Sequence[Arm]) -> str:
    """The largest deviation of an arm's cost from its limit, in a sentence."""
    limited = [(arm, arm.cost.deviation) for arm in arms if arm.cost.deviation is not None]
    if not limited:
        return "No arm states what it might spend, so whether the costs are equal is not known."
    arm, most = max(limited, key=lambda pair: abs(pair[1] or 0.0))
    text = f"The costs of {len(limited)} arms with a limit differ from it by at most {_signed(most or 0.0)} "
    text += f"({label_of_arm(arm)}); {len(off_limit(arms))} by more than {100 * TOLERANCE:g} %."
    free = sum(arm.cost.limit is None for arm in arms)
    if free:
        text += f" {free} arm{'s have' if free > 1 else ' has'} no limit of cost: what is equal there is the steps."
    return text


def notes_of(arms: Sequence[Arm], cells: Sequence[Cell], metric: str) -> list[str]:
    """What a reader has to know before comparing: unequal costs, missing arms, values that are no numbers."""
    notes = [
        f"Not a fair comparison: {label_of_arm(arm)} spent {_signed(deviation)} of its limit."
        for arm, deviation in off_limit(arms)
    ]
    notes += _limits(arms)
    notes += _without_limit(arms)
    lost = [arm for arm in arms if metric in arm.metrics and not is_number(arm.metrics[metric])]
    if lost:
        notes.append(
            f"{metric} is no number to average in {_named(map(label_of_arm, lost))}: left out of means and "
            "differences, which makes the method look better than it is."
        )
    bare = [arm for arm in arms if metric not in arm.metrics]
    if bare:
        notes.append(f"{metric} was not recorded in {_named(map(label_of_arm, bare))}: left out.")
    return [*notes, *_missing(cells), *_latencies(arms, cells)]


def _limits(arms: Sequence[Arm]) -> list[str]:
    """Arms of a network that might spend different amounts."""
    notes = []
    for network in dict.fromkeys(arm.network for arm in arms):
        limits = [arm.cost.limit for arm in arms if arm.network == network and arm.cost.limit is not None]
        if limits and max(limits) / min(limits) - 1 > TOLERANCE:
            notes.append(
                f"Not a fair comparison: the limits of {network}'s arms differ, from {min(limits):.4g} to "
                f"{max(limits):.4g} multiply-adds."
            )
    return notes


def _without_limit(arms: Sequence[Arm]) -> list[str]:
    bare = [arm for arm in arms if arm.cost.limit is None and arm.equal == "cost"]
    if not bare:
        return []
    return [f"Without a limit of cost, so nobody can check that it is equal: {_named(map(label_of_arm, bare))}."]


def _missing(cells: Sequence[Cell]) -> list[str]:
    """Seeds, and methods and budgets, that others have."""
    networks = list(dict.fromkeys(cell.network for cell in cells))
    notes = []
    every = {(cell.role is not None, cell.method, cell.budget): cell.name for cell in cells}
    for network in networks:
        own = [cell for cell in cells if cell.network == network]
        seeds = set().union(*({arm.seed for arm in cell.arms} for cell in own))
        short = [(cell.name, len(seeds) - len({arm.seed for arm in cell.arms})) for cell in own]
        lacking = [f"{name} ({number} of {len(seeds)})" for name, number in short if number]
        if lacking:
            notes.append(f"{network} is not complete: seeds are missing of {_named(lacking)}.")
        here = {(cell.role is not None, cell.method, cell.budget) for cell in own}
        absent = [name for key, name in every.items() if key not in here]
        if absent:
            notes.append(f"{network} lacks what other networks have: {_named(absent)}.")
    return notes


def _latencies(arms: Sequence[Arm], cells: Sequence[Cell]) -> list[str]:
    notes = []
    settings = sorted({settings_text(arm) for arm in arms if arm.latency is not None})
    if len(settings) > 1:
        notes.append(f"Latencies were measured in different ways ({'; '.join(settings)}): they do not compare.")
    if settings:
        bare = [f"{cell.network} {cell.name}" for cell in cells if place_of(cell, "latency") is None]
        if bare:
            notes.append(f"Latency was not measured of {_named(bare)}.")
    return notes


def settings_text(arm: Arm) -> str:
    """How an arm's latency was measured, in words."""
    own = arm.latency
    return "" if own is None else f"batches of {own.batch_size}, threads: {own.threads}, {own.device}"


def _named(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _signed(part: float) -> str:
    return f"{100 * part:+.2g} %" if abs(part) < 1 else f"{100 * part:+.0f} %"
