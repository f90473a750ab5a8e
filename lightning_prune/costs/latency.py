"""Measured latency of forward passes: of one model, and of two by turns."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.costs.timing import Interval, Timer, by_turns, check_measurable, ratio_of, samples
from lightning_prune.environment import describe_environment
from lightning_prune.errors import ConfigError, MeasurementError
from lightning_prune.running import call_model, copy_model, evaluation, map_tensors

BINS = 24
"""Equal bins of a histogram of samples."""


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass over the whole batch, in milliseconds.

    Attributes:
        median_ms: The median of the samples.
        q1_ms: Their lower quartile.
        q3_ms: Their upper quartile.
        samples: How many there are.
        calls: Forward passes in each (a sample is their mean).
        warm_up: Samples that were taken before and thrown away.
        batch_size: Of the inputs; None where they are no batch.
        environment: Device, threads, versions, load, and how the model ran (``dtype``, ``channels_last``,
            ``compiled``).
        histogram: ``counts`` of the samples between successive ``edges_ms``: up to :data:`BINS` equal bins from the
            fastest to the 95th percentile, and one for the slower ones; empty if unknown.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    samples: int
    calls: int
    warm_up: int
    batch_size: int | None
    environment: dict[str, Any] = field(default_factory=dict)
    histogram: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} ms (quartiles {self.q1_ms:.3f} to {self.q3_ms:.3f}, {self.samples} samples)"

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON content."""
        return asdict(self)


@dataclass(frozen=True)
class LatencyComparison:
    """Two models timed by turns, so that a machine that grows slower or faster weighs on both.

    Attributes:
        ratio: Latency of the second as a part of the first's: the median over pairs of samples taken side by side.
        low: Lower end of the ratio's 95 % interval.
        high: Its upper end.
        first: The first model's own figures. The ratio is not that of their medians, and is the one to quote.
        second: The second's.
    """

    ratio: float
    low: float
    high: float
    first: Latency
    second: Latency

    @property
    def speedup(self) -> float:
        """How many times faster the second is: ``1 / ratio``; its interval is ``1 / high`` to ``1 / low``."""
        return 1 / self.ratio

    @property
    def half_width(self) -> float:
        """The larger distance of an end of the interval from the ratio, as a part of it."""
        return Interval(self.ratio, self.low, self.high).half_width

    def __str__(self) -> str:
        return (
            f"{self.speedup:.2f} x as fast (95 % interval {1 / self.high:.2f} to {1 / self.low:.2f}), "
            f"latency kept {self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"
        )

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON content."""
        return asdict(self) | {"speedup": self.speedup}


@dataclass(frozen=True)
class RunAs:
    """How a model runs while it is timed; other than as it is, a copy of it does.

    Args:
        batch_size: Examples in the batch: inputs that share the first input's length are cut or repeated to it.
        device: Where it runs.
        dtype: Of floating weights and inputs.
        channels_last: Whether weights and inputs of four axes lie in memory with channels last.
        compiled: Whether ``torch.compile`` compiles it.

    Raises:
        ConfigError: A batch size under 1, or a device that is not there.
    """

    batch_size: int | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    channels_last: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: expected at least 1.")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"device={str(self.device)!r} is not there: {reason}") from error

    def model(self, model: nn.Module) -> nn.Module:
        """The model to run: the given one, or a copy that is cast, moved and laid out as asked."""
        if self.device is not None or self.dtype is not None or self.channels_last:
            model = copy_model(model).to(device=self.device, dtype=self.dtype)
            if self.channels_last:
                model = model.to(memory_format=torch.channels_last)
        if self.compiled:
            model = torch.compile(model)  # type: ignore[assignment]
        return model

    def inputs(self, example_inputs: Any) -> Any:
        """The inputs, likewise."""
        length = batch_length(example_inputs)

        def change(tensor: Tensor) -> Tensor:
            if self.batch_size is not None and length is not None and tensor.dim() and len(tensor) == length:
                tensor = tensor[torch.arange(self.batch_size, device=tensor.device) % length]
            tensor = tensor.detach().to(self.device, self.dtype if tensor.is_floating_point() else None)
            if self.channels_last and tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            return tensor.clone()

        return map_tensors(change, example_inputs)


def batch_length(example_inputs: Any) -> int | None:
    """Length of the first input tensor that has axes; None without one."""
    lengths: list[int] = []
    map_tensors(lambda t: lengths.append(len(t)) if t.dim() else None, example_inputs)
    return lengths[0] if lengths else None


@contextmanager
def _ready(model: nn.Module, example_inputs: Any, how: RunAs) -> Iterator[tuple[Timer, dict[str, Any]]]:
    """A timer of the model's forward pass, in evaluation and inference mode, and what to record of it."""
    model, inputs = how.model(model), how.inputs(example_inputs)
    tensors: list[Tensor] = []
    map_tensors(tensors.append, inputs)
    own = next(model.parameters(), tensors[0] if tensors else torch.empty(0))
    devices = [own.device.index or 0] if own.device.type == "cuda" else []
    facts = {
        "batch_size": batch_length(inputs),
        "dtype": str(own.dtype).removeprefix("torch."),
        "channels_last": how.channels_last,
        "compiled": how.compiled or hasattr(model, "_orig_mod"),
    }
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(evaluation(model, fast_path=True))
        stack.enter_context(torch.inference_mode())
        try:
            call_model(model, inputs)
        except Exception as error:
            hint = "torch.compile may have failed; " if how.compiled else ""
            raise MeasurementError(
                f"{type(model).__name__} cannot be run with these example inputs ({type(error).__name__}: {error}); "
                f"{hint}give a tuple of positional arguments, a dict of keyword arguments, or the single argument, on "
                "the model's device."
            ) from error
        yield Timer(lambda: call_model(model, inputs), own.device), facts


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    seconds: float = 1.0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    compiled: bool = False,
) -> Latency:
    """Measure how long a forward pass takes.

    The model runs in evaluation and inference mode. It is warmed up until times stop falling (:meth:`Timer.warm_up`);
    then samples are taken, each the mean of as many calls as fill a millisecond: by events on a CUDA device, else by
    the clock with the device synchronised. Modes and random-number state come back as they were.

    Args:
        model: Any module, also one that ``torch.compile`` made.
        example_inputs: A tuple holds positional arguments, a dict keyword arguments, anything else is one argument; on
            the model's device, or on any if ``device`` is given.
        seconds: How long to take samples, at least eleven.
        batch_size: Another batch size than the inputs'.
        device: Where to run, if not where the model is.
        dtype: Data type of weights and inputs, if another.
        channels_last: Lay images and their weights out with channels last.
        compiled: Compile the model by ``torch.compile``, once for this measurement.

    Returns:
        Median, quartiles, and what they were measured on.

    Raises:
        ConfigError: A device that is not there, or a batch size or duration out of range.
        MeasurementError: The model does not run with these inputs, or so fast that the call itself is what is timed.

    Example:
        >>> import torch
        >>> latency = measure_latency(torch.nn.Linear(256, 256), torch.zeros(64, 256), seconds=0.05)
        >>> latency.q1_ms <= latency.median_ms <= latency.q3_ms
        True
    """
    _check_seconds(seconds)
    how = RunAs(batch_size, device, dtype, channels_last, compiled)
    with _ready(model, example_inputs, how) as (timer, facts):
        warm_up = timer.warm_up()
        taken = samples(timer, seconds)
        check_measurable(taken, timer.device, type(model).__name__)
    return _latency(taken, timer, warm_up, facts, _environment(timer.device))


