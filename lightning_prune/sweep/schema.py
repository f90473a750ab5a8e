"""What a sweep file says, checked: which networks, methods, budgets and seeds, and what each arm may spend."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.recipes import parse_yaml

KINDS = {
    "cut": {"recipe", "first_recipe", "set", "first_set"},
    "whole": {"recipe", "set"},
    "rounds": {"recipe", "set", "rewind", "rounds", "fraction"},
    "dense": {"set"},
    "continued": {"set"},
    "scratch": {"set", "of", "equal"},
    "narrowed": {"set", "equal"},
}
"""The kinds of method, and the keys that each may have beside ``kind`` and ``networks``.

- ``cut``: the shared first training, then a recipe whose pruner has a budget.
- ``whole``: the same in one fit, for pruners that must see the training before their cut; it comes where the first
  training would end.
- ``rounds``: all rounds of a mask in one fit.
- ``dense``: the dense network, one training. ``continued``: the first training, then the rest without a cut.
- ``scratch``: the shape of the compact network of method ``of`` with fresh weights.
- ``narrowed``: the widest network of the same class whose multiply-adds stay within the budget.
"""
_NETWORK_KEYS = {"class", "width", "args", "set", "steps"}
_SWEEP_KEYS = {
    "recipe", "output", "steps", "first", "networks", "budgets", "seeds", "methods", "input", "checkpoint_every",
    "latency",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class NetworkChoice:
    """A network of the sweep.

    Args:
        name: In folders and reports.
        path: The class, by its import path; it takes an argument ``width``.
        width: Of the dense network.
        args: Its other arguments.
        changes: Of every recipe, for this network: ``{key: value}``.
        steps: What an arm may spend, where this network's differs from the sweep's.
    """

    name: str
    path: str
    width: float
    args: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None

    def spec(self, width: float | None = None) -> dict[str, Any]:
        """The network as a recipe names it, at its own or another width."""
        return {"class_path": self.path, "init_args": {"width": self.width if width is None else width, **self.args}}


@dataclass(frozen=True)
class Method:
    """A method of the sweep, or a control.

    Args:
        name: In folders and reports.
        kind: See :data:`KINDS`.
        recipe: Of a cut, or of the rounds.
        first_recipe: Of the first training; ``None``: the sweep's.
        changes: Of the recipe: ``{key: value}``.
        first_changes: Of the recipe of the first training.
        rewind: The rewinding point as a share of one training, in [0, 1); ``None``: the recipe's own.
        rounds: Cuts; ``None``: as many as take about ``fraction`` each.
        fraction: Share of the remaining weights that a cut is to take.
        of: The method whose compact network gives the shape.
        equal: What a control has in common with the other arms: ``"cost"`` or ``"steps"``.
        networks: Those that it suits; ``None``: all.
    """

    name: str
    kind: str
    recipe: Path | None = None
    first_recipe: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    first_changes: Mapping[str, Any] = field(default_factory=dict)
    rewind: float | None = None
    rounds: int | None = None
    fraction: float = 0.5
    of: str | None = None
    equal: str = "cost"
    networks: tuple[str, ...] | None = None

    def suits(self, network: str) -> bool:
        """Whether there are arms of it for a network."""
        return self.networks is None or network in self.networks

    @property
    def cuts(self) -> bool:
        """Whether its networks end compact."""
        return self.kind in ("cut", "whole")

    @property
    def has_budget(self) -> bool:
        """Whether there is an arm for each budget."""
        return self.kind not in ("dense", "continued")


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Args:
        recipe: Every training is this one, with changes.
        output: Folder of all runs.
        steps: What an arm may spend: as much as so many steps of the dense network.
        first: Share of it that trains the dense network before a cut, in (0, 1).
        networks: By name.
        budgets: What is kept, each in (0, 1).
        seeds: Each at least 0.
        methods: By name.
        input: Shape of one example, without the batch; ``None``: that of the recipe's training data.
        checkpoint_every: Steps between checkpoints from which a killed run goes on.
        latency: How latency is measured: ``batch_size``, ``seconds``, ``threads``, ``device``.
    """

    recipe: Path
    output: Path
    steps: int
    first: float
    networks: Mapping[str, NetworkChoice]
    budgets: Sequence[float]
    seeds: Sequence[int]
    methods: Mapping[str, Method]
    input: tuple[int, ...] | None = None
    checkpoint_every: int = 200
    latency: Mapping[str, Any] = field(default_factory=dict)


