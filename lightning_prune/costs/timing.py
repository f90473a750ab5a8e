"""Timing forward passes: clocks of devices, warm-up, samples, quartiles and the interval of a median."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from lightning_prune.errors import MeasurementError

SAMPLE_SECONDS = 1e-3
MOST_CALLS = 100_000
WINDOW, SHORT_WINDOW = 5, 2
SLOW_SECONDS = 0.05
STEADY = 0.95
MOST_WINDOWS = 20
FEWEST_SAMPLES = 11
MOST_SAMPLES = 10_000
EMPTY_CALLS = 3.0
REPEATS = 5
QUICK_SECONDS = 0.01


class Timer:
    """Calls a function and says how long a call took.

    A sample is the mean of as many calls as fill a millisecond. On a GPU the time is between two events on the current
    stream; elsewhere it is the wall clock's, the device synchronised.

    Args:
        call: What to time; it takes no arguments.
        device: Where its work is done.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call = call
        self.device = device
        self.calls = 1

    def sample(self) -> float:
        """Seconds that a call takes, once."""
        if self.device.type == "cuda":
            return self._by_events() / self.calls
        _synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        _synchronize(self.device)
        return (time.perf_counter() - start) / self.calls

    def _by_events(self) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(self.calls):
                self.call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

    def warm_up(self) -> int:
        """Call until times stop falling: the median of five samples is at least 95 % of that of the five before.

        Of two samples, where one takes over 50 ms. At most twenty times: on a machine whose speed wanders, the next
        samples may always be faster.

        Returns:
            Samples taken.
        """
        self.sample()  # compiles, allocates, chooses kernels
        first = min(self.sample() for _ in range(2))
        self.calls = max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(first, 1e-9))))
        size = WINDOW if first < SLOW_SECONDS else SHORT_WINDOW
        before, windows = math.inf, 0
        for _ in range(MOST_WINDOWS):
            windows += 1
            median = float(np.median([self.sample() for _ in range(size)]))
            if median >= STEADY * before:
                break
            before = median
        return windows * size + 3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def samples(timer: Timer, seconds: float) -> list[float]:
    """Samples of a warm timer for about so many seconds, at least eleven."""
    taken: list[float] = []
    end = time.monotonic() + seconds
    while len(taken) < FEWEST_SAMPLES or (time.monotonic() < end and len(taken) < MOST_SAMPLES):
        taken.append(timer.sample())
    return taken


@cache
def empty_call(device: torch.device) -> float:
    """Seconds that calling a module that does nothing takes: what lies near it is no latency of a network."""
    module, x = torch.nn.Identity(), torch.zeros(1, device=device)
    timer = Timer(lambda: module(x), device)
    timer.calls = 1000
    return min(timer.sample() for _ in range(10))


def check_measurable(taken: Sequence[float], device: torch.device, what: str) -> None:
    """Refuse times that are mostly those of the call itself.

    Raises:
        MeasurementError: The median is under three times that of an empty module's call.
    """
    median, floor = float(np.median(taken)), empty_call(device)
    if median < EMPTY_CALLS * floor:
        raise MeasurementError(
            f"{what} takes {1e6 * median:.2f} us a call, calling a module that does nothing {1e6 * floor:.2f} us: "
            "that is too small to time. Give a larger batch or a larger network."
        )


@dataclass(frozen=True)
class Interval:
    """A median with an interval that holds the true one with 95 % confidence, whatever the distribution."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """From at least six independent values, by order statistics (binomial)."""
        from scipy.stats import binom

        ordered = np.sort(np.asarray(values, dtype=float))
        rank = max(int(binom.ppf(0.025, len(ordered), 0.5)), 1)  # P(fewer than rank values lie below) <= 0.025
        return cls(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[len(ordered) - rank]))

    @property
    def half_width(self) -> float:
        """The larger distance of an end from the median, as a part of the median."""
        return max(self.high - self.median, self.median - self.low) / self.median


def by_turns(a: Timer, b: Timer, seconds: float, within: float | None = None) -> tuple[list[float], list[float]]:
    """Samples of two warm timers in pairs, a-b and b-a by turns, at least eleven; see :func:`compare_latency`."""
    pairs: tuple[list[float], list[float]] = ([], [])
    repeats = REPEATS if max(a.sample() * a.calls, b.sample() * b.calls) < QUICK_SECONDS else 1
    end = time.monotonic() + seconds
    while len(pairs[0]) < FEWEST_SAMPLES or (time.monotonic() < end and len(pairs[0]) < MOST_SAMPLES):
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            order = (0, 1) if (len(pairs[0]) + len(taken[0])) % 2 == 0 else (1, 0)
            for which in order:
                taken[which].append((a, b)[which].sample())
        for values, found in zip(pairs, taken, strict=True):
            values.append(float(np.median(found)))
        # looked at now and then only, since stopping at the first good look would favour narrow accidents
        if within is not None and len(pairs[0]) % 16 == 0 and ratio_of(pairs).half_width <= within:
            break
    return pairs


def ratio_of(pairs: tuple[Sequence[float], Sequence[float]]) -> Interval:
    """The second's time as a part of the first's: median over pairs, with its interval."""
    return Interval.of([b / a for a, b in zip(*pairs, strict=True)])
