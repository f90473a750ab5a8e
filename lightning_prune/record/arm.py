"""The record of one arm of a sweep: a network, a method, a budget and a seed, with what it kept, cost and reached."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.files import read_json, write_json
from lightning_prune.record.content import check_header, decode, encode, to_plain

FORMAT = "lightning_prune arm"
VERSION = 1
ARM_NAME = "arm.json"
KEPT = ("macs", "params", "nonzero_params", "nonzero_macs")
"""What an arm states to have kept, each as a fraction of the dense network's."""
KINDS = ("cut", "rounds", "continued", "dense", "scratch", "narrowed")
"""Cuts in a trained network; rounds of masks; the trained network trained on without a cut; and the controls: the dense
network, the shape of a compact network trained from scratch, and the network of smaller width."""
BUDGETS_ON = ("macs", "params", "channels", "latency")
EQUAL = ("cost", "steps")
LONGEST_NAME = 100
"""Characters that the name of a network or a method may have."""
MOST = 1e30
"""No fraction, cost or time is larger: ratios and sums of them stay numbers."""


@dataclass(frozen=True)
class ArmLatency:
    """Measured latency of an arm's network as a part of the dense network's.

    Args:
        ratio: Latency kept, above 0; 1 is the dense network's.
        low: Lower end of its 95 % interval.
        high: Upper end.
        batch_size: Examples of a batch.
        threads: Of the measuring process.
        device: On which both ran.
    """

    ratio: float
    low: float
    high: float
    batch_size: int
    threads: int
    device: str

    def __post_init__(self) -> None:
        for name in ("ratio", "low", "high"):
            object.__setattr__(self, name, _number(getattr(self, name), f"latency.{name}"))
        if not 0 < self.low <= self.ratio <= self.high:
            raise ConfigError(
                f"latency: ratio={self.ratio}, low={self.low}, high={self.high}: expected 0 < low <= ratio <= high."
            )
        for name in ("batch_size", "threads"):
            _whole(getattr(self, name), f"latency.{name}", least=1)
        _text(self.device, "latency.device")


@dataclass(frozen=True)
class ArmStage:
    """One training of an arm.

    Args:
        folder: Of its run, relative to the sweep's.
        macs: Multiply-adds that it executed, at least 0.
        steps: Optimizer steps.
        seconds: Wall-clock time.
    """

    folder: str
    macs: float
    steps: int
    seconds: float

    def __post_init__(self) -> None:
        _text(self.folder, "cost.stages: folder", longest=4096)
        for name in ("macs", "seconds"):
            object.__setattr__(self, name, _number(getattr(self, name), f"cost.stages: {name}"))
        _whole(self.steps, "cost.stages: steps")


@dataclass(frozen=True)
class ArmCost:
    """What an arm's trainings cost together.

    Args:
        macs: Multiply-adds executed, at least 0: forward and backward passes, and what chose the cut.
        limit: What it might spend; ``None`` where something else was equal.
        seconds: Wall-clock time.
        stages: In order.
    """

    macs: float
    limit: float | None
    seconds: float
    stages: tuple[ArmStage, ...] = ()

    def __post_init__(self) -> None:
        for name in ("macs", "seconds"):
            object.__setattr__(self, name, _number(getattr(self, name), f"cost.{name}"))
        if self.limit is not None:
            object.__setattr__(self, "limit", _number(self.limit, "cost.limit"))
            if self.limit == 0:
                raise ConfigError("cost.limit=0: expected more than 0, or nothing where the cost is not limited.")
        object.__setattr__(self, "stages", tuple(self.stages))

    @property
    def deviation(self) -> float | None:
        """Of the cost from the limit, as a part of it; negative where less was spent; None without a limit."""
        return None if self.limit is None else self.macs / self.limit - 1


