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
    "arm", "seeds", "MACs kept", "parameters kept", "training cost",
    "before", "right after", "at the end", "test",
)  # fmt: skip
FIRST, THEN = 300, 150  # steps before and after the cut
NETWORKS = {"resnet20": (ResNet20, 0.5), "vgg16": (VGG16BN, 0.25)}
X = torch.rand(64, 3, 32, 32)


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


def network_of(folder: Path, network: str, arm: str) -> nn.Module:
    """The network of a narrowed arm's widths, or the one that a cut has left."""
    build, width = NETWORKS[network]
    if not arm.startswith("narrowed"):
        return compacted(build(width=width), folder / COMPACT_NAME)
    with (folder / "config.yaml").open() as file:
        own = yaml.safe_load(file)["model"]["init_args"]["network"]["init_args"]
    return build(width=own["width"])


def kept(folder: Path, network: str, arm: str) -> dict[str, float]:
    """What a network keeps of the dense one: parameters and multiply-adds."""
    build, width = NETWORKS[network]
    costs, now = count_costs(build(width=width), X), count_costs(network_of(folder, network, arm), X)
    return {"params": now.params.total / costs.params.total, "macs": now.macs.total / costs.macs.total}


def print_latency(home: Path, network: str) -> None:
    """Latency kept by one seed's networks, by turns with the dense one; L1's widths are HRank's and random's too."""
    build, width = NETWORKS[network]
    print(f"\nlatency kept, {home.name}, in % (95 % interval)\n\n| widths | 50 % | 25 % |\n| --- | --- | --- |")
    for arm in ("slimming", "l1", "narrowed"):
        cells = []
        for percent in ("50", "25"):
            folder = home / f"{arm}-{percent}"
            small = network_of(folder, network, arm).eval() if finished(folder) else None
            found = small and compare_latency(build(width=width).eval(), small, X, seconds=6.0)
            cells.append(f"{100 * found.ratio:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})" if found else "")
        print(f"| {' | '.join([arm, *cells])} |", flush=True)


def row_of(home: Path, network: str, arm: str, percent: str) -> dict[str, Any]:
    """One run's numbers; none if it has not been run to its end."""
    name = arm.replace("-cost", "") + (f"-{percent}" if percent else "") + ("-cost" if "cost" in arm else "")
    if not finished(home / name):
        return {}
    found = logged(home / name)
    row: dict[str, Any] = {"at the end": found["val_acc"], "test": found["test_acc"]}
    if arm == "untouched":
        return row | {"MACs kept": 1.0, "parameters kept": 1.0, "training cost": FIRST + THEN}
    costs = kept(home / (f"slimming-{percent}" if arm.startswith("scratch") else name), network, arm)
    row |= {"MACs kept": costs["macs"], "parameters kept": costs["params"]}
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
    """Print two tables for each network."""
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
        print_latency(seeds[0], network)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/structured"))
