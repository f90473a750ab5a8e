"""All that a report on a sweep says, worked out once for every form of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.record import Arm
from lightning_prune.reports.sweep.cells import ROLES, Cell, cells_of, metric_before
from lightning_prune.reports.sweep.fairness import fairness_of, notes_of
from lightning_prune.reports.sweep.verdicts import Difference, Score, differences_of, on_front, scores_of

COSTS: dict[str, str] = {"macs": "MACs kept", "nonzero_params": "parameters kept", "latency": "measured latency kept"}
"""What accuracy is drawn against."""


@dataclass(frozen=True)
class SweepResult:
    """All that a report on a sweep says.

    Attributes:
        metric: What the arms reached.
        before: The metric that was measured around the cut; None without one.
        arms: As read.
        cells: The arms over their seeds.
        differences: Of methods against controls.
        scores: Of methods against kinds of controls.
        fronts: ``{(network, quantity): indices of its cells}`` on the Pareto front.
        fairness: A sentence on equal costs.
        notes: What could not be read, and what does not compare.
    """

    metric: str
    before: str | None
    arms: tuple[Arm, ...]
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    scores: dict[str, dict[str, Score]]
    fronts: dict[tuple[str, str], set[int]]
    fairness: str
    notes: tuple[str, ...]

    @property
    def networks(self) -> dict[str, list[Cell]]:
        """Cells by network."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.network, []).append(cell)
        return found

    @property
    def roles(self) -> list[str]:
        """Kinds of controls that the sweep has."""
        return [role for role in ROLES if any(cell.role == role for cell in self.cells)]

    @property
    def scale(self) -> float:
        """100 where the metric is an accuracy or an error in [0, 1], which is shown in per cent."""
        known = [value for cell in self.cells for value in cell.metric.values()]
        named = any(word in self.metric.lower() for word in ("acc", "err"))
        return 100.0 if named and known and all(0 <= value <= 1 for value in known) else 1.0

    @property
    def unit(self) -> str:
        """``", %"`` where the metric is shown in per cent."""
        return ", %" if self.scale == 100 else ""


def analyse(arms: Sequence[Arm], metric: str, problems: Sequence[str] = ()) -> SweepResult:
    """Put arms together, compare them and see what does not compare.

    Args:
        arms: As of :func:`read_arms`.
        metric: One of their metrics.
        problems: What could not be read.
    """
    cells = cells_of(arms, metric)
    differences = differences_of(cells, metric)
    fronts: dict[tuple[str, str], set[int]] = {}
    for network in dict.fromkeys(cell.network for cell in cells):
        own = [cell for cell in cells if cell.network == network]
        fronts |= {(network, quantity): on_front(own, quantity, metric) for quantity in COSTS}
    return SweepResult(
        metric,
        metric_before(arms, metric),
        tuple(arms),
        tuple(cells),
        tuple(differences),
        scores_of(cells, differences),
        fronts,
        fairness_of(arms),
        (*problems, *notes_of(arms, cells, metric)),
    )
