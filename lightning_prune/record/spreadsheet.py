"""A record's rows for a spreadsheet."""

import csv
from pathlib import Path
from typing import Any


def write_csv(path: Path, rows: list[dict[str, Any]], seconds: list[float | None]) -> None:
    """One line a round; mappings are spread over columns such as ``metrics/val_acc`` and ``kept/conv.weight``."""
    table = [_flat(row) | {"seconds": taken} for row, taken in zip(rows, seconds, strict=True)]
    columns = list(dict.fromkeys(name for line in table for name in line))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {
        k: v
        for k, v in row.items()
        if k not in ("per_layer", "metrics", "learning_rates", "best", "costs", "start_metrics", "mask_distances")
    }
    best = dict(row["best"] or {})
    flat |= {f"metrics/{k}": v for k, v in row["metrics"].items()}
    flat |= {f"start/{k}": v for k, v in row["start_metrics"].items()}
    flat |= {f"best/{k}": v for k, v in best.pop("metrics", {}).items()}
    flat |= {f"best_{k}": v for k, v in best.items()}
    flat |= {f"learning_rate_{i}": v for i, v in enumerate(row["learning_rates"])}
    flat |= {k: now for k, (now, _) in row["costs"].items()}
    flat |= {f"kept/{k}": kept for k, (kept, _) in row["per_layer"].items()}
    return flat
