"""The record of one pruning run: what each round kept, cost and reached; as versioned JSON and as CSV.

``record.json`` is the record; ``rounds.csv`` holds its rows for a spreadsheet. Both are rewritten whole after each
round, so a reader never sees half of one. Two runs are equal when their :meth:`RunRecord.comparable` parts are: what
took how long on which machine (``timing``, ``costs``, ``environment``), and what the parts were called (``task``), is
kept beside them and promises nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_prune.environment import describe_environment
from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.files import atomic_write, read_json, write_json
from lightning_prune.record.content import check_header, decode, encode, to_plain
from lightning_prune.record.round import Round
from lightning_prune.record.spreadsheet import write_csv

FORMAT = "lightning_prune.record"
VERSION = 1
JSON_NAME = "record.json"
CSV_NAME = "rounds.csv"


class RunRecord:
    """What a run did, round by round.

    Numbers that JSON cannot hold are written as the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` and read back
    as numbers, wherever they stand.

    Args:
        method: ``{class name of a callback: its hyper-parameters}``; JSON content.
        seed: The run's seed, or None if none was set.
        environment: Versions and device; :func:`describe_environment` if left out.
        task: What was trained on what: ``module``, ``networks``, ``data`` (class names) and ``recipe`` (the file), as
            far as they are known.

    Attributes:
        rounds: The rows, as :class:`Round`; ``rounds[r].round == r``.
        final: What is measured once at the end, such as test metrics; JSON content.
        timing: ``{"seconds": [one number, or None, for each round]}``.
        costs: Measurements of :class:`CostProfiler`, in order; JSON content, each with its ``round``.
        frozen: What may not leave: ``name``, ``axis`` (None: the whole tensor), ``size``, ``reason``, ``where``.
        folder: Where the record was read from; no part of it.

    Example:
        >>> record = RunRecord(method={"IterativeMagnitudePruner": {"fraction": 0.2}}, seed=1)
        >>> record.add_round(Round(round=0, step=100, epoch=2, steps=100, kept=50, total=50, digest="d"), seconds=1.5)
        >>> record.rounds[0].density
        1.0
    """

    def __init__(
        self,
        method: Mapping[str, Any],
        seed: int | None = None,
        environment: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
    ) -> None:
        self.method: dict[str, Any] = to_plain(method, "method")
        self.seed = seed
        self.rounds: list[Round] = []
        self.final: dict[str, Any] = {}
        self.timing: dict[str, list[float | None]] = {"seconds": []}
        self.costs: list[dict[str, Any]] = []
        self.frozen: list[dict[str, Any]] = []
        self.task: dict[str, Any] = to_plain(task or {}, "task")
        self.folder: Path | None = None
        self.environment = to_plain(describe_environment() if environment is None else environment, "environment")

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
        return {k: v for k, v in content.items() if k not in ("timing", "costs", "environment", "task")}

    def state_dict(self) -> dict[str, Any]:
        """The whole record as JSON content: plain dictionaries, lists, texts and numbers."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": encode(self.method),
            "seed": self.seed,
            "task": encode(self.task),
            "rounds": [row.to_json() for row in self.rounds],
            "final": encode(to_plain(self.final, "final")),
            "timing": encode(self.timing),
            "costs": encode(to_plain(self.costs, "costs")),
            "frozen": to_plain(self.frozen, "frozen"),
            "environment": encode(self.environment),
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
        check_header(content, "run record", where, FORMAT, VERSION)
        kinds = {"method": dict, "rounds": list, "final": dict, "timing": dict, "environment": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
        seconds = [] if "timing" in wrong else content["timing"].get("seconds")
        seed = content.get("seed")
        if wrong or not isinstance(seconds, list) or not (seed is None or isinstance(seed, int)):
            raise FileFormatError(f"{where} is damaged: missing or of the wrong type: {wrong or 'seconds or seed'}.")
        costs = content.get("costs", [])  # records of earlier versions have none
        if not isinstance(costs, list) or not all(isinstance(row, dict) and "round" in row for row in costs):
            raise FileFormatError(f"{where} is damaged: its costs are no list of measurements with their round.")
        frozen, task = content.get("frozen", []), content.get("task", {})  # as above
        if not isinstance(task, dict) or not isinstance(frozen, list) or not all(isinstance(f, dict) for f in frozen):
            raise FileFormatError(f"{where} is damaged: its task is no mapping, or frozen no list of mappings.")
        if len(seconds) != len(content["rounds"]):
            raise FileFormatError(f"{where} is damaged: {len(content['rounds'])} rounds, {len(seconds)} timings.")
        record = cls(decode(content["method"]), seed, decode(content["environment"]), decode(task))
        try:
            for row, taken in zip(content["rounds"], decode(seconds), strict=True):
                record.add_round(Round.from_json(row), taken)
        except (ConfigError, TypeError, ValueError) as error:
            raise FileFormatError(f"{where} is damaged: {error}") from error
        record.final = decode(content["final"])
        record.costs, record.frozen = decode(costs), decode(frozen)
        return record

    def write(self, folder: str | Path) -> None:
        """Rewrite ``record.json`` and ``rounds.csv`` in ``folder``, each whole and atomically."""
        folder = Path(folder)
        content = self.state_dict()
        with atomic_write(folder / CSV_NAME) as temporary:
            write_csv(temporary, content["rounds"], content["timing"]["seconds"])
        write_json(folder / JSON_NAME, content)

    @classmethod
    def read(cls, path: str | Path) -> "RunRecord":
        """Read a record from its file, or from the run folder that holds it.

        Raises:
            FileFormatError: Missing, truncated, foreign, or written by a later version.
        """
        path = Path(path)
        path = path / JSON_NAME if path.is_dir() else path
        record = cls.from_state_dict(read_json(path, "a run record"), where=str(path))
        record.folder = path.parent
        return record


def check_free(folder: str | Path) -> None:
    """Refuse a run folder that another run has used.

    Raises:
        ConfigError: ``folder`` holds a record.
    """
    path = Path(folder) / JSON_NAME
    if path.exists():
        raise ConfigError(
            f"{path} is the record of an earlier run, and a run folder holds one run: resume that run from its "
            "checkpoint (ckpt_path), or log this one to another folder. (A run that ended before its first checkpoint "
            "cannot be resumed; delete its folder.)"
        )
