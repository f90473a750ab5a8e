"""Arms of a sweep, read and put together over their seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.progress import progress
from lightning_prune.record import ARM_NAME, Arm
from lightning_prune.record.arm import KEPT
from lightning_prune.reports.runs import Spread, spreads_of

ROLES: dict[str, str] = {
    "scratch_cost": "from scratch, equal cost",
    "scratch_steps": "from scratch, equal steps",
    "narrowed_cost": "narrowed, equal cost",
    "narrowed_steps": "narrowed, equal steps",
    "dense": "dense, trained as long",
    "continued": "dense, trained on without a cut",
}
"""The controls, with their names in words."""
WHOLE = ("dense", "continued", "rounds")
"""Kinds of arms that may run every operation of the dense network."""

LARGEST = 1e100


@dataclass(frozen=True)
class Cell:
    """The arms of one network, method and budget, one a seed.

    Attributes:
        network: Its name.
        method: Its name.
        kind: One of the kinds of :class:`Arm`.
        role: Which control it is, of :data:`ROLES`; None for a method.
        budget: What was to be kept, as a fraction; None where nothing is removed.
        budget_on: What the budget is a fraction of.
        of: The method whose compact network gives the shape of a control.
        arms: By seed.
        metric: What each seed reached, by seed; finite values only.
        values: Over the seeds: ``metric``; ``before`` and ``after_cut`` (metrics, see :func:`metric_before`); ``macs``,
            ``params``, ``nonzero_params``, ``nonzero_macs`` and ``latency`` as fractions of the dense network's;
            ``cost`` as a multiple of the dense arm's; ``seconds``. What no seed knows is left out.
        latency_range: From the lowest to the highest end of the seeds' intervals.
    """

    network: str
    method: str
    kind: str
    role: str | None
    budget: float | None
    budget_on: str | None
    of: str | None
    arms: tuple[Arm, ...]
    metric: Mapping[int, float]
    values: Mapping[str, Spread]
    latency_range: tuple[float, float] | None = None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the metric over seeds (with ``n - 1``); None for a single seed."""
        return float(np.std(list(self.metric.values()), ddof=1)) if len(self.metric) > 1 else None

    @property
    def is_whole(self) -> bool:
        """Whether its latency is the dense network's by construction: every operation is left, and none was timed."""
        return self.kind in WHOLE and self.latency_range is None and all(a.kept["macs"] == 1 for a in self.arms)

    @property
    def name(self) -> str:
        """Method and budget in words."""
        return self.method if self.budget is None else f"{self.method}, {budget_text(self)}"


def budget_text(cell: Cell) -> str:
    """``"50 % of MACs"``; a dash without a budget."""
    if cell.budget is None:
        return "–"
    unit = {"macs": "MACs", "params": "parameters"}.get(str(cell.budget_on), str(cell.budget_on))
    return f"{100 * cell.budget:.4g} % of {unit}"


def place_of(cell: Cell, quantity: str) -> float | None:
    """A cell's mean of a quantity; a network with all its operations has the dense latency without being timed."""
    if quantity == "latency" and cell.is_whole:
        return 1.0
    return cell.values[quantity].mean if quantity in cell.values else None


def read_arms(folder: str | Path) -> tuple[list[Arm], list[str]]:
    """Read every ``arm.json`` under a folder.

    Returns:
        The arms by network, method, budget and seed, each once; one message for each that was left out.

    Raises:
        ConfigError: There is none that can be read.
    """
    folder, problems = Path(folder), []
    found: dict[tuple[object, ...], Arm] = {}
    files = sorted(folder.rglob(ARM_NAME)) if folder.is_dir() else []
    with progress("arms read", len(files)) as bar:
        for file in files:
            bar.advance()
            try:
                arm = Arm.read(file)
            except FileFormatError as error:
                problems.append(f"Left out: {error}")
                continue
            first = found.setdefault((*_identity(arm), arm.seed), arm)
            if first is not arm:
                problems.append(f"Left out: {file} is the same arm, seed {arm.seed}, as {first.folder}.")
    if not found:
        why = " ".join(problems) or f"no folder in it holds an {ARM_NAME}."
        raise ConfigError(f"{folder}: no arms of a sweep to report on: {why}")
    return sorted(found.values(), key=lambda arm: (*_order(arm), arm.seed)), problems


