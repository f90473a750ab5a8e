"""Rounds of several seeds as one table: what pruning cost and gained, with its uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_prune.errors import ConfigError
from lightning_prune.record import Round, RunRecord


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half-width of its 95 % confidence interval (Student's t).

    Args:
        mean: The mean.
        half_width: Half the interval's width; NaN for a single seed.
    """

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Mean and interval of ``values``, one of each seed."""
        from scipy import stats

        data = np.asarray(values, dtype=float)
        if len(data) < 2:
            return cls(float(data.mean()), float("nan"))
        half = stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / np.sqrt(len(data))
        return cls(float(data.mean()), float(half))

    def text(self, scale: float = 1.0, digits: int = 2, sign: bool = False) -> str:
        """``mean ± half-width``, both times ``scale``."""
        mean = f"{self.mean * scale:{'+' if sign else ''}.{digits}f}"
        return mean if np.isnan(self.half_width) else f"{mean} ± {self.half_width * scale:.{digits}f}"


def rounds_table(
    runs: Sequence[RunRecord], metric: str, controls: Sequence[RunRecord] = (), per_cent: bool = True
) -> str:
    """A Markdown table with one row a round.

    Columns: weights left; the metric at the round's end; the same at its best step (by the run's monitored validation
    value); that step; both differences against round 0 of the same seed, paired; with controls, the control's metric
    at its best step and the paired difference run - control.

    Args:
        runs: Records that differ in their seed, of equally many rounds.
        metric: Recorded at every validation, such as ``"watch_test_acc"``.
        controls: Records of a control, by the same seeds in the same order.
        per_cent: The metric is a fraction; show points of it.

    Raises:
        ConfigError: No runs, unequal rounds, or a metric that was not recorded.
    """
    if not runs:
        raise ConfigError("no runs to make a table of.")
    if controls and len(controls) != len(runs):
        raise ConfigError(f"{len(runs)} runs and {len(controls)} controls: expected a control of each seed.")
    lengths = {len(run.rounds) for run in [*runs, *controls]}
    if len(lengths) != 1:
        raise ConfigError(f"runs of {sorted(lengths)} rounds do not fit one table; finish or resume the shorter ones.")
    scale = 100.0 if per_cent else 1.0
    head = ["round", "weights left", "at the end", "at the best step", "best step", "end - dense", "best - dense"]
    head += ["control, best step", "ticket - control"] if controls else []
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    dense = [run.rounds[0] for run in runs]
    for number in range(lengths.pop()):
        rows = [run.rounds[number] for run in runs]
        end, best = [_end(row, metric) for row in rows], [_best(row, metric) for row in rows]
        cells = [str(number), f"{100 * rows[0].density:.2f} %"]
        cells += [Estimate.of(end).text(scale), Estimate.of(best).text(scale)]
        cells.append(f"{np.mean([row.best['step'] for row in rows if row.best]):,.0f}")
        if number:
            for now, before in ((end, [_end(d, metric) for d in dense]), (best, [_best(d, metric) for d in dense])):
                cells.append(Estimate.of(np.subtract(now, before).tolist()).text(scale, sign=True))
        else:
            cells += ["", ""]
        if controls:
            other = [_best(control.rounds[number], metric) for control in controls]
            cells.append(Estimate.of(other).text(scale))
            cells.append(Estimate.of(np.subtract(best, other).tolist()).text(scale, sign=True) if number else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _end(row: Round, metric: str) -> float:
    return _value(row.metrics, metric, row)


def _best(row: Round, metric: str) -> float:
    if row.best is None:
        raise ConfigError(f"round {row.round} has no best step: the run monitored no metric (monitor=...).")
    return _value(row.best["metrics"], metric, row)


def _value(metrics: object, metric: str, row: Round) -> float:
    assert isinstance(metrics, dict)
    if metric not in metrics:
        raise ConfigError(f"metric {metric!r} was not recorded in round {row.round}; recorded: {', '.join(metrics)}.")
    return float(metrics[metric])
