"""What a network costs beside the dense one it came from: theoretical and measured speed-up, never mixed up."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.costs.flops import Costs, Count, count_costs
from lightning_prune.costs.latency import Latency, LatencyComparison, compare_latency, measure_latency

HEADER = (
    f"{'':>8}  {'params':>8}  {'not 0':>8}  {'MACs':>8}  {'not by 0':>8}  {'theoretical':>11}  "
    f"{'measured (95 % interval)':>26}  {'latency':>11}"
)


@dataclass(frozen=True)
class Savings:
    """Counts of a network and of the dense one, and their latencies measured by turns.

    Attributes:
        params: Parameters now; ``nonzero``: those that are not 0.
        macs: Multiply-adds at the example inputs; ``nonzero``: those that remain if zeros are skipped.
        dense_params: Parameters of the dense network.
        dense_macs: Its multiply-adds.
        latency: Measured now; None where no latency was asked for.
        comparison: Dense and now, by turns; None for the dense network itself.
        incomplete: Operations that ``macs`` lacks; see :class:`Costs`.
    """

    params: Count
    macs: Count
    dense_params: int
    dense_macs: int
    latency: Latency | None = None
    comparison: LatencyComparison | None = None
    incomplete: tuple[str, ...] = ()

    @property
    def theoretical_speedup(self) -> float:
        """Multiply-adds of the dense network over those left if zeros are skipped: what no clock has seen."""
        return self.dense_macs / max(self.macs.nonzero, 1)

    @property
    def measured_speedup(self) -> float | None:
        """Latency of the dense network over that of this one; 1 for the dense network itself, None if not measured."""
        if self.comparison is not None:
            return self.comparison.speedup
        return None if self.latency is None else 1.0

    def text(self, label: str) -> str:
        """One line under :data:`HEADER`; fractions are of the dense network."""
        params, macs = max(self.dense_params, 1), max(self.dense_macs, 1)
        measured, latency = "-", "-"
        if self.measured_speedup is not None and self.latency is not None:
            measured = f"{self.measured_speedup:.2f} x"
            latency = f"{self.latency.median_ms:.3f} ms"
        if self.comparison is not None:
            measured += f" ({1 / self.comparison.high:.2f} to {1 / self.comparison.low:.2f})"
        parts = [self.params.total / params, self.params.nonzero / params]
        parts += [self.macs.total / macs, self.macs.nonzero / macs]
        shown = "  ".join(f"{100 * part:>6.1f} %" for part in parts)
        return f"{label:>8}  {shown}  {self.theoretical_speedup:>9.2f} x  {measured:>26}  {latency:>11}"

    def numbers(self) -> dict[str, float]:
        """The figures by name, for loggers; what was not measured is left out."""
        found: dict[str, float | None] = {
            "num_params": self.params.total,
            "num_params_nonzero": self.params.nonzero,
            "num_macs": self.macs.total,
            "num_macs_nonzero": self.macs.nonzero,
            "theoretical_speedup": self.theoretical_speedup,
            "measured_speedup": self.measured_speedup,
            "measured_speedup_low": None if self.comparison is None else 1 / self.comparison.high,
            "measured_speedup_high": None if self.comparison is None else 1 / self.comparison.low,
            "latency_ms": None if self.latency is None else self.latency.median_ms,
        }
        return {name: float(value) for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON content; ``numbers`` stand in it for readers without this library."""
        content = asdict(self) | {"params": self.params._asdict(), "macs": self.macs._asdict()}
        return content | {"incomplete": list(self.incomplete), "numbers": self.numbers()}


def measure_savings(
    model: nn.Module,
    example_inputs: Any,
    dense: nn.Module | None = None,
    dense_costs: Costs | None = None,
    masks: Mapping[str, Tensor] | None = None,
    *,
    latency: bool = True,
    **options: Any,
) -> Savings:
    """Count and time a network beside the dense one.

    Args:
        model: The network.
        example_inputs: Inputs of both.
        dense: What it came from; None: ``model`` is the dense network.
        dense_costs: Its costs, where they are known; else they are counted.
        masks: Masks under which ``model`` is counted; see :func:`count_costs`.
        latency: Whether to measure latency.
        options: Of :func:`compare_latency`, or of :func:`measure_latency` without ``dense``.

    Returns:
        The savings.

    Raises:
        MeasurementError: One of them cannot be run or timed.
    """
    costs = count_costs(model, example_inputs, masks)
    whole = dense_costs or (costs if dense is None else count_costs(dense, example_inputs))
    measured, comparison = None, None
    if latency and dense is not None:
        comparison = compare_latency(dense, model, example_inputs, **options)
        measured = comparison.second
    elif latency:
        measured = measure_latency(model, example_inputs, **options)
    return Savings(
        costs.params, costs.macs, whole.params.total, whole.macs.total, measured, comparison, costs.incomplete
    )
