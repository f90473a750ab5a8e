"""What a run trains on what, for the record."""

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_prune.sharding import own_class


def describe_task(trainer: pl.Trainer, pl_module: pl.LightningModule, recipe: str | None = None) -> dict[str, Any]:
    """Class names of the module, of its networks and of its data, and the recipe, where they can be told.

    Args:
        trainer: The trainer, in a fit.
        pl_module: Its module.
        recipe: The file that the run was configured with.
    """
    networks = [c for c in pl_module.children() if next(c.parameters(), None) is not None]
    found = {
        "module": type(pl_module).__name__,
        "networks": ", ".join(own_class(network).__name__ for network in networks if not _is_plain(network)),
        "data": _data(trainer, pl_module),
        "recipe": recipe,
    }
    return {name: value for name, value in found.items() if value}


def _is_plain(network: nn.Module) -> bool:
    """Whether a class name says nothing about the network: torch's own layers and containers."""
    return own_class(network).__module__.startswith("torch.nn.")


def _data(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        return type(datamodule).__name__
    source = getattr(getattr(trainer.fit_loop, "_data_source", None), "instance", None)
    if source is None or isinstance(source, pl.LightningModule):
        return type(pl_module).__name__ if source is not None else None
    dataset = getattr(source, "dataset", source)
    return type(dataset).__name__
