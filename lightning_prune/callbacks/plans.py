"""Removal plans in Lightning's checkpoints: written with the weights, carried out before these are loaded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.core.saving import _load_state
from torch import nn

from lightning_prune.callbacks import monitors
from lightning_prune.channels.compact import plans_of, remember
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.errors import ConfigError, FileFormatError, MaskMismatchError
from lightning_prune.files import read_checkpoint
from lightning_prune.prunable import canonical_name
from lightning_prune.wrappers import bare, uncompiled

KEY = "lightning_prune_plans"
VERSION = 1

Module = TypeVar("Module", bound=pl.LightningModule)


def write_plans(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put the plans carried out on ``module`` and its submodules into a checkpoint, as JSON content."""
    found: dict[str, list[Any]] = {}
    for name, part in bare(module).named_modules():
        name = canonical_name(name)
        if name not in found and plans_of(part):
            found[name] = [plan.to_json() for plan in plans_of(part)]
    checkpoint[KEY] = {"version": VERSION, "plans": found}


def read_plans(checkpoint: dict[str, Any], where: str) -> dict[str, list[RemovalPlan]]:
    """The plans of a checkpoint by submodule; empty if none is in it.

    Raises:
        FileFormatError: Damaged, or written by a later version.
    """
    content = checkpoint.get(KEY)
    if content is None:
        return {}
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise FileFormatError(
            f"{where} holds removal plans of version {version}, this library reads up to {VERSION}; upgrade "
            "lightning-prune."
        )
    try:
        return {name: [RemovalPlan.from_json(plan) for plan in plans] for name, plans in content["plans"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"{where}: its removal plans are damaged ({type(error).__name__}: {error}).") from error


def replay(module: nn.Module, checkpoint: dict[str, Any], where: str = "the checkpoint") -> None:
    """Give a module the widths that a checkpoint's weights have; what was carried out on it already is left alone.

    Raises:
        MaskMismatchError: The plans are for another architecture, or the module was cut in another way.
        FileFormatError: The plans cannot be read.
    """
    module = bare(module)
    plans = read_plans(checkpoint, where)
    with uncompiled(module):
        parts = dict(module.named_modules())
        for name in [*plans, *(n for n, part in parts.items() if plans_of(part) and n not in plans)]:
            if name not in parts:
                raise MaskMismatchError(
                    f"{where} holds a removal plan for {name!r}, which this {type(module).__name__} does not have. "
                    "Give a fresh module of the class that the checkpoint was written from."
                )
            done, wanted = plans_of(parts[name]), plans.get(name, [])
            if [plan.digest() for plan in done] != [plan.digest() for plan in wanted[: len(done)]]:
                raise MaskMismatchError(
                    f"{name or type(module).__name__} has lost channels already, in {len(done)} cuts, and {where} is "
                    f"after {len(wanted)} cuts that do not go on from there. Give a fresh module of the original width."
                )
            for plan in wanted[len(done) :]:
                plan.apply_(parts[name])
                remember(parts[name], plan)


class _Hook:
    """Stands in for a module's checkpoint hook, does something more, and can be pickled and copied with the module."""

    def __init__(self, module: pl.LightningModule, name: str) -> None:
        self.module, self.name = module, name
        self.hidden = vars(module).get(name)

    def original(self, checkpoint: dict[str, Any]) -> None:
        """Call what this hook hides."""
        call: Callable[..., None] = self.hidden or partial(getattr(type(self.module), self.name), self.module)
        call(checkpoint)

    def undo(self) -> None:
        """Give the module its own hook back."""
        vars(self.module).pop(self.name, None)
        if self.hidden is not None:
            vars(self.module)[self.name] = self.hidden


class _SaveHook(_Hook):
    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.original(checkpoint)
        write_plans(checkpoint, self.module)


class _LoadHook(_Hook):
    def __call__(self, checkpoint: dict[str, Any]) -> None:
        replay(self.module, checkpoint)
        if self.module._trainer is not None:
            for average in monitors.averages(self.module.trainer):
                replay(average.module, checkpoint)  # type: ignore[arg-type]
        self.original(checkpoint)


def keep_plans(pl_module: pl.LightningModule) -> None:
    """Let the module's checkpoints hold its plans, and loading one carry them out; once is enough."""
    for name, kind in (("on_save_checkpoint", _SaveHook), ("on_load_checkpoint", _LoadHook)):
        if not isinstance(vars(pl_module).get(name), _Hook):
            setattr(pl_module, name, kind(pl_module, name))


def forget_plans(pl_module: pl.LightningModule) -> None:
    """Undo :func:`keep_plans`, but let a module that has lost channels go on saying so in its checkpoints."""
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        hook = vars(pl_module).get(name)
        compact = any(plans_of(part) for part in pl_module.modules())
        if isinstance(hook, _LoadHook) or (isinstance(hook, _SaveHook) and not compact):
            hook.undo()


def load_compact_checkpoint(
    module: Module | type[Module], path: str | Path, map_location: Any = "cpu", **arguments: Any
) -> Module:
    """Load a Lightning checkpoint of a network that has lost channels; what ``load_from_checkpoint`` cannot.

    The checkpoint's plans are carried out on the fresh module, then its weights are loaded. The file is read with
    ``weights_only=True``: no code in it can run.

    Args:
        module: A fresh LightningModule of the original width, which is changed, or its class, which is built with the
            hyper-parameters in the checkpoint (``save_hyperparameters``).
        path: The checkpoint.
        map_location: Device of the weights that are read; a module that is given keeps its own.
        arguments: With a class: constructor arguments that the checkpoint lacks or that should replace its own.

    Returns:
        The module.

    Raises:
        FileFormatError: Missing, damaged, not readable as weights only, of a later version, or without plans.
        MaskMismatchError: A module of another architecture, or one that has lost other channels.
        ConfigError: Constructor arguments for a module that is built already.

    Example:
        ``network = load_compact_checkpoint(MyModule, "runs/version_0/checkpoints/epoch=9.ckpt")``
    """
    checkpoint = read_checkpoint(path, map_location)
    if KEY not in checkpoint:
        raise FileFormatError(
            f"{path} holds no removal plans: no pruner of channels was among the trainer's callbacks. Load it with "
            "load_from_checkpoint."
        )
    try:
        if isinstance(module, type):
            return _built(module, checkpoint, str(path), arguments)
        if arguments:
            raise ConfigError(
                f"{', '.join(arguments)}: constructor arguments go with a class, but a module that is built was given."
            )
        replay(module, checkpoint, str(path))
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        said = " ".join(str(error).split()).rstrip(". ")
        raise MaskMismatchError(f"{path} does not fit: {said}. Give a fresh module of its class.") from error
    return module


def _built(cls: type[Module], checkpoint: dict[str, Any], where: str, arguments: dict[str, Any]) -> Module:
    """Let Lightning build the module from its hyper-parameters; a subclass shrinks it before the weights are loaded."""

    def on_load_checkpoint(self: Module, loaded: dict[str, Any]) -> None:
        replay(self, loaded, where)
        cls.on_load_checkpoint(self, loaded)

    shrinking = type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})
    module: Any = _load_state(shrinking, checkpoint, **arguments)
    module.__class__ = cls
    return module
