"""What runs leave beside their records: errors along lines between networks, ranks of feature maps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightning_prune.connectivity import ErrorPlane
from lightning_prune.connectivity.plane import FORMAT as PLANE_FORMAT
from lightning_prune.errors import FileFormatError
from lightning_prune.files import read_json

CONNECTIVITY_NAME, RANKS_NAME = "connectivity.json", "ranks.json"
_VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """Errors along the line between two networks.

    Attributes:
        alphas: Places on the line, from 0 to 1.
        errors: The error at each, in per cent.
        split: The data that it was measured on.
        barrier: The largest error minus the mean of the ends', in points.
        density: Fraction of the weights that the later network has left.
        rounds: The two rounds of one run; None: two copies that branched from one training.
        seed: Of the copies.
        step: At which the copies branched.
        treatment: What was done about BatchNorm and permutations.
    """

    alphas: tuple[float, ...]
    errors: tuple[float, ...]
    split: str
    barrier: float
    density: float
    rounds: tuple[int, int] | None = None
    seed: int = 0
    step: int = 0
    treatment: str = "interpolate"


@dataclass(frozen=True)
class Analysed:
    """What ``lightning-prune connectivity`` has left in one folder.

    Attributes:
        curves: Errors along the lines between copies.
        planes: Errors on planes through two copies and where they branched, by the folder below the analysis.
    """

    curves: Sequence[Curve]
    planes: Mapping[str, ErrorPlane] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRanks:
    """Mean ranks of one layer's feature maps, each over the largest possible, and which channels stayed at the cut."""

    name: str
    values: tuple[float, ...]
    kept: frozenset[int]


@dataclass(frozen=True)
class Ranks:
    """Ranks measured for one cut."""

    round: int
    images: int
    layers: tuple[LayerRanks, ...]


def curves_of_run(folder: Path) -> list[Curve]:
    """The lines between successive rounds of a run, as ``RoundConnectivity`` leaves them; empty without it.

    Raises:
        FileFormatError: Damaged, or of a later version.
    """
    path = folder / CONNECTIVITY_NAME
    return _read(path, "lightning_prune.rounds", _each("lines", _curve)) if path.is_file() else []


def curves_of_analysis(folder: Path) -> list[Curve]:
    """The lines that ``lightning-prune connectivity`` has measured; empty where it has not run.

    Raises:
        FileFormatError: Damaged, or of a later version.
    """
    path = folder / CONNECTIVITY_NAME
    return _read(path, "lightning_prune.connectivity", _each("lines", _curve)) if path.is_file() else []


def ranks_of_run(folder: Path) -> list[Ranks]:
    """The ranks that ``HRankPruner`` has measured, one entry a cut; empty without it.

    Raises:
        FileFormatError: Damaged, or of a later version.
    """
    path = folder / RANKS_NAME
    return _read(path, "lightning_prune.ranks", _each("cuts", _ranks)) if path.is_file() else []


def curves_of_runs(folders: Sequence[Path | None]) -> list[Curve]:
    """The lines of several runs; folders that are not known are passed over.

    Raises:
        FileFormatError: As for one.
    """
    return [curve for folder in folders if folder is not None for curve in curves_of_run(folder)]


def find_analyses(paths: Sequence[str | Path]) -> tuple[dict[str, Analysed], list[str]]:
    """Analyses under ``paths``, by folder, and a message for each file that cannot be read."""
    found: dict[str, Analysed] = {}
    problems: list[str] = []
    for path in map(Path, paths):
        for file in sorted(path.rglob(CONNECTIVITY_NAME)) if path.is_dir() else []:
            folder = file.parent
            curves = readable(curves_of_analysis, folder, problems)
            if curves:
                planes = {
                    place.parent.relative_to(folder).as_posix(): plane
                    for place in sorted(folder.rglob("plane*.json"))
                    for plane in readable(_planes, place, problems)
                }
                found[str(folder)] = Analysed(curves, planes)
    return found, problems


def readable(read: Callable[[Path], list[T]], path: Path, problems: list[str]) -> list[T]:
    """What is read; of damaged files nothing, and a message is added to ``problems``."""
    try:
        return read(path)
    except FileFormatError as error:
        problems.append(str(error))
        return []


def _planes(path: Path) -> list[ErrorPlane]:
    return _read(path, PLANE_FORMAT, lambda content: [ErrorPlane.from_json(content)])


def _each(key: str, build: Callable[[dict[str, Any]], T]) -> Callable[[dict[str, Any]], list[T]]:
    return lambda content: [build(entry) for entry in content[key]]


def _read(path: Path, wanted: str, build: Callable[[dict[str, Any]], list[T]]) -> list[T]:
    content = read_json(path, f"a file of {wanted}")
    if not isinstance(content, dict) or not str(content.get("format")).startswith("lightning_prune."):
        raise FileFormatError(f"{path} is no file of lightning_prune's: it names no such format.")
    if content["format"] != wanted:
        return []
    version = content.get("version")
    if version != _VERSION:
        raise FileFormatError(f"{path} has version {version}, this library reads {_VERSION}; upgrade lightning-prune.")
    try:
        return build(content)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, AttributeError) as error:
        raise FileFormatError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def _curve(entry: dict[str, Any]) -> Curve:
    split = next(name for name in reversed(entry["errors"]))
    errors, alphas = (tuple(map(float, values)) for values in (entry["errors"][split], entry["alphas"]))
    if len(errors) != len(alphas) or not all(map(math.isfinite, [*errors, *alphas])):
        raise ValueError("errors and alphas do not belong together")
    rounds = entry.get("rounds")
    density = entry["density"][1] if rounds is not None else entry["density"]
    treatment = str(entry.get("batch_norm", "interpolate")) + (", aligned" if entry.get("aligned") else "")
    return Curve(
        alphas,
        tuple(100 * error for error in errors),
        str(split),
        100 * float(entry["barriers"][split]),
        float(density),
        None if rounds is None else (int(rounds[0]), int(rounds[1])),
        int(entry.get("seed", 0)),
        int(entry.get("step", 0)),
        treatment,
    )


def _ranks(entry: dict[str, Any]) -> Ranks:
    layers = []
    for name, layer in entry["layers"].items():
        values = tuple(float(rank) / layer["limit"] for rank in layer["ranks"])
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"a rank of {name} is out of range")
        kept = range(len(values)) if layer["kept"] is None else layer["kept"]
        layers.append(LayerRanks(str(name), values, frozenset(map(int, kept))))
    return Ranks(int(entry["round"]), int(entry["images"]), tuple(layers))
