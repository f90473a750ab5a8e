"""Whether methods beat their controls, over seeds and over networks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.reports.rounds import Estimate
from lightning_prune.reports.runs import front, lower_is_better
from lightning_prune.reports.sweep.cells import ROLES, Cell, place_of

BEATS, WORSE, UNTOLD = "beats it", "does not beat it: worse", "cannot be told"
"""The 95 % interval of the difference lies on the better side of 0, on the worse side, or holds 0 (or is not known)."""


@dataclass(frozen=True)
class Difference:
    """Method minus control, seed by seed.

    Attributes:
        cell: The method at a budget.
        control: Its control.
        role: Which kind of control, of :data:`ROLES`.
        seeds: Which both have.
        mean: Mean difference of the metric over them.
        half_width: Half of its 95 % interval by Student's t; NaN for a single seed.
        verdict: :data:`BEATS`, :data:`WORSE` or :data:`UNTOLD`.
    """

    cell: Cell
    control: Cell
    role: str
    seeds: tuple[int, ...]
    mean: float
    half_width: float
    verdict: str

    @property
    def same_unit(self) -> bool:
        """Whether both budgets are fractions of the same thing; a control without a budget has none that differs."""
        return self.control.budget_on in (None, self.cell.budget_on)


@dataclass(frozen=True)
class Score:
    """How often a method beat a control, over networks and budgets.

    Attributes:
        beats: Comparisons that it won.
        worse: Comparisons that it lost.
        untold: Comparisons that the seeds do not decide.
        missing: Networks and budgets without such a control, or without a seed in common.
        unlike: Comparisons in which the budgets count different things, such as parameters against MACs.
    """

    beats: int = 0
    worse: int = 0
    untold: int = 0
    missing: int = 0
    unlike: int = 0

    @property
    def told(self) -> int:
        """Comparisons that there were."""
        return self.beats + self.worse + self.untold


def verdict_of(mean: float, half_width: float, lower: bool = False) -> str:
    """What a difference with its interval says.

    Args:
        mean: Method minus control.
        half_width: Half of the interval; NaN where there is none.
        lower: Whether a lower metric is better.
    """
    better = -mean if lower else mean
    if math.isnan(half_width):
        return UNTOLD
    return BEATS if better - half_width > 0 else WORSE if better + half_width < 0 else UNTOLD


def differences_of(cells: Sequence[Cell], metric: str) -> list[Difference]:
    """Each method at each budget against each kind of control of its network, paired by seed.

    The control has the same budget, or none. Of several, it is the one that took its shape from the method itself, else
    the one that is nearest in what the method's budget counts.
    """
    found = []
    for cell in cells:
        if cell.role is not None:
            continue
        for role in ROLES:
            control = control_of(cell, role, cells)
            difference = None if control is None else compare(cell, control, role, metric)
            if difference is not None:
                found.append(difference)
    return found


def control_of(cell: Cell, role: str, cells: Sequence[Cell]) -> Cell | None:
    """The control of a kind for a method at a budget; see :func:`differences_of`."""
    there = [
        own for own in cells if own.network == cell.network and own.role == role and own.budget in (None, cell.budget)
    ]
    own_shape = [own for own in there if own.of == cell.method]
    counted = "nonzero_params" if cell.budget_on == "params" else "macs"

    def distance(own: Cell) -> tuple[float, str]:
        return abs(own.values[counted].mean - cell.values[counted].mean), own.method

    return min(own_shape or there, key=distance, default=None)


def compare(cell: Cell, control: Cell, role: str, metric: str) -> Difference | None:
    """The paired difference; None without a seed that both have."""
    seeds = tuple(sorted(cell.metric.keys() & control.metric.keys()))
    if not seeds:
        return None
    own = Estimate.of([cell.metric[seed] - control.metric[seed] for seed in seeds])
    verdict = verdict_of(own.mean, own.half_width, lower_is_better(metric))
    return Difference(cell, control, role, seeds, own.mean, own.half_width, verdict)


def scores_of(cells: Sequence[Cell], differences: Sequence[Difference]) -> dict[str, dict[str, Score]]:
    """``{method: {kind of control: its score}}`` over networks and budgets; kinds that the sweep lacks are left out."""
    roles = [role for role in ROLES if any(cell.role == role for cell in cells)]
    known = {(id(own.cell), own.role): own for own in differences}
    scores: dict[str, dict[str, Score]] = {}
    for method in dict.fromkeys(cell.method for cell in cells if cell.role is None):
        own = [cell for cell in cells if cell.role is None and cell.method == method]
        for role in roles:
            there = [known[id(cell), role] for cell in own if (id(cell), role) in known]
            said = [one.verdict for one in there]
            scores.setdefault(method, {})[role] = Score(
                said.count(BEATS),
                said.count(WORSE),
                said.count(UNTOLD),
                len(own) - len(there),
                sum(not one.same_unit for one in there),
            )
    return scores


def sentence_of(method: str, role: str, score: Score) -> str:
    """A method's score against a kind of control, in words."""
    control = f"its control ({ROLES[role]})"
    if not score.told:
        return f"{method} has no such control ({ROLES[role]})."
    alone = score.told == 1
    times = "the only comparison" if alone else f"{score.told} comparisons"
    unlike = f"; budgets count different things in {score.unlike}" if score.unlike else ""
    rest = f" (worse in {score.worse}, cannot be told in {score.untold}{unlike})."
    if score.beats:
        return f"{method} beats {control} in {times if alone else f'{score.beats} of {times}'}{rest}"
    of = times if alone else f"any of {times}"
    if score.worse:
        return f"{method} does not beat {control} in {of}{rest}"
    return f"{method} is not shown to beat {control} in {of}{rest}"


def on_front(cells: Sequence[Cell], quantity: str, metric: str) -> set[int]:
    """Which of a network's cells lie on the Pareto front of means: no other costs as little and reaches as much.

    Args:
        cells: Of one network, controls among them.
        quantity: What it costs: a name in ``values``.
        metric: What it reaches.

    Returns:
        Indices of cells that have both.
    """
    known = [i for i, cell in enumerate(cells) if place_of(cell, quantity) is not None and "metric" in cell.values]
    pairs = [(float(place_of(cells[i], quantity) or 0.0), cells[i].values["metric"].mean) for i in known]
    return {known[i] for i in front(pairs, lower_is_better(metric))}
