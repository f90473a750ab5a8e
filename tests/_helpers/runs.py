"""Records of runs that never ran, for reports."""

from typing import Any

from lightning_prune.record import Round, RunRecord


def run_of(
    seed: int, accuracy: list[float], method: str = "Pruner", layer: str = "conv", costs: bool = True, **settings: Any
) -> RunRecord:
    """A run whose round r keeps half of what round r - 1 kept of 1,000 weights."""
    record = RunRecord({method: settings | {"seed": seed}}, seed, {"torch": "2.x"})
    for index, value in enumerate(accuracy):
        kept = 1000 // 2**index
        row = Round(index, 10 * index, index, 10, kept, 1000, "d", {layer: (kept, 1000)}, metrics={"val_acc": value})
        record.add_round(row, 1.5)
        if costs and index:
            numbers = {"num_macs_nonzero": 2 * kept, "num_params_nonzero": kept, "latency_ms": 3.0 - index / 4,
                       "theoretical_speedup": 2.0**index, "measured_speedup": 1.0 + index / 8}  # fmt: skip
            dense = {"dense_macs": 2000, "dense_params": 1000, "comparison": {"first": {"median_ms": 3.25}}}
            record.costs.append({"label": f"round {index}", "round": index, "numbers": numbers} | dense)
    return record