def choose_metric(arms: Sequence[Arm], wanted: str | None = None) -> str:
    """The metric to show: ``wanted``, else ``test_acc``, ``val_acc`` or any that all arms have.

    Raises:
        ConfigError: No arm has ``wanted``, or arms share no metric.
    """
    names = [set(arm.metrics) for arm in arms]
    if wanted is not None:
        if not any(wanted in own for own in names):
            there = ", ".join(sorted(set().union(*names))) or "none"
            raise ConfigError(f"no arm recorded metric {wanted!r}; recorded: {there}.")
        return wanted
    shared = set.intersection(*names)
    for name in ("test_acc", "val_acc", *sorted(shared)):
        if name in shared:
            return name
    raise ConfigError("these arms share no metric: name one of them with --metric.")


def metric_before(arms: Sequence[Arm], metric: str) -> str | None:
    """The metric that arms recorded around their cut: ``metric``, or the same on validation data; None without one."""
    known = {name for arm in arms for found in (arm.before, arm.after_cut) if found is not None for name in found}
    validation = f"val_{metric.partition('_')[2]}"
    return next((name for name in (metric, validation) if name in known), None)


def cells_of(arms: Sequence[Arm], metric: str) -> list[Cell]:
    """Put the seeds of each network, method and budget together; networks by name, methods before controls.

    Args:
        arms: As of :func:`read_arms`.
        metric: One of their metrics.
    """
    members: dict[tuple[object, ...], list[Arm]] = {}
    for arm in sorted(arms, key=lambda arm: (*_order(arm), arm.seed)):
        members.setdefault(_identity(arm), []).append(arm)
    dense: dict[str, list[float]] = {}
    for arm in arms:
        if arm.kind == "dense":
            dense.setdefault(arm.network, []).append(arm.cost.macs)
    before = metric_before(arms, metric)
    return [_cell(own, metric, before, dense.get(own[0].network, [])) for own in members.values()]


def role_of(arm: Arm) -> str | None:
    """Which control an arm is, of :data:`ROLES`; None for a method."""
    if arm.kind in ("cut", "rounds"):
        return None
    return arm.kind if arm.kind in ROLES else f"{arm.kind}_{arm.equal}"


def is_number(value: float) -> bool:
    """Whether a metric can be averaged: finite, and not so large that a sum of some is not."""
    return abs(value) < LARGEST


def _identity(arm: Arm) -> tuple[object, ...]:
    return arm.network, arm.method, arm.kind, arm.equal, arm.of, arm.budget, arm.budget_on


def _order(arm: Arm) -> tuple[object, ...]:
    role = role_of(arm)
    number = -1 if role is None else list(ROLES).index(role)
    rest = arm.kind, arm.equal, arm.of or "", -(arm.budget or 0.0), arm.budget_on or ""
    return arm.network, number, arm.method, *rest


def _cell(arms: Sequence[Arm], metric: str, before: str | None, dense: Sequence[float]) -> Cell:
    first = arms[0]
    reached = {arm.seed: arm.metrics[metric] for arm in arms if is_number(arm.metrics.get(metric, math.nan))}
    measured = [arm.latency for arm in arms if arm.latency is not None]
    found: dict[str, list[float]] = {name: [arm.kept[name] for arm in arms] for name in KEPT}
    found |= {"metric": list(reached.values()), "latency": [latency.ratio for latency in measured]}
    for name in ("before", "after_cut"):
        values = [getattr(arm, name) or {} for arm in arms]
        found[name] = [own[before] for own in values if before in own and is_number(own[before])]
    found["seconds"] = [arm.cost.seconds for arm in arms]
    whole = float(np.mean(dense)) if dense else 0.0
    found["cost"] = [arm.cost.macs / whole for arm in arms] if whole else []
    return Cell(
        first.network,
        first.method,
        first.kind,
        role_of(first),
        first.budget,
        first.budget_on,
        first.of,
        tuple(arms),
        reached,
        spreads_of(found),
        (min(own.low for own in measured), max(own.high for own in measured)) if measured else None,
    )
