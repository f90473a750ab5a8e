"""Budgets on measured latency: compact candidates are built and timed beside the original until one meets it."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.costs.latency import LatencyComparison, compare_latency
from lightning_prune.errors import BudgetError, NoEffectWarning
from lightning_prune.progress import progress
from lightning_prune.running import copy_model

WITHIN = 0.05
"""How far from the target the whole 95 % interval of the result may reach, as a part of the target."""

MOST_TRIALS = 14
_NEAR = 0.04
_LEAST_MACS = 1e-3
_NANOSECONDS = 1e6


@dataclass
class _Trial:
    """A candidate with the MACs asked for and its measured latency."""

    fraction: float
    plan: RemovalPlan
    found: LatencyComparison

    def off(self, target: float) -> float:
        """How far the farther end of the interval is from the target, as a part of it."""
        return max(self.found.high / target - 1, 1 - self.found.low / target)


@dataclass
class _Search:
    model: nn.Module
    example_inputs: Any
    target: float
    plan_at: Callable[[float], RemovalPlan]
    seconds: float
    trials: list[_Trial] = field(default_factory=list)

    def measure(self, plan: RemovalPlan, seconds: float, within: float) -> LatencyComparison:
        small = copy_model(self.model)
        plan.apply_(small)
        return compare_latency(self.model, small, self.example_inputs, seconds=seconds, within=within)

    def run(self) -> _Trial:
        """Time candidates until one's interval lies within 5 % of the target; the nearest if none does.

        Raises:
            BudgetError: The narrowest network is slower than the target.
        """
        least = self.least()
        over, under = (1.0, 1.0), None  # (MACs, latency) of the nearest candidates on both sides of the target
        guess = max(self.target, least)
        with progress("latency search, candidates at most", MOST_TRIALS) as bar:
            for turn in range(MOST_TRIALS):
                trial = self.try_at(guess)
                bar.advance()
                if trial is None:  # the widths of an earlier candidate
                    if under is not None or guess <= least:
                        break
                    guess = max(0.85 * guess, least)
                    continue
                if trial.off(self.target) <= WITHIN:
                    break
                point = trial.fraction, trial.found.ratio
                if point[1] <= self.target:
                    under = point
                else:
                    over = point
                    if guess <= least:
                        self.refuse(trial)
                        break
                guess = max(_next_guess(over, under, self.target, middle=turn % 2 == 1), least)
        return min(self.trials, key=lambda trial: trial.off(self.target))

    def try_at(self, fraction: float) -> _Trial | None:
        """Time the candidate that keeps so many of the MACs, longer if it is near; None if it was timed before."""
        plan = self.plan_at(fraction)
        if any(plan.keep == trial.plan.keep for trial in self.trials):
            return None
        trial = _Trial(fraction, plan, self.measure(plan, self.seconds, _NEAR / 2))
        self.trials.append(trial)
        if abs(trial.found.ratio / self.target - 1) <= _NEAR:
            trial.found = self.measure(plan, 4 * self.seconds, _NEAR / 4)  # anew: a lucky figure is not kept
        return trial

    def least(self) -> float:
        """The least part of the MACs for which there is a plan, to a hundredth."""
        low, high = 0.0, 1.0
        while high - low > 0.01:
            middle = max((low + high) / 2, _LEAST_MACS)
            try:
                self.plan_at(middle)
                high = middle
            except BudgetError:
                low = middle
        return high

    def refuse(self, narrowest: _Trial) -> None:
        """Say what the floor is, unless the narrowest network is near enough to the target."""
        found = self.measure(narrowest.plan, 4 * self.seconds, _NEAR / 4)
        narrowest.found = found
        if found.low > self.target:
            raise BudgetError(
                f"Budget(latency={self.target}) cannot be met: with every group at its narrowest the network still "
                f"takes {found.ratio:.3f} of the original's time (95 % interval {found.low:.3f} to {found.high:.3f}), "
                f"at {narrowest.fraction:.3f} of its MACs. Raise the budget, or lower min_channels, round_to or what "
                "else holds widths."
            )


def _next_guess(over: tuple[float, float], under: tuple[float, float] | None, target: float, middle: bool) -> float:
    """The MACs to try next: on the line through what was measured.

    Between candidates on both sides every second guess is the middle: a curve with a step would be crept along.
    """
    if under is None:
        slope = max((1 - over[1]) / max(1 - over[0], 1e-9), 0.1)
        return min(1 - (1 - target) / slope, 0.9 * over[0])
    part = 0.5 if middle else (over[1] - target) / max(over[1] - under[1], 1e-9)
    return over[0] + min(max(part, 0.1), 0.9) * (under[0] - over[0])


def plan_latency(
    model: nn.Module, example_inputs: Any, target: float, plan_at: Callable[[float], RemovalPlan], seconds: float = 2.0
) -> RemovalPlan:
    """Find the plan after which a forward pass takes a part of the original's time, as measured.

    Candidates keep more or fewer MACs; each is built and timed by turns with the original, on the device where the
    model is. Interpolation chooses the next. The result is measured anew, for longer.

    Args:
        model: The traced model.
        example_inputs: Its inputs, at the batch size that matters.
        target: Part of the original's latency that is kept, in (0, 1].
        plan_at: The plan that keeps a part of the MACs.
        seconds: How long a candidate is timed; the one that is taken four times as long.

    Returns:
        The plan. ``latency`` says what was measured, ``costs["latency"]`` holds nanoseconds before and after.

    Raises:
        BudgetError: The narrowest network takes longer; the message holds its measured floor.
        MeasurementError: The model is so fast that it cannot be timed.
    """
    begin = time.monotonic()
    search = _Search(model, example_inputs, target, plan_at, seconds)
    best = search.run()
    found = best.found
    if best.off(target) > WITHIN:
        warnings.warn(
            f"Budget(latency={target}): the nearest of {len(search.trials)} candidates takes {found.ratio:.3f} of the "
            f"original's time (95 % interval {found.low:.3f} to {found.high:.3f}), which is not within {WITHIN:.0%} of "
            "the target: the machine is too busy to tell, or widths lie too far apart (round_to).",
            NoEffectWarning,
            stacklevel=3,
        )
    before = max(1, round(found.first.median_ms * _NANOSECONDS))
    best.plan.costs["latency"] = (before, round(before * found.ratio))
    best.plan.latency = {
        "target": target,
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
        "macs": best.fraction,
        "trials": [{"macs": t.fraction, "ratio": t.found.ratio} for t in search.trials],
        "search_seconds": time.monotonic() - begin,
        "environment": found.second.environment,
    }
    return best.plan
