"""The record of one pruning run: what each round kept, cost and reached; as versioned JSON and as CSV.

``record.json`` is the record; ``rounds.csv`` holds its rows for a spreadsheet. Both are rewritten whole after each
round, so a reader never sees half of one. Two runs are equal when their :meth:`RunRecord.comparable` parts are: what
took how long on which machine (``timing``, ``costs``, ``environment``) is kept beside them and promises nothing.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_prune.environment import describe_environment
from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.files import atomic_write, read_json, write_json

FORMAT = "lightning_prune.record"
VERSION = 1
JSON_NAME = "record.json"
CSV_NAME = "rounds.csv"

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Round:
    """One row of the record: one trained network, before the next event cuts it.

    Args:
        round: Index; 0 is the dense network.
        step: ``trainer.global_step`` at the round's end.
        epoch: ``trainer.current_epoch`` at the round's end, counted over the whole fit.
        steps: Optimizer steps at the round's end counted within one training, between the rewinding point and ``T``.
        kept: Weights (or channels, see ``unit``) left, of the prunable ones.
        total: Prunable weights (channels) of the dense network: the denominator of ``density`` and ``sparsity``.
        digest: Digest of the masks, or of the removal plans, under which this round was trained.
        per_layer: ``{name: (kept, total)}`` for every masked tensor.
        removed: Weights that the event at the round's start removed; 0 for the dense round.
        metrics: ``{name: value}`` at the round's end.
        learning_rates: At the round's end, one for each parameter group, optimizers in their order.
        best: The round's best point by a monitored value: ``step``, ``epoch``, ``monitor``, ``value``, ``metrics``.
        best_checkpoint: Its checkpoint, relative to the run folder.
        ticket: The ticket from which this round was trained, relative to the run folder.
        stopped_early: Whether the round ended before its last step.
        unit: What ``kept``, ``total``, ``removed`` and ``per_layer`` count: ``"weights"`` (of masked tensors) or
            ``"channels"`` (of groups that can leave).
        start_metrics: ``{name: value}`` right after the event that opened the round, before training, where measured.
        costs: ``{"channels" | "params" | "macs": (now, of the dense network)}`` where channels are removed: prunable
            channels, all parameters, multiply-adds at the example inputs.

    Raises:
        ConfigError: Counts that contradict each other, or a value of the wrong type.
    """

    round: int
    step: int
    epoch: int
    steps: int
    kept: int
    total: int
    digest: str
    per_layer: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    removed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    best: Mapping[str, Any] | None = None
    best_checkpoint: str | None = None
    ticket: str | None = None
    stopped_early: bool = False
    unit: str = "weights"
    start_metrics: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"round {self.round!r} of the record"
        for name in ("round", "step", "epoch", "steps", "kept", "total", "removed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{where}: {name}={value!r} must be a whole number of at least 0.")
        if self.kept > self.total:
            raise ConfigError(f"{where}: kept={self.kept} is more than total={self.total}.")
        if not isinstance(self.digest, str):
            raise ConfigError(f"{where}: digest={self.digest!r} must be text.")
        if self.unit not in ("weights", "channels"):
            raise ConfigError(f"{where}: unit={self.unit!r} must be 'weights' or 'channels'.")
        try:  # tensors and tuples become plain numbers and one order here, so that equality and JSON need no care
            plain = {
                "per_layer": {str(k): (int(kept), int(total)) for k, (kept, total) in self.per_layer.items()},
                "metrics": {str(k): float(v) for k, v in self.metrics.items()},
                "start_metrics": {str(k): float(v) for k, v in self.start_metrics.items()},
                "learning_rates": tuple(float(v) for v in self.learning_rates),
                "best": None if self.best is None else _plain(self.best, f"{where}, best"),
                "stopped_early": bool(self.stopped_early),
                "costs": {str(k): (int(now), int(dense)) for k, (now, dense) in self.costs.items()},
            }
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{where}: a count, metric or learning rate is no number ({error}).") from error
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def density(self) -> float:
        """Weights (channels) left over prunable ones of the dense network; 1.0 if there are none."""
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Weights (channels) removed over prunable ones of the dense network: ``1 - density``."""
        return (self.total - self.kept) / self.total if self.total else 0.0

    def to_json(self) -> dict[str, Any]:
        """The row as JSON content; ``density`` and ``sparsity`` stand in it for readers without this library."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        return _encode(content | {"density": self.density, "sparsity": self.sparsity})

    @classmethod
    def from_json(cls, content: Any) -> "Round":
        """Undo :meth:`to_json`.

        Raises:
            ConfigError: ``content`` is no row.
        """
        if not isinstance(content, dict):
            raise ConfigError(f"a row of the record must be a JSON object, got {type(content).__name__}.")
        try:
            return cls(**{k: v for k, v in _decode(content).items() if k not in ("density", "sparsity")})
        except TypeError as error:
            raise ConfigError(f"a row of the record has missing or unknown fields: {error}.") from error


class RunRecord:
    """What a run did, round by round.

    Numbers that JSON cannot hold are written as the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` and read back
    as numbers, wherever they stand.

    Args:
        method: ``{class name of a callback: its hyper-parameters}``; JSON content.
        seed: The run's seed, or None if none was set.
        environment: Versions and device; :func:`describe_environment` if left out.

    Attributes:
        rounds: The rows, as :class:`Round`; ``rounds[r].round == r``.
        final: What is measured once at the end, such as test metrics; JSON content.
        timing: ``{"seconds": [one number, or None, for each round]}``.
        costs: Measurements of :class:`CostProfiler`, in order; JSON content, each with its ``round``.

    Example:
        >>> record = RunRecord(method={"IterativeMagnitudePruner": {"fraction": 0.2}}, seed=1)
        >>> record.add_round(Round(round=0, step=100, epoch=2, steps=100, kept=50, total=50, digest="d"), seconds=1.5)
        >>> record.rounds[0].density
        1.0
    """

    def __init__(
        self, method: Mapping[str, Any], seed: int | None = None, environment: Mapping[str, Any] | None = None
    ) -> None:
        self.method: dict[str, Any] = _plain(method, "method")
        self.seed = seed
        self.rounds: list[Round] = []
        self.final: dict[str, Any] = {}
        self.timing: dict[str, list[float | None]] = {"seconds": []}
        self.costs: list[dict[str, Any]] = []
        self.environment = _plain(describe_environment() if environment is None else environment, "environment")

    def add_round(self, row: Round, seconds: float | None = None) -> None:
        """Append the next row.

        Args:
            row: The row; its index must be the number of rows so far.
            seconds: Wall-clock seconds that the round took.

        Raises:
            ConfigError: A row out of order.
        """
        if row.round != len(self.rounds):
            raise ConfigError(f"the record holds {len(self.rounds)} rounds, so the next is not round {row.round}.")
        self.rounds.append(row)
        self.timing["seconds"].append(None if seconds is None else float(seconds))

    def cut_to(self, num_rounds: int) -> None:
        """Keep the first ``num_rounds`` rows: a run resumed from a checkpoint forgets what came after it.

        Final results are forgotten when a row is.

        Raises:
            ConfigError: There are fewer rows.
        """
        if not 0 <= num_rounds <= len(self.rounds):
            raise ConfigError(f"the record holds {len(self.rounds)} rounds and cannot be cut to {num_rounds}.")
        if num_rounds < len(self.rounds):
            self.final = {}
        del self.rounds[num_rounds:]
        del self.timing["seconds"][num_rounds:]
        self.costs = [row for row in self.costs if row["round"] < max(num_rounds, 1)]

    def comparable(self) -> dict[str, Any]:
        """The content that two equal runs share, as JSON content (so that NaN equals NaN)."""
        content = self.state_dict()
        return {k: v for k, v in content.items() if k not in ("timing", "costs", "environment")}

    def state_dict(self) -> dict[str, Any]:
        """The whole record as JSON content: plain dictionaries, lists, texts and numbers."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": _encode(self.method),
            "seed": self.seed,
            "rounds": [row.to_json() for row in self.rounds],
            "final": _encode(_plain(self.final, "final")),
            "timing": _encode(self.timing),
            "costs": _encode(_plain(self.costs, "costs")),
            "environment": _encode(self.environment),
        }

    @classmethod
    def from_state_dict(cls, content: Any, where: str = "the record in the checkpoint") -> "RunRecord":
        """Undo :meth:`state_dict`.

        Args:
            content: What :meth:`state_dict` gave.
            where: Where it comes from, for the message.

        Raises:
            FileFormatError: Foreign, of a later version, or with parts missing.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise FileFormatError(f"{where} is no run record: its format is {found!r}, expected {FORMAT!r}.")
        version = content.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise FileFormatError(f"{where} has no valid version: {version!r}, expected 1 to {VERSION}.")
        if version > VERSION:
            raise FileFormatError(
                f"{where} has version {version}, this library reads up to {VERSION}; upgrade lightning-prune."
            )
        kinds = {"method": dict, "rounds": list, "final": dict, "timing": dict, "environment": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
        seconds = [] if "timing" in wrong else content["timing"].get("seconds")
        seed = content.get("seed")
        if wrong or not isinstance(seconds, list) or not (seed is None or isinstance(seed, int)):
            raise FileFormatError(f"{where} is damaged: missing or of the wrong type: {wrong or 'seconds or seed'}.")
        costs = content.get("costs", [])  # records of earlier versions have none
        if not isinstance(costs, list) or not all(isinstance(row, dict) and "round" in row for row in costs):
            raise FileFormatError(f"{where} is damaged: its costs are no list of measurements with their round.")
        if len(seconds) != len(content["rounds"]):
            raise FileFormatError(f"{where} is damaged: {len(content['rounds'])} rounds, {len(seconds)} timings.")
        record = cls(_decode(content["method"]), seed, _decode(content["environment"]))
        try:
            for row, taken in zip(content["rounds"], _decode(seconds), strict=True):
                record.add_round(Round.from_json(row), taken)
        except (ConfigError, TypeError, ValueError) as error:
            raise FileFormatError(f"{where} is damaged: {error}") from error
        record.final = _decode(content["final"])
        record.costs = _decode(costs)
        return record

    def write(self, folder: str | Path) -> None:
        """Rewrite ``record.json`` and ``rounds.csv`` in ``folder``, each whole and atomically."""
        folder = Path(folder)
        content = self.state_dict()
        with atomic_write(folder / CSV_NAME) as temporary:
            _write_csv(temporary, content["rounds"], content["timing"]["seconds"])
        write_json(folder / JSON_NAME, content)

    @classmethod
    def read(cls, path: str | Path) -> "RunRecord":
        """Read a record from its file, or from the run folder that holds it.

        Raises:
            FileFormatError: Missing, truncated, foreign, or written by a later version.
        """
        path = Path(path)
        path = path / JSON_NAME if path.is_dir() else path
        return cls.from_state_dict(read_json(path, "a run record"), where=str(path))


def check_free(folder: str | Path) -> None:
    """Refuse a run folder that another run has used.

    Raises:
        ConfigError: ``folder`` holds a record.
    """
    path = Path(folder) / JSON_NAME
    if path.exists():
        raise ConfigError(
            f"{path} is the record of an earlier run, and a run folder holds one run: resume that run from its "
            "checkpoint (ckpt_path), or log this one to another folder."
        )


def _plain(content: Any, where: str) -> Any:
    """A copy of ``content`` in plain JSON types (non-finite floats stay floats).

    Raises:
        ConfigError: Something that JSON cannot hold.
    """
    for kind in (bool, int, float, str):  # exact types: a subclass, such as torch's version, is no plain content
        if isinstance(content, kind):
            return kind(content)
    if content is None:
        return None
    if isinstance(content, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(content)]
    if isinstance(content, torch.Tensor | np.ndarray | np.generic) and math.prod(content.shape) == 1:
        return content.item()
    raise ConfigError(
        f"{where} of the record is a {type(content).__name__}; expected numbers, text, lists or mappings."
    )


def _encode(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    if isinstance(content, Mapping):
        return {k: _encode(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_encode(v) for v in content]
    return content


def _decode(content: Any) -> Any:
    if isinstance(content, str):
        return _NOT_FINITE.get(content, content)
    if isinstance(content, dict):
        return {k: _decode(v) for k, v in content.items()}
    if isinstance(content, list):
        return [_decode(v) for v in content]
    return content


def _write_csv(path: Path, rows: list[dict[str, Any]], seconds: list[float | None]) -> None:
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
        if k not in ("per_layer", "metrics", "learning_rates", "best", "costs", "start_metrics")
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