def percent(budget: float) -> str:
    """A budget as part of a folder's name: 0.5 is ``50``, 0.125 is ``12.5``."""
    return f"{100 * budget:.6g}"


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep file; paths of recipes in it are relative to it, the output folder to the working directory.

    Raises:
        FileFormatError: It cannot be read.
        ConfigError: A key that is unknown or missing, or a value out of range.
    """
    path = Path(path)
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, FileFormatError) as error:
        raise FileFormatError(f"{path} cannot be read as a sweep file: {error}") from error
    reader = _Reader(path)
    top = reader.mapping(content, "the file")
    reader.known(top, _SWEEP_KEYS, "the file", {"recipe", "steps", "networks", "budgets", "seeds", "methods"})
    networks = {name: reader.network(name, entry) for name, entry in reader.named(top, "networks")}
    methods = {name: reader.method(name, entry, [*networks]) for name, entry in reader.named(top, "methods")}
    for method in methods.values():
        if method.kind == "scratch" and (method.of not in methods or not methods[str(method.of)].cuts):
            cuts = ", ".join(name for name, other in methods.items() if other.cuts) or "(none)"
            raise ConfigError(f"{path}: methods.{method.name}.of={method.of!r}: expected a method of kind cut: {cuts}.")
    shape = top.get("input")
    return Sweep(
        reader.file(top["recipe"], "recipe"),
        Path(str(top.get("output", "runs/sweep"))),
        reader.count(top["steps"], "steps"),
        reader.share(top.get("first", 0.6), "first"),
        networks,
        [reader.share(value, "budgets") for value in reader.listed(top["budgets"], "budgets")],
        [reader.count(value, "seeds", least=0) for value in reader.listed(top["seeds"], "seeds")],
        methods,
        None if shape is None else tuple(reader.count(n, "input") for n in reader.listed(shape, "input")),
        reader.count(top.get("checkpoint_every", 200), "checkpoint_every"),
        reader.latency(top.get("latency", {})),
    )


class _Reader:
    """Says in which file and under which key a value is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key}: {value!r:.120}: expected {expected}.")

    def mapping(self, value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, value, "names and values (a YAML mapping)")
        return value

    def known(self, given: Mapping[str, Any], keys: set[str], where: str, needed: set[str]) -> None:
        for key in given:
            if key not in keys:
                raise ConfigError(f"{self.path}: {where}: unknown key {key!r}; choose from {', '.join(sorted(keys))}.")
        for key in sorted(needed - set(given)):
            raise ConfigError(f"{self.path}: {where}: {key} is missing.")

    def named(self, top: Mapping[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
        entries = self.mapping(top[key], key)
        if not entries:
            raise self.wrong(key, entries, "at least one")
        for name in entries:
            if not _NAME.fullmatch(name) or name.startswith("first"):
                raise ConfigError(
                    f"{self.path}: {key}.{name}: a name has letters, digits and underscores, and does not begin with "
                    "'first', which is the shared training's."
                )
        return [(name, self.mapping(entry, f"{key}.{name}")) for name, entry in entries.items()]

    def listed(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.wrong(key, value, "a list with at least one value")
        if len({repr(item) for item in value}) < len(value) and key != "input":
            raise self.wrong(key, value, "each value once")
        return value

    def count(self, value: Any, key: str, least: int = 1) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, value, f"a whole number of at least {least}")
        return value

    def number(self, value: Any, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.wrong(key, value, "a number above 0")
        return float(value)

    def share(self, value: Any, key: str, zero: bool = False) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        if not good or (value == 0 and not zero):
            raise self.wrong(key, value, f"a share in {'[' if zero else '('}0, 1)")
        return float(value)

    def file(self, value: Any, key: str) -> Path:
        if not isinstance(value, str):
            raise self.wrong(key, value, "the name of a recipe, relative to this file")
        found = self.path.parent / value
        if not found.is_file():
            raise ConfigError(f"{self.path}: {key}: there is no recipe {found}.")
        return found

    def network(self, name: str, entry: dict[str, Any]) -> NetworkChoice:
        where = f"networks.{name}"
        self.known(entry, _NETWORK_KEYS, where, {"class", "width"})
        path = entry["class"]
        if not isinstance(path, str) or "." not in path:
            raise self.wrong(f"{where}.class", path, "a class by its import path, such as a.b.Network")
        return NetworkChoice(
            name,
            path,
            self.number(entry["width"], f"{where}.width"),
            self.mapping(entry.get("args", {}), f"{where}.args"),
            self.mapping(entry.get("set", {}), f"{where}.set"),
            self.count(entry["steps"], f"{where}.steps") if "steps" in entry else None,
        )

    def method(self, name: str, entry: dict[str, Any], networks: Sequence[str]) -> Method:
        where = f"methods.{name}"
        kind = entry.get("kind")
        if kind not in KINDS:
            raise self.wrong(f"{where}.kind", kind, f"one of {', '.join(KINDS)}")
        needed = {"cut": {"recipe"}, "whole": {"recipe"}, "rounds": {"recipe"}, "scratch": {"of"}}.get(kind, set())
        self.known(entry, KINDS[kind] | {"kind", "networks"}, f"{where} (of kind {kind})", needed)
        equal = entry.get("equal", "cost")
        if equal not in ("cost", "steps"):
            raise self.wrong(f"{where}.equal", equal, "cost or steps")
        recipes = {
            key: self.file(entry[key], f"{where}.{key}") if key in entry else None for key in ("recipe", "first_recipe")
        }
        return Method(
            name,
            kind,
            recipes["recipe"],
            recipes["first_recipe"],
            self.mapping(entry.get("set", {}), f"{where}.set"),
            self.mapping(entry.get("first_set", {}), f"{where}.first_set"),
            self.share(entry["rewind"], f"{where}.rewind", zero=True) if "rewind" in entry else None,
            self.count(entry["rounds"], f"{where}.rounds") if "rounds" in entry else None,
            self.share(entry.get("fraction", 0.5), f"{where}.fraction"),
            entry.get("of"),
            equal,
            self.names(entry["networks"], networks, f"{where}.networks") if "networks" in entry else None,
        )

    def names(self, value: Any, known: Sequence[str], key: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not value or not all(name in known for name in value):
            raise self.wrong(key, value, f"a list of networks, of {', '.join(known)}")
        return tuple(value)

    def latency(self, entry: Any) -> dict[str, Any]:
        given = self.mapping(entry, "latency")
        self.known(given, {"batch_size", "seconds", "threads", "device"}, "latency", set())
        return {
            "batch_size": self.count(given.get("batch_size", 64), "latency.batch_size"),
            "seconds": self.number(given.get("seconds", 2.0), "latency.seconds"),
            "threads": self.count(given.get("threads", 1), "latency.threads"),
            "device": str(given.get("device", "cpu")),
        }