@dataclass(frozen=True)
class Arm:
    """One arm of a sweep.

    Args:
        network: Its name in the sweep.
        method: Its name in the sweep.
        kind: One of :data:`KINDS`.
        seed: Of initialisation, data order and everything else.
        kept: ``{name: fraction of the dense network's}`` for each of :data:`KEPT`; multiplications by 0 are left out of
            ``nonzero_macs``, parameters that are 0 out of ``nonzero_params``.
        metrics: ``{name: value}`` of the network that the arm ends with.
        cost: Of all its trainings.
        budget: What was to be kept, in (0, 1]; None where nothing is removed.
        budget_on: What the budget is a fraction of, one of :data:`BUDGETS_ON`; None without a budget.
        equal: What a control has in common with the other arms, ``"cost"`` or ``"steps"``.
        of: The method whose compact network gives the shape of a ``"scratch"`` arm, where there is one.
        latency: As measured; None where it was not.
        before: Metrics right before the cut; None where nothing is cut.
        after_cut: Metrics right after the cut, before any training; None where nothing is cut or it was not measured.
        commands: The words of each command line that made it.
        versions: Of this library and of what it builds on; JSON content.
        folder: Where the record was read from; no part of it.

    Raises:
        ConfigError: A value of the wrong type or out of its range.
    """

    network: str
    method: str
    kind: str
    seed: int
    kept: Mapping[str, float]
    metrics: Mapping[str, float]
    cost: ArmCost
    budget: float | None = None
    budget_on: str | None = None
    equal: str = "cost"
    of: str | None = None
    latency: ArmLatency | None = None
    before: Mapping[str, float] | None = None
    after_cut: Mapping[str, float] | None = None
    commands: Sequence[Sequence[str]] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("network", "method"):
            _text(getattr(self, name), name)
        if self.of is not None:
            _text(self.of, "of")
        _choice(self.kind, KINDS, "kind")
        _choice(self.equal, EQUAL, "equal")
        _whole(self.seed, "seed")
        if (self.budget is None) != (self.budget_on is None):
            raise ConfigError(
                f"budget={self.budget!r:.80}, budget_on={self.budget_on!r:.80}: expected both or neither."
            )
        if self.budget is not None:
            object.__setattr__(self, "budget", _number(self.budget, "budget"))
            if not 0 < self.budget <= 1:
                raise ConfigError(f"budget={self.budget}: expected a fraction in (0, 1].")
            _choice(self.budget_on, BUDGETS_ON, "budget_on")
        kept = _numbers(self.kept, "kept")
        if set(kept) != set(KEPT):
            raise ConfigError(f"kept has {', '.join(sorted(kept)) or 'nothing'}; expected {', '.join(KEPT)}.")
        object.__setattr__(self, "kept", {name: _number(kept[name], f"kept.{name}") for name in KEPT})
        object.__setattr__(self, "metrics", _numbers(self.metrics, "metrics"))
        for name in ("before", "after_cut"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _numbers(getattr(self, name), name))
        object.__setattr__(self, "commands", tuple(_words(command) for command in self.commands))
        object.__setattr__(self, "versions", to_plain(_mapping(self.versions, "versions"), "versions"))

    def to_json(self) -> dict[str, Any]:
        """The arm as JSON content; numbers that JSON cannot hold become the texts ``"NaN"`` and ``"Infinity"``."""
        own = asdict(self)
        own.pop("folder")
        return encode({"format": FORMAT, "version": VERSION} | own)

    def write(self, path: str | Path) -> None:
        """Write the arm to a file, or as ``arm.json`` to a folder, whole and atomically.

        Raises:
            WriteError: The system could not write.
        """
        path = Path(path)
        write_json(path if path.suffix == ".json" else path / ARM_NAME, self.to_json())

    @classmethod
    def from_json(cls, content: Any, where: str = "the arm") -> "Arm":
        """Undo :meth:`to_json`.

        Args:
            content: What :meth:`to_json` gave, from a source that nobody vouches for.
            where: Where it comes from, for the message.

        Raises:
            FileFormatError: Foreign, of a later version, with parts missing, or with values out of their range.
        """
        check_header(content, "arm of a sweep", where, FORMAT, VERSION)
        try:
            given = decode({name: value for name, value in content.items() if name not in ("format", "version")})
            given["cost"] = _cost(given.get("cost"))
            if given.get("latency") is not None:
                given["latency"] = ArmLatency(**_mapping(given["latency"], "latency"))
            return cls(**given, folder=None)
        except (ConfigError, TypeError, RecursionError) as error:
            reason = str(error).replace("Arm.__init__() ", "").replace("__init__()", "")
            raise FileFormatError(f"{where} is damaged: {reason[:300]}") from error

    @classmethod
    def read(cls, path: str | Path) -> "Arm":
        """Read an arm from its file, or from the folder that holds its ``arm.json``.

        Raises:
            FileFormatError: Missing, truncated, foreign, damaged, or written by a later version.
        """
        path = Path(path)
        path = path / ARM_NAME if path.is_dir() else path
        arm = cls.from_json(read_json(path, "an arm of a sweep"), where=str(path))
        object.__setattr__(arm, "folder", path.parent)
        return arm


def _cost(content: Any) -> ArmCost:
    given = dict(_mapping(content, "cost"))
    stages = given.pop("stages", [])
    if not isinstance(stages, list):
        raise ConfigError(f"cost.stages={stages!r:.80}: expected a list.")
    return ArmCost(**given, stages=tuple(ArmStage(**_mapping(stage, "cost.stages")) for stage in stages))


def _mapping(content: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{name}={content!r:.80}: expected names and values.")
    return content


def _numbers(content: Any, name: str) -> dict[str, float]:
    """A mapping to numbers, also those that are not finite: a training may have diverged."""
    return {key: _float(value, f"{name}.{key:.40}") for key, value in _mapping(content, name).items()}


def _number(value: Any, name: str) -> float:
    """A number from 0 to :data:`MOST`."""
    number = _float(value, name)
    if not 0 <= number <= MOST:
        raise ConfigError(f"{name}={number}: expected a number from 0 to {MOST:g}.")
    return number


def _float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r:.80}: expected a number.")
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{name}: expected a number that a float can hold.") from error


def _whole(value: Any, name: str, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ConfigError(f"{name}={value!r:.80}: expected a whole number of at least {least}.")


def _text(value: Any, name: str, longest: int = LONGEST_NAME) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise ConfigError(f"{name}={value!r:.80}: expected text of 1 to {longest} printable characters.")


def _choice(value: Any, choices: Sequence[str], name: str) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={value!r:.80}: expected one of {', '.join(choices)}.")


def _words(command: Any) -> tuple[str, ...]:
    if isinstance(command, str) or not isinstance(command, list | tuple):
        raise ConfigError(f"commands: {command!r:.80}: expected the words of each command line.")
    if not all(isinstance(word, str) for word in command):
        raise ConfigError(f"commands: {command!r:.80}: expected words, each a text.")
    return tuple(command)
