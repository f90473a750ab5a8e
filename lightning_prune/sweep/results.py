"""What an arm has come to: ``arm.json``, written when all its stages are done."""

import csv
from pathlib import Path

from torch import nn

from lightning_prune.callbacks.training_cost import COST_NAME, read_training_cost
from lightning_prune.environment import package_versions
from lightning_prune.errors import FileFormatError
from lightning_prune.experiments import compacted, trained
from lightning_prune.record import JSON_NAME, ArmCost, ArmStage, RunRecord
from lightning_prune.record import Arm as Result
from lightning_prune.sweep.facts import NetworkFacts, build, costs_of
from lightning_prune.sweep.planning import COMPACT, LAST, Arm, Stage

WITHIN = 0.02
"""By how much, relative, an arm's cost may differ from what it may spend."""


def network_of(arm: Arm) -> nn.Module:
    """The network at the end of an arm, with its weights."""
    if arm.method.cuts:
        return compacted(build(arm.network.spec()), arm.folder / COMPACT)
    return trained(build(dict(arm.network_spec)), arm.folder / LAST)


def last_metrics(folder: Path, parts: tuple[str, ...] = ("val_", "test_")) -> dict[str, float]:
    """The last value of every metric of validation and test that a run's CSVLogger has written.

    Raises:
        FileFormatError: There is no such file.
    """
    found: dict[str, float] = {}
    try:
        with (folder / "metrics.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found |= {name: float(value) for name, value in row.items() if value and name.startswith(parts)}
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{folder / 'metrics.csv'} cannot be read: {error}.") from error
    return found


def stage_cost(stage: Stage, output: Path) -> ArmStage:
    """What a stage has executed, from the file of its :class:`TrainingCost`.

    Raises:
        FileFormatError: The file is missing or none of this version.
    """
    cost = read_training_cost(stage.folder / COST_NAME)
    return ArmStage(str(stage.folder.relative_to(output)), cost["macs"], cost["steps"], cost["seconds"])


def result_of(arm: Arm, facts: NetworkFacts, output: Path) -> Result:
    """The record of an arm, from what its stages have left."""
    costs = costs_of(network_of(arm), facts.shape)
    stages = tuple(stage_cost(stage, output) for stage in arm.stages)
    before, after = _around_the_cut(arm)
    return Result(
        arm.network.name,
        arm.method.name,
        "cut" if arm.method.cuts else arm.method.kind,
        arm.seed,
        {
            "macs": costs.macs.total / facts.macs,
            "params": costs.params.total / facts.params,
            "nonzero_params": costs.params.nonzero / facts.params,
            "nonzero_macs": costs.macs.nonzero / facts.macs,
        },
        last_metrics(arm.folder),
        ArmCost(sum(stage.macs for stage in stages), arm.limit, sum(stage.seconds for stage in stages), stages),
        arm.budget,
        arm.budget_on,
        arm.method.equal,
        arm.method.of,
        None,
        before,
        after,
        [list(stage.command) for stage in arm.stages],
        package_versions(),
    )


def _around_the_cut(arm: Arm) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Validation metrics before the first cut and right after the last, as far as they were measured."""
    path = arm.folder / JSON_NAME
    rounds = RunRecord.read(path).rounds if path.exists() else []
    after = dict(rounds[-1].start_metrics) if rounds else {}
    before: dict[str, float] = {}
    if arm.method.kind in ("rounds", "whole"):
        before = dict(rounds[0].metrics)
    elif arm.method.kind == "cut":
        before = last_metrics(arm.stages[0].folder, ("val_",))
    return before or None, after or None


def line(result: Result) -> str:
    """An arm's figures in one line."""
    metrics, kept, deviation = result.metrics, result.kept, result.cost.deviation
    parts = [f"{name} {metrics[name]:.4f}" for name in ("val_acc", "test_acc") if name in metrics]
    parts.append(f"keeps {100 * kept['macs']:.1f} % of MACs, {100 * kept['nonzero_params']:.1f} % of weights")
    parts.append("equal steps" if deviation is None else f"cost {100 * (1 + deviation):.1f} % of allowed")
    return ", ".join([*parts, f"{result.cost.seconds:.0f} s"])
