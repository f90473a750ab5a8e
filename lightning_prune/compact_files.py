"""Compact models on disk: one safetensors file with the removal plans in its header."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.channels.compact import plans_of, remember
from lightning_prune.channels.left import parts_of
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.errors import ConfigError, FileFormatError, MaskMismatchError
from lightning_prune.files import read_tensors, write_tensors
from lightning_prune.wrappers import bare, uncompiled

KIND = "compact"
VERSION = 1


def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write a compact model: its tensors, and the plans that make a fresh model of the original code fit them.

    Args:
        model: A model that :func:`compact` (or :func:`load_compact`) shrank.
        path: The file, written atomically.

    Raises:
        ConfigError: Nothing was removed from this model, or its ``state_dict`` holds something that is no tensor.
    """
    plans = plans_of(model)
    if not plans:
        raise ConfigError(
            f"this {type(model).__name__} has no removal plan: compact() was not called on this very object. Save an "
            "unchanged model with torch.save(model.state_dict(), ...)."
        )
    model = bare(model)
    with uncompiled(model):
        state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(
                f"state_dict entry {name!r} is a {type(tensor).__name__}, expected a tensor; a compact file holds "
                "tensors "
                "only. Keep such state outside the model."
            )
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().clone()
    header = {"plans": [plan.to_json() for plan in plans], "aliases": aliases, "model": type(model).__name__}
    write_tensors(path, tensors, kind=KIND, version=VERSION, header=header)


def load_compact(fresh_model: nn.Module, path: str | Path) -> nn.Module:
    """Shrink a fresh model of the original code by the file's plans and load the weights. Nothing is unpickled.

    Args:
        fresh_model: A model built by the original code at its original width; changed in place.
        path: A file of :func:`save_compact`.

    Returns:
        The same model.

    Raises:
        FileFormatError: The file is missing, damaged, of another kind or of a later version.
        MaskMismatchError: The file belongs to another architecture; the model is then as it was.
    """
    tensors, header = read_tensors(path, kind=KIND, version=VERSION)
    try:
        plans = [RemovalPlan.from_json(content) for content in header["plans"]]
        aliases = dict(header["aliases"])
        state = OrderedDict({**tensors, **{name: tensors[source] for name, source in aliases.items()}})
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} has no readable plan ({type(error).__name__}: {error}).") from error
    model = bare(fresh_model)
    with uncompiled(model):
        _fill(model, path, plans, state, header.get("model"))
    for plan in plans:
        remember(model, plan)
    return fresh_model


def _fill(model: nn.Module, path: str | Path, plans: list[RemovalPlan], state: Any, written_for: Any) -> None:
    gone = tuple(f"{part}." for plan in plans for part in parts_of(plan.left))
    expected = {name for name in model.state_dict() if not name.startswith(gone)}
    if expected != set(state):
        missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
        raise MaskMismatchError(
            f"{path} holds a {written_for}, which does not fit this {type(model).__name__}: missing "
            f"{missing[:3]}, unexpected {extra[:3]}. Build the model with the code it was saved from."
        )
    for plan in plans:
        plan.apply_(model)
    wrong = [n for n, t in model.state_dict().items() if t.shape != state[n].shape]
    if wrong:
        raise FileFormatError(
            f"{path} is inconsistent: {wrong[0]} has shape {tuple(state[wrong[0]].shape)} after its plan."
        )
    metadata = getattr(model.state_dict(), "_metadata", None)
    if metadata is not None:  # layout versions of the modules' own; some refuse a state without them
        state._metadata = metadata
    model.load_state_dict(state)
