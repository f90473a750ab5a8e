"""A recipe's callbacks with a method's changes: what stands in the command line of one fit."""

import copy
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_prune import callbacks as own
from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.recipes import parse_yaml

_CALLBACKS = "trainer.callbacks."


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's content, not to be changed.

    Raises:
        FileFormatError: It cannot be read, or is no recipe.
    """
    try:
        content = _parsed(path, path.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError, FileFormatError) as error:
        raise FileFormatError(f"{path} cannot be read as a recipe: {error}") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} is no recipe: expected a YAML file with model, data and trainer.")
    return content


@lru_cache(maxsize=64)
def _parsed(path: Path, changed: int) -> Any:
    return parse_yaml(path.read_text(encoding="utf-8"))


def callbacks_of(recipes: Sequence[Path]) -> list[dict[str, Any]]:
    """The callbacks of the last recipe that has any, each as ``{class_path, init_args}``."""
    found: list[dict[str, Any]] = []
    for path in recipes:
        trainer = read_recipe(path).get("trainer") or {}
        if trainer.get("callbacks") is not None:
            given = trainer["callbacks"]
            found = [_whole(entry) for entry in (given if isinstance(given, list) else [given])]
    return found


def _whole(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"class_path": entry, "init_args": {}}
    return {"class_path": entry["class_path"], "init_args": copy.deepcopy(entry.get("init_args") or {})}


def class_name(entry: Mapping[str, Any]) -> str:
    """The name of a callback's class, without its path."""
    return str(entry["class_path"]).rpartition(".")[2]


def is_for_callback(key: str) -> bool:
    """Whether a key of ``set`` is ``Class.argument``, or one below ``trainer.callbacks``."""
    return key[:1].isupper() or key.startswith(_CALLBACKS)


def change(callbacks: Sequence[dict[str, Any]], key: str, value: Any) -> bool:
    """Set an argument of a callback, in place.

    Args:
        callbacks: As :func:`callbacks_of` gives them.
        key: ``Class.argument`` (and further names, down into what the argument holds) changes every callback of this
            class; ``trainer.callbacks.init_args.argument`` the last one, as on the command line.
        value: The value.

    Returns:
        Whether there was such a callback.
    """
    if key.startswith(_CALLBACKS):
        names, chosen = key.removeprefix(_CALLBACKS).split("."), list(callbacks[-1:])
    else:
        names = key.split(".")[1:]
        chosen = [entry for entry in callbacks if class_name(entry) == key.split(".")[0]]
    names = names[1:] if names[:1] == ["init_args"] else names
    for entry in chosen:
        inside = entry["init_args"]
        for name in names[:-1]:
            inside = inside.setdefault(name, {})
        inside[names[-1]] = value
    return bool(chosen)


def set_budget(callbacks: Sequence[dict[str, Any]], budget: float, where: Path, at: str | None = None) -> str:
    """Give the pruner its budget, in place, and the time of its cut unless that is the recipe's own.

    Returns:
        What the budget is a fraction of: ``"macs"``, ``"params"``, ``"channels"`` or ``"latency"``, as the recipe has
        it.

    Raises:
        ConfigError: No callback has one budget.
    """
    pruners = [entry for entry in callbacks if "budget" in entry["init_args"]]
    given = pruners[0]["init_args"]["budget"] if len(pruners) == 1 else None
    inner = given.get("init_args") if isinstance(given, dict) else None
    if not inner or len(inner) != 1:
        raise ConfigError(
            f"{where}: a method of kind cut needs one callback with one budget, such as "
            "budget: {class_path: lightning_prune.Budget, init_args: {macs: 0.5}}."
        )
    (what,) = inner
    inner[what] = budget
    if at is not None:
        pruners[0]["init_args"]["at"] = at
    return str(what)


def set_seeds(callbacks: Iterable[dict[str, Any]], seed: int) -> None:
    """Seed, in place, this library's callbacks that draw numbers of their own and have no seed in the recipe."""
    for entry in callbacks:
        module, _, name = str(entry["class_path"]).rpartition(".")
        built = getattr(own, name, None) if module.split(".")[0] == "lightning_prune" else None
        if built is not None and "seed" in inspect.signature(built).parameters:
            entry["init_args"].setdefault("seed", seed)


def filled(value: Any, seed: int) -> Any:
    """A value of ``set``; ``"{seed}"`` in a text stands for the seed."""
    if isinstance(value, str) and "{seed}" in value:
        return seed if value == "{seed}" else value.replace("{seed}", str(seed))
    return value


def option(key: str, value: Any) -> str:
    """``--key=value`` as the command line reads it."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
