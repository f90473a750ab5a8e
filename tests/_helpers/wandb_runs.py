"""Reads back what wandb has written to disk, from the bytes: no wandb reader stands in between."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@dataclass
class StoredRun:
    """What one process of a run has sent."""

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    run_id: str = ""

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The history rows that hold ``key``."""
        return [row for row in self.history if key in row]

    def file(self, row: dict[str, Any], key: str) -> Path:
        """The media file of a history row."""
        return self.folder / "files" / row[key]["path"]

    def tables(self, key: str) -> list[list[dict[str, Any]]]:
        """Every table logged under ``key``, as rows by column."""
        found = [json.loads(self.file(row, key).read_text()) for row in self.rows(key)]
        return [[dict(zip(table["columns"], row, strict=True)) for row in table["data"]] for table in found]

    def logged_artifacts(self) -> dict[str, Any]:
        """Artifacts but those that wandb makes for tables, by ``name:alias``."""
        named = [a for a in self.artifacts if a.type != "run_table"]
        return {f"{a.name}:{next(alias for alias in a.aliases if alias != 'latest')}": a for a in named}


def read_runs(folder: Path) -> list[StoredRun]:
    """Every run under ``folder``, in the order in which they were begun."""
    paths = sorted(folder.rglob("*.wandb"), key=lambda path: (path.parent.name, path.stat().st_mtime_ns))
    return [_read(path) for path in paths]


def _read(path: Path, patience: float = 30.0) -> StoredRun:
    """Read a run that has been finished; wandb's own process may still write its last records."""
    end = time.monotonic() + patience
    while "exit" not in (found := {record.WhichOneof("record_type") for record in records(path)}):
        assert time.monotonic() < end, f"{path} has no end; it holds {found}"
        time.sleep(0.05)
    run = StoredRun(path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id = record.run.run_id
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            for name, value in _items(record.summary.update).items():
                run.summary[name] = {**run.summary.get(name, {}), **value} if isinstance(value, dict) else value
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "metric" and record.metric.name:
            run.axes[record.metric.name] = record.metric.step_metric
    return run


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        path = list(item.nested_key) or [item.key]
        at = found
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = json.loads(item.value_json)
    return found
