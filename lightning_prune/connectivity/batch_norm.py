"""Statistics of normalisation layers, estimated anew on data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.channels.recording import call_model, map_tensors
from lightning_prune.errors import ConfigError


def tracked_norms(model: nn.Module) -> list[_NormBase]:
    """The normalisation layers of ``model`` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace running means and variances by those of ``batches``, in place; nothing else of the model changes.

    Each statistic becomes the plain mean of its values over the batches. Only normalisation layers run in training
    mode meanwhile; dropout stays as the model has it.

    Args:
        model: The network, in the mode in which the rest of it should run.
        batches: Inputs, or ``(inputs, labels)`` as loaders give them: of a tuple or list the first entry is taken.
            Inputs that are a tuple hold positional arguments, a dict keyword arguments, anything else is one argument.

    Raises:
        ConfigError: No batch.
    """
    layers = tracked_norms(model)
    before = [(layer, layer.training, layer.momentum) for layer in layers]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen = 0
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
            layer.train()
        for batch in batches:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            call_model(model, map_tensors(lambda tensor: tensor.to(device), inputs))
            seen += 1
    finally:
        for layer, training, momentum in before:
            layer.training, layer.momentum = training, momentum
    if not seen:
        raise ConfigError("no batch to estimate statistics on: `batches` is empty, or an iterator that has run out.")


def check_batches(batches: Any) -> None:
    """Refuse what can be gone through only once: every point of a line needs the data.

    Raises:
        ConfigError: Nothing, a tensor, or an iterator.
    """
    if batches is None or isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"batch_norm='recalibrate' needs batches=..., a list of inputs or a DataLoader of training data; got "
            f"{type(batches).__name__}."
        )
    if iter(batches) is batches:
        raise ConfigError("batches is an iterator, which ends after the first point; give a list or a DataLoader.")
