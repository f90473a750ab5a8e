"""Tables, summaries and histograms for W&B, against NumPy and by hand."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import RunRecord
from lightning_prune.costs.latency import BINS, histogram_of
from lightning_prune.record import Round
from lightning_prune.reports.wandb_content import cost_table, latencies, layer_rows, lineage, metric_of, summary_of
from lightning_prune.scores import score_quantiles


def record(metric: str, values: list[float | None]) -> RunRecord:
    run = RunRecord({"A": {}, "B": {}}, seed=3)
    for number, value in enumerate(values):
        metrics = {} if value is None else {metric: value}
        run.add_round(Round(number, number, number, 1, 100 // 2**number, 100, "d", metrics=metrics))
    return run


@pytest.mark.parametrize(
    ("metric", "values", "matching", "change"),
    [
        ("val_acc", [0.8, 0.9, 0.8, 0.7], 0.75, -0.1),
        ("val_loss", [0.8, 0.9, 0.7, 1.0], 0.75, 0.2),
        ("val_acc", [0.8, 0.7], 0.0, -0.1),
    ],
)
def test_the_summary(metric: str, values: list[float | None], matching: float, change: float) -> None:
    found = summary_of(record(metric, values))
    assert (found["method"], found["seed"], found["rounds"]) == ("A + B", 3, len(values) - 1)
    assert (found["metric"], found["dense"], found["matching_sparsity"]) == (metric, 0.8, matching)
    assert found["change"] == pytest.approx(change)


def test_a_run_without_metrics_is_summed_up_too() -> None:
    bare = record("val_acc", [None, None])
    assert metric_of(bare) is None
    assert summary_of(bare) == {"method": "A + B", "seed": 3, "rounds": 1, "sparsity": 0.5}
    assert "change" not in summary_of(record("val_acc", [0.5, None]))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_quantiles_equal_numpys(values: list[float]) -> None:
    expected = np.quantile(np.array(values, np.float32), [0, 0.25, 0.5, 0.75, 1], method="lower")
    assert score_quantiles(torch.tensor(values)) == tuple(expected.tolist())


def test_quantiles_of_what_is_left() -> None:
    scores = torch.tensor([[9.0, 1.0], [2.0, 3.0]])
    assert score_quantiles(scores, torch.tensor([[False, True], [True, True]])) == (1, 1, 2, 2, 3)
    assert score_quantiles(scores, torch.zeros(2, 2, dtype=torch.bool)) == ()


def test_rows_of_layers() -> None:
    rows = layer_rows(2, {"a": (5, 10), "b": (0, 0)}, {"a": (1.0, 2.0, 3.0, 4.0, 5.0)})
    assert rows == [[2, "a", 5, 10, 0.5, 1, 2, 3, 4, 5], [2, "b", 0, 0, 1.0, None, None, None, None, None]]


def test_a_table_of_unlike_measurements() -> None:
    costs: list[dict[str, Any]] = [
        {"label": "dense", "round": 0, "step": 0, "numbers": {"macs": 1.0}},
        {"label": "end", "round": 1, "step": 9, "numbers": {"macs": 0.5, "latency_ms": 2.0}},
    ]
    assert cost_table(costs) == (
        ["label", "round", "step", "macs", "latency_ms"],
        [["dense", 0, 0, 1.0, None], ["end", 1, 9, 0.5, 2.0]],
    )


def test_histograms_of_a_measurement() -> None:
    one, two = {"counts": [1], "edges_ms": [1.0, 2.0]}, {"counts": [2], "edges_ms": [3.0, 4.0]}
    row: dict[str, Any] = {"latency": {"histogram": one}, "comparison": {"first": {"histogram": two}}}
    assert latencies(row) == {"latency": one, "latency_dense": two}
    assert latencies({"latency": None, "comparison": None}) == {}
    assert latencies({"latency": {"median_ms": 1.0}}) == {}  # a record from before histograms


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=200))
def test_a_histogram_counts_every_sample(samples: list[float]) -> None:
    found = histogram_of(samples)
    counts, edges = np.array(found["counts"]), np.array(found["edges_ms"])
    assert counts.sum() == len(samples)
    assert len(edges) == len(counts) + 1 <= BINS + 2
    inside = [sum(low <= s < high for s in samples) for low, high in itertools.pairwise(edges)]
    inside[-1] += samples.count(edges[-1])
    assert counts.tolist() == inside


def test_slow_samples_do_not_hide_the_rest() -> None:
    samples = [1 + i / 1000 for i in range(99)] + [100.0]
    found = histogram_of(samples)
    assert max(found["counts"]) <= 6
    assert found["edges_ms"][-1] == 100.0


def test_lineage() -> None:
    assert lineage("id", 2, "ticket-id:round-01", {"density": 0.5}) == {
        "run": "id", "round": 2, "parent": "ticket-id:round-01", "density": 0.5,
    }  # fmt: skip
