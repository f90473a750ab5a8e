"""Records of many runs, grouped by method; each round's numbers with their mean and spread over the runs of a group."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.progress import progress
from lightning_prune.record import JSON_NAME, Round, RunRecord

QUANTITIES: dict[str, str] = {
    "weights": "weights left, % of prunable",
    "channels": "channels left, % of prunable",
    "blocks": "blocks left, % of those that can leave",
    "params": "parameters left, % of dense",
    "macs": "MACs left, % of dense",
    "latency_ms": "measured latency, ms",
    "theoretical_speedup": "theoretical speed-up (ratio of MACs)",
    "measured_speedup": "measured speed-up (ratio of latencies)",
    "seconds": "wall time of the round, s",
}
"""What a round may know beside its metric, with its unit and denominator. MACs leave out multiplications by 0."""

_NO_METHOD = ("seed", "dirpath", "verbose")
"""Hyper-parameters in which runs of one method may differ."""

MOST_SETTINGS = 4
"""Settings that a method's name shows."""


@dataclass(frozen=True)
class Spread:
    """Values of one quantity over runs.

    Attributes:
        mean: Their mean.
        low: The lowest.
        high: The highest.
        count: How many there are.
    """

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Of the finite ones of ``values``; None if there are none."""
        finite = [value for value in values if math.isfinite(value)]
        return cls(sum(finite) / len(finite), min(finite), max(finite), len(finite)) if finite else None


def spreads_of(values: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """The spread of each quantity; those without a finite value are left out."""
    spreads = {name: Spread.of(own) for name, own in values.items()}
    return {name: spread for name, spread in spreads.items() if spread is not None}


@dataclass(frozen=True)
class Point:
    """One round of a group: :data:`QUANTITIES` by name, and ``metric``; what no run knows is left out."""

    round: int
    values: Mapping[str, Spread]


@dataclass(frozen=True)
class Group:
    """Runs of one method on one network.

    Attributes:
        name: The method, with the hyper-parameters in which the groups of a report differ.
        runs: Its records.
        points: One for each round that any of them reached.
    """

    name: str
    runs: tuple[RunRecord, ...]
    points: tuple[Point, ...]

    @property
    def seeds(self) -> str:
        """The seeds, as text."""
        return ", ".join("none" if run.seed is None else str(run.seed) for run in self.runs)


def read_runs(paths: Sequence[str | Path], needed: bool = True) -> tuple[list[RunRecord], list[str]]:
    """Read every record under ``paths``: files, run folders, or folders of run folders.

    Args:
        paths: Where to look.
        needed: Whether there must be one.

    Returns:
        The records, and one message for each that could not be read.

    Raises:
        ConfigError: Nothing could be read, and something is needed.
    """
    runs, problems, files = [], [], []
    for path in map(Path, paths):
        inside = sorted(path.rglob(JSON_NAME)) if path.is_dir() and not (path / JSON_NAME).exists() else [path]
        if not inside:
            problems.append(f"{path} holds no {JSON_NAME}, nor does any folder in it.")
        files += inside
    with progress("records read", len(files)) as bar:
        for file in files:
            bar.advance()
            try:
                run = RunRecord.read(file)
            except FileFormatError as error:
                problems.append(str(error))
                continue
            if run.rounds:
                runs.append(run)
            else:
                problems.append(f"{file}: no round of this run has ended yet.")
    if not runs and needed:
        raise ConfigError("no runs to report on: " + " ".join(problems))
    return runs, problems


def choose_metric(runs: Sequence[RunRecord], wanted: str | None = None) -> str:
    """The metric to show: ``wanted``, else ``val_acc``, else what the runs monitor, else any that all of them have.

    Raises:
        ConfigError: ``wanted`` is in no run, or runs share no metric.
    """
    names = [set().union(*(row.metrics for row in run.rounds)) for run in runs]
    if wanted is not None:
        if not any(wanted in own for own in names):
            raise ConfigError(f"no run recorded metric {wanted!r}; recorded: {', '.join(sorted(set().union(*names)))}.")
        return wanted
    shared = set.intersection(*names)
    monitored = [row.best.get("monitor") for run in runs for row in run.rounds[:1] if row.best]
    for name in ("val_acc", *monitored):
        if name in shared:
            return str(name)
    if not shared:
        raise ConfigError("these runs share no metric: report on them apart, or name one of them with --metric.")
    return sorted(shared)[0]


def group_runs(runs: Sequence[RunRecord], metric: str) -> list[Group]:
    """Group runs that share method and network, and put rounds of the same index together.

    Args:
        runs: Records, as of :func:`read_runs`.
        metric: Which metric becomes ``metric`` of the points.
    """
    members: dict[str, list[RunRecord]] = {}
    for run in runs:
        members.setdefault(json.dumps(_identity(run), sort_keys=True), []).append(run)
    names = _names([own[0] for own in members.values()])
    return [Group(name, tuple(own), points_of(own, metric)) for name, own in zip(names, members.values(), strict=True)]


def points_of(runs: Sequence[RunRecord], metric: str) -> tuple[Point, ...]:
    """Every round's numbers over ``runs``."""
    points = []
    for number in range(max(len(run.rounds) for run in runs)):
        found: dict[str, list[float]] = {}
        for run in runs:
            if number < len(run.rounds):
                for name, value in _numbers(run, run.rounds[number], metric).items():
                    found.setdefault(name, []).append(value)
        points.append(Point(number, spreads_of(found)))
    return tuple(points)


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is a loss or an error."""
    return any(word in metric.lower() for word in ("loss", "err", "mse", "mae", "perplexity"))


def front(points: Sequence[tuple[float, float]], lower: bool = False, cost_rises: bool = True) -> list[int]:
    """The Pareto front: indices of points that no other one equals or beats in both numbers and beats in one.

    Args:
        points: Pairs (cost, metric).
        lower: Whether a lower metric is better.
        cost_rises: Whether a lower cost is better.
    """
    signed = [(x if cost_rises else -x, y if lower else -y) for x, y in points]
    order = sorted(range(len(points)), key=lambda i: signed[i])
    kept: list[int] = []
    for index in order:
        if not kept or signed[index][1] < signed[kept[-1]][1] or signed[index] == signed[kept[-1]]:
            kept.append(index)
    return kept


def _identity(run: RunRecord) -> dict[str, Any]:
    first = run.rounds[0]
    method = {
        name: {k: _setting(k, v) for k, v in given.items() if k not in _NO_METHOD} if isinstance(given, dict) else given
        for name, given in run.method.items()
    }
    task = {name: run.task[name] for name in ("data", "networks") if name in run.task}
    return method | {"network": {f"prunable {first.unit}": first.total} | task}


def _setting(name: str, value: Any) -> Any:
    """A hyper-parameter as far as it belongs to the method: each seed takes the masks of a run of its own."""
    return "another run" if name == "masks_from" and value is not None else value


def notes_on(groups: Sequence[Group]) -> list[str]:
    """What makes the methods of one report hard to compare: other data, other networks."""
    notes = []
    data = sorted({str(run.task["data"]) for group in groups for run in group.runs if "data" in run.task})
    if len(data) > 1:
        notes.append(f"Runs on different data stand side by side ({', '.join(data)}): their metrics do not compare.")
    networks = {(run.rounds[0].unit, run.rounds[0].total) for group in groups for run in group.runs}
    for unit in sorted({unit for unit, _ in networks}):
        totals = sorted(total for own, total in networks if own == unit)
        if len(totals) > 1:
            found = ", ".join(f"{total:,}" for total in totals)
            notes.append(
                f"Different networks stand in one chart: they have {found} prunable {unit}. Compare with care."
            )
    return notes


def _flat(content: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    return {
        (name, key): value for name, given in content.items() if isinstance(given, dict) for key, value in given.items()
    }


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """A name for the method of each run: its callbacks, and in what it differs from others of the same callbacks."""
    kinds = [" + ".join(run.method) or "no method" for run in runs]
    settings = [_flat(_identity(run)) for run in runs]
    names: list[str] = []
    for kind, own in zip(kinds, settings, strict=True):
        alike = [other for other_kind, other in zip(kinds, settings, strict=True) if other_kind == kind]
        shown = []
        for key, value in own.items():
            others = settings if key in (("network", "data"), ("network", "networks")) else alike
            if value is not None and any(other.get(key) != value for other in others):
                shown.append(f"{key[1]}={value}")
        if len(shown) > MOST_SETTINGS:
            shown = [*shown[:MOST_SETTINGS], "…"]
        name = f"{kind} ({', '.join(shown)})" if shown else kind
        names.append(name if name not in names else f"{name} #{sum(n.startswith(name) for n in names) + 1}")
    return names


def _numbers(run: RunRecord, row: Round, metric: str) -> dict[str, float]:
    """What one run knows of one round."""
    numbers = {row.unit: 100 * row.density}
    for name in ("params", "macs"):
        if name in row.costs and row.costs[name][1]:
            numbers[name] = 100 * row.costs[name][0] / row.costs[name][1]
    measured = _measured(run, row.round)
    for name in ("params", "macs"):
        now, whole = measured.get(f"num_{name}_nonzero"), measured.get(f"dense_{name}")
        if now is not None and whole:
            numbers[name] = 100 * now / whole
    numbers |= {n: measured[n] for n in ("latency_ms", "theoretical_speedup", "measured_speedup") if n in measured}
    seconds = run.timing["seconds"][row.round]
    if seconds is not None:
        numbers["seconds"] = seconds
    if metric in row.metrics:
        numbers["metric"] = row.metrics[metric]
    return numbers


def _measured(run: RunRecord, number: int) -> dict[str, float]:
    """The profiler's latest figures of a round; at round 0 the dense network's, which each measurement repeats."""
    if number == 0:
        first = run.costs[0] if run.costs else {}
        found: dict[str, Any] = {"dense_params": first.get("dense_params"), "dense_macs": first.get("dense_macs")}
        found |= {"num_params_nonzero": found["dense_params"], "num_macs_nonzero": found["dense_macs"]}
        comparison = first.get("comparison")
        times = comparison.get("first") if isinstance(comparison, dict) else first.get("latency")
        found["latency_ms"] = times.get("median_ms") if isinstance(times, dict) else None
    else:
        last: dict[str, Any] = next((row for row in reversed(run.costs) if row["round"] == number), {})
        numbers = last.get("numbers")
        found = dict(numbers) if isinstance(numbers, dict) else {}
        found |= {f"dense_{name}": last.get(f"dense_{name}") for name in ("params", "macs")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
