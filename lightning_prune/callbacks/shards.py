"""Snapshots of sharded parameters in checkpoints: in the form in which Lightning saves the parameters themselves.

Where the strategy writes a folder, to which every process adds its part (``torch.distributed.checkpoint``), a snapshot
is written there as one more entry of the optimizers' states, and read back part by part. Where the strategy brings
everything together on rank 0, a snapshot is too, one tensor after the other.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_prune.errors import ResumeError
from lightning_prune.sharding import any_sharded, collect, is_sharded, local, part_like, spread_like

States = list[dict[Any, dict[str, Any]]]
"""What each optimizer remembers, by the parameter's number and the name of the value."""


def put_snapshot(
    checkpoint: dict[str, Any], own: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None, states: States | None
) -> dict[str, Any]:
    """Add a snapshot to a checkpoint that is being written. A collective.

    Args:
        checkpoint: With what Lightning has made of the module and the optimizers.
        own: The module's parameters and buffers, by name.
        weights: This process's parts of them in the snapshot.
        states: What the optimizers remembered.

    Returns:
        What belongs into the callback's own state.
    """
    tensors = {f"weight/{name}": spread_like(part, own[name]) for name, part in (weights or {}).items()}
    values = dict(_by_place(states or []))
    tensors |= {place: value for place, value in values.items() if isinstance(value, Tensor)}
    about: dict[str, Any] = {
        "weights": None if weights is None else list(weights),
        "optimizers": None if states is None else len(states),
        "values": {place: _describe(value) for place, value in values.items()},
    }
    if any_sharded(checkpoint["state_dict"].values()):
        about["entry"] = f"optimizer_{len(checkpoint['optimizer_states'])}"  # as the strategy will name it
        checkpoint["optimizer_states"].append(tensors)
    else:
        about["whole"] = {name: tensor.cpu() for name, tensor in collect(tensors) if tensor is not None}
    return about


def get_snapshot(
    trainer: pl.Trainer, own: Mapping[str, Tensor], about: Mapping[str, Any]
) -> tuple[dict[str, Tensor] | None, States | None]:
    """This process's parts of a snapshot that :func:`put_snapshot` wrote. A collective.

    Args:
        trainer: The trainer, with the module and optimizers that were loaded.
        own: The module's parameters and buffers, by name.
        about: What :func:`put_snapshot` gave.

    Returns:
        Weights and optimizer states, as they were given.

    Raises:
        ResumeError: The checkpoint does not hold it.
    """
    tensors = {f"weight/{name}": _room(own[name], own[name].dtype) for name in about["weights"] or []}
    parameters = [[p for group in o.param_groups for p in group["params"]] for o in trainer.optimizers]
    for place, what in about["values"].items():
        if "dtype" in what:
            _, optimizer, number, _ = place.split("/", 3)
            dtype = getattr(torch, what["dtype"])
            like = parameters[int(optimizer)][int(number)]
            tensors[place] = _room(like, dtype) if what["sharded"] else torch.empty(what["shape"], dtype=dtype)
    if "entry" in about:
        _read_folder(str(trainer.ckpt_path), {about["entry"]: tensors})
    else:
        for name, tensor in tensors.items():
            local(tensor).copy_(part_like(about["whole"][name], tensor))
    weights = None
    if about["weights"] is not None:
        weights = {name: local(tensors[f"weight/{name}"]).cpu() for name in about["weights"]}
    if about["optimizers"] is None:
        return weights, None
    states: States = [{} for _ in range(about["optimizers"])]
    for place, what in about["values"].items():
        _, optimizer, number, key = place.split("/", 3)
        value = tensors[place] if "dtype" in what else what["value"]
        states[int(optimizer)].setdefault(int(number), {})[key] = value
    return weights, states


def _by_place(states: States) -> Iterator[tuple[str, Any]]:
    for optimizer, state in enumerate(states):
        for number, values in state.items():
            for key, value in values.items():
                yield f"state/{optimizer}/{number}/{key}", value


def _describe(value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"value": value}
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(value.shape), "sharded": is_sharded(value)}


def _room(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU in the layout of another, to read into."""
    return spread_like(torch.empty(local(like).shape, dtype=dtype), like)


def _read_folder(path: str, entries: dict[str, Any]) -> None:
    from torch.distributed.checkpoint import load

    try:
        load(entries, checkpoint_id=Path(path))
    except Exception as error:  # it gathers the errors of all processes in one of its own
        raise ResumeError(
            f"{path} does not hold the snapshot of the rewinding point as its callback's state says: {error}. Resume "
            "from another checkpoint."
        ) from error
