"""Print the tables of README.md from the runs of compare.sh: python recipes/structured/table.py [FOLDER]."""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from torch import nn

from lightning_prune import compare_latency, count_costs
from lightning_prune.callbacks.remover import COMPACT_NAME
from lightning_prune.experiments import VGG16BN, ResNet20, compacted
from lightning_prune.record import JSON_NAME, RunRecord

ARMS = ("untouched", "slimming", "hrank", "l1", "random", "scratch", "narrowed", "scratch-cost", "narrowed-cost")
COLUMNS = (
    "arm", "seeds", "MACs kept", "parameters kept", "latency kept", "training cost",
    "before", "right after", "at the end", "test",
)  # fmt: skip
FIRST, THEN = 300, 150  # steps before and after the cut
NETWORKS = {"resnet20": (ResNet20, 0.5), "vgg16": (VGG16BN, 0.25)}
X = torch.rand(64, 3, 32, 32)
TIMED: dict[Any, float] = {}


def logged(folder: Path) -> dict[str, float]:
    """The last value of everything that a run's CSVLogger has written, and the step of the last row."""
    found: dict[str, float] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found |= {name: float(value) for name, value in row.items() if value}
    return found


def finished(folder: Path) -> bool:
    """Whether a run has been tested, which comes last."""
    return (folder / "metrics.csv").exists() and "test_acc" in logged(folder)


def kept(small: nn.Module, network: str) -> dict[str, float]:
    """What a network keeps of the dense one: parameters, multiply-adds, and latency by turns, timed now."""
    build, width = NETWORKS[network]
    dense = build(width=width)
    costs, now = count_costs(dense, X), count_costs(small, X)
    found = {"params": now.params.total / costs.params.total, "macs": now.macs.total / costs.macs.total}
    shapes = tuple(tuple(p.shape) for p in small.parameters())
    if shapes not in TIMED:  # arms of one shape share a measurement
        TIMED[shapes] = compare_latency(dense, small, X, seconds=1.0).ratio
    return found | {"latency": TIMED[shapes]}


def compact_costs(folder: Path, network: str) -> dict[str, float]:
    """Of the network that a cut has left."""
    build, width = NETWORKS[network]
    return kept(compacted(build(width=width), folder / COMPACT_NAME), network)


def narrow_costs(folder: Path, network: str) -> dict[str, float]:
    """Of a narrowed network."""
    with (folder / "config.yaml").open() as file:
        own = yaml.safe_load(file)["model"]["init_args"]["network"]["init_args"]
    return kept(NETWORKS[network][0](width=own["width"]), network)


def row_of(home: Path, network: str, arm: str, percent: str) -> dict[str, Any]:
    """One run's numbers; none if it has not been run to its end."""
    name = arm.replace("-cost", "") + (f"-{percent}" if percent else "") + ("-cost" if "cost" in arm else "")
    if not finished(home / name):
        return {}
    found = logged(home / name)
    row: dict[str, Any] = {"at the end": found["val_acc"], "test": found["test_acc"]}
    if arm == "untouched":
        return row | {"MACs kept": 1.0, "parameters kept": 1.0, "latency kept": 1.0, "training cost": FIRST + THEN}
    if arm.startswith("narrowed"):
        costs = narrow_costs(home / name, network)
    else:
        costs = compact_costs(home / (f"slimming-{percent}" if arm.startswith("scratch") else name), network)
    row |= {"MACs kept": costs["macs"], "parameters kept": costs["params"], "latency kept": costs["latency"]}
    if arm.startswith(("scratch", "narrowed")):
        return row | {"training cost": found["step"] * costs["macs"]}
    record = RunRecord.read(home / name / JSON_NAME)
    source = logged(home / ("sparsity" if arm == "slimming" else "dense"))
    start = record.rounds[-1].start_metrics["val_acc"]
    return row | {"training cost": FIRST + THEN * costs["macs"], "before": source["val_acc"], "right after": start}


def cell(values: list[float | None], column: str) -> str:
    """Mean, and lowest to highest where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    factor, digits = (1, 0) if column == "training cost" else (100, 1)
    text = f"{factor * mean(known):.{digits}f}"
    if len(known) > 1 and column in ("before", "right after", "at the end", "test"):
        text += f" ({factor * min(known):.{digits}f} to {factor * max(known):.{digits}f})"
    return text


def main(folder: Path) -> None:
    """Print one table for each network."""
    homes: dict[str, list[Path]] = defaultdict(list)
    for home in sorted(folder.glob("*-seed*")):
        homes[home.name.partition("-seed")[0]].append(home)
    for network, seeds in homes.items():
        print(f"\n**{network}**\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        for percent in ("", "50", "25"):
            for arm in ARMS:
                if (arm == "untouched") != (percent == ""):
                    continue
                rows = [row for home in seeds if (row := row_of(home, network, arm, percent))]
                if rows:
                    label = f"{arm.replace('-cost', ', equal cost')}{', ' + percent + ' %' if percent else ''}"
                    cells = [cell([row.get(column) for row in rows], column) for column in COLUMNS[2:]]
                    print(f"| {' | '.join([label, str(len(rows)), *cells])} |")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/structured"))