def compare_latency(
    first: nn.Module,
    second: nn.Module,
    example_inputs: Any,
    *,
    second_inputs: Any = None,
    seconds: float = 2.0,
    within: float | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    compiled: bool = False,
) -> LatencyComparison:
    """Time two models by turns; their ratio does not depend on how fast the machine happens to be.

    Samples are taken in pairs, first-second and second-first by turns; where a pass takes under 10 ms, a pair is that
    of the medians of five samples each, so that a process which takes the core for a moment weighs on neither. The
    ratio is the median over pairs, its interval by order statistics (95 %, no distribution assumed).

    Args:
        first: The model to compare with, such as the dense original.
        second: The other, such as the compact model.
        example_inputs: Inputs of both.
        second_inputs: Inputs of the second, if others.
        seconds: How long to take pairs, at least eleven.
        within: Stop earlier, once the interval reaches no further than this part of the ratio to either side.
        batch_size: See :func:`measure_latency`, as for all that follow.
        device: Where both run.
        dtype: Data type of both.
        channels_last: Of both.
        compiled: Compile both.

    Returns:
        The ratio second : first with its interval, and each model's own figures.

    Raises:
        ConfigError: As :func:`measure_latency`.
        MeasurementError: As :func:`measure_latency`.
    """
    _check_seconds(seconds)
    how = RunAs(batch_size, device, dtype, channels_last, compiled)
    others = example_inputs if second_inputs is None else second_inputs
    with ExitStack() as stack:
        a, facts_a = stack.enter_context(_ready(first, example_inputs, how))
        b, facts_b = stack.enter_context(_ready(second, others, how))
        warm = a.warm_up(), b.warm_up()
        pairs = by_turns(a, b, seconds, within)
        for taken, timer, model in zip(pairs, (a, b), (first, second), strict=True):
            check_measurable(taken, timer.device, type(model).__name__)
    interval = ratio_of(pairs)
    environment = _environment(a.device)
    return LatencyComparison(
        interval.median,
        interval.low,
        interval.high,
        _latency(pairs[0], a, warm[0], facts_a, environment),
        _latency(pairs[1], b, warm[1], facts_b, environment),
    )


def _latency(
    taken: list[float], timer: Timer, warm_up: int, facts: dict[str, Any], environment: dict[str, Any]
) -> Latency:
    q1, median, q3 = (float(v) * 1e3 for v in np.percentile(taken, [25, 50, 75]))
    facts = dict(facts)
    batch_size = facts.pop("batch_size")
    shape = histogram_of([1e3 * seconds for seconds in taken])
    return Latency(median, q1, q3, len(taken), timer.calls, warm_up, batch_size, environment | facts, shape)


def histogram_of(samples: Sequence[float]) -> dict[str, list[float]]:
    """Count samples by size; a few that are many times as slow have a bin of their own and do not hide the rest.

    Args:
        samples: Milliseconds, at least one.

    Returns:
        ``counts`` and the ``edges_ms`` around them, one more.
    """
    low, most, high = (float(v) for v in np.percentile(samples, [0, 95, 100]))
    edges = np.unique([*np.linspace(low, most, BINS + 1), high])
    counts, edges = np.histogram(samples, edges if len(edges) > 1 else 1)
    return {"counts": counts.tolist(), "edges_ms": edges.tolist()}


def _environment(device: torch.device) -> dict[str, Any]:
    extra: dict[str, Any] = {"load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}
    if device.type == "cuda":
        extra |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        extra["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return describe_environment(device) | extra


def _check_seconds(seconds: float) -> None:
    if not seconds > 0:
        raise ConfigError(f"seconds={seconds}: expected how long to take samples, more than 0.")
