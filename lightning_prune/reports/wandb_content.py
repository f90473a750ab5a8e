"""What a pruning run shows in W&B beside its scalars: tables, summary fields and lineage, as plain content."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_prune.errors import ConfigError
from lightning_prune.record import RunRecord
from lightning_prune.reports.page import page_of
from lightning_prune.reports.runs import choose_metric, group_runs, lower_is_better
from lightning_prune.scores import QUANTILES

LAYER_COLUMNS = ["round", "layer", "kept", "total", "density", *(f"score_{name}" for name in QUANTILES)]


def layer_rows(
    number: int, per_layer: Mapping[str, tuple[int, int]], scores: Mapping[str, Sequence[float]]
) -> list[list[Any]]:
    """The table of one round, under :data:`LAYER_COLUMNS`.

    Args:
        number: The round.
        per_layer: ``{layer: (kept, total)}``.
        scores: ``{layer: quantiles}`` as in :class:`PruneEvent`; a layer without them gets None.
    """
    rows = []
    for name, (kept, total) in per_layer.items():
        found: list[Any] = list(scores.get(name, ())) or [None] * len(QUANTILES)
        rows.append([number, name, kept, total, kept / total if total else 1.0, *found])
    return rows


def cost_table(costs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Measurements of :class:`CostProfiler` as a table: its heading and one row for each."""
    names = list(dict.fromkeys(name for row in costs for name in row["numbers"]))
    rows = [[row["label"], row["round"], row["step"], *(row["numbers"].get(name) for name in names)] for row in costs]
    return ["label", "round", "step", *names], rows


def latencies(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The histograms of a measurement by what was timed: ``latency``, and ``latency_dense`` timed by turns with it."""
    comparison = row.get("comparison")
    both = {"latency": row.get("latency"), "latency_dense": comparison and comparison["first"]}
    return {name: found["histogram"] for name, found in both.items() if found and found.get("histogram")}


def metric_of(record: RunRecord) -> str | None:
    """The metric that stands for a run: the one its report shows; None if it recorded none."""
    try:
        return choose_metric([record])
    except ConfigError:
        return None


def summary_of(record: RunRecord) -> dict[str, Any]:
    """Fields to sort runs by, of the network that was trained last.

    Returns:
        ``method``, ``seed``, ``rounds`` (cuts), ``sparsity``; of the metric that stands for the run its name
        (``metric``), ``dense`` (its value in round 0), ``change`` (last minus dense), and ``matching_sparsity``: the
        highest sparsity of a round whose metric is no worse than the dense network's. Of the last three none where no
        round is dense, as after a learned mask.
    """
    last = record.rounds[-1]
    fields: dict[str, Any] = {"method": " + ".join(record.method), "seed": record.seed}
    fields |= {"rounds": last.round, "sparsity": last.sparsity}
    metric = metric_of(record)
    values = [row.metrics.get(metric or "") for row in record.rounds]
    if metric is None or values[0] is None:
        return fields
    if record.rounds[0].sparsity > 0:  # a learned mask: there is no dense network to compare it with
        return fields | {"metric": metric}
    dense, sign = values[0], -1 if lower_is_better(metric) else 1
    good = [
        row.sparsity
        for row, value in zip(record.rounds, values, strict=True)
        if value is not None and sign * (value - dense) >= 0
    ]
    fields |= {"metric": metric, "dense": dense, "matching_sparsity": max(good, default=None)}
    return fields | ({} if values[-1] is None else {"change": values[-1] - dense})


def page_of_run(record: RunRecord, metric: str) -> str:
    """The HTML report of one run."""
    return page_of(group_runs([record], metric), metric)


def lineage(run: str, number: int, parent: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Where an artifact comes from, for its metadata.

    Args:
        run: Id of the run that made it.
        number: The round that starts from it (of the final network: that has trained it).
        parent: The artifact it was cut or trained from, as ``name:alias``; None: the dense network, or one that was
            not logged.
        facts: What else is known of it.
    """
    return {"run": run, "round": number, "parent": parent} | dict(facts)


def alias_of(number: int) -> str:
    """The alias of a round's artifact."""
    return f"round-{number:02d}"
