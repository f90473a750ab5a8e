"""What reaches a trainer's loggers: numbers for all of them, and callbacks that come along where one shows more."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_prune.record import RunRecord

COMPANIONS: list[Callable[[pl.Trainer], Callback | None]] = []
"""Each looks at a trainer and gives the callback that comes along, or None; layers above add to it."""


def add_companions(trainer: pl.Trainer) -> None:
    """In ``setup`` of a fit: let callbacks come along for loggers that show more than numbers.

    They go to the end of the trainer's callbacks, whose ``setup`` Lightning then calls too; they take themselves off
    the list when the fit ends.
    """
    for make in COMPANIONS:
        callback = make(trainer)
        if callback is not None:
            trainer.callbacks.append(callback)  # type: ignore[attr-defined]


def log_numbers(trainer: pl.Trainer, numbers: Mapping[str, float]) -> None:
    """Give numbers to every logger of the trainer, at the optimizer step that has been reached."""
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in numbers.items()}, step=trainer.global_step)


def end_numbers(record: RunRecord) -> dict[str, float]:
    """What the record knows of its last round's trained network, to be plotted against one another.

    Returns:
        ``round``, ``sparsity``, ``density``; the metrics by their names; parts of the dense network that are left
        (``params``, ``macs``, 1 = all; multiplications by 0 left out where they were counted); and, where measured,
        ``latency_ms``, ``theoretical_speedup``, ``measured_speedup``.
    """
    row = record.rounds[-1]
    numbers: dict[str, float] = {"round": row.round, "sparsity": row.sparsity, "density": row.density}
    numbers |= {name: now / dense for name, (now, dense) in row.costs.items() if name != row.unit and dense}
    measured: dict[str, Any] = next((cost for cost in reversed(record.costs) if cost["round"] == row.round), {})
    found = measured.get("numbers", {})
    for name in ("params", "macs"):
        if measured.get(f"dense_{name}"):
            numbers[name] = found[f"num_{name}_nonzero"] / measured[f"dense_{name}"]
    names = ("latency_ms", "theoretical_speedup", "measured_speedup")
    numbers |= {name: found[name] for name in names if name in found}
    return numbers | dict(row.metrics)
