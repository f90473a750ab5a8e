"""Example inputs inside a fit: the user's, else the module's, else two samples of the training data."""

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.errors import ConfigError
from lightning_prune.resume import undisturbed
from lightning_prune.running import map_tensors

_SAMPLES = 2


def find_module(pl_module: pl.LightningModule, name: str | None) -> str:
    """Name of the module whose forward pass is followed.

    Args:
        pl_module: The LightningModule.
        name: A submodule of it; ``None``: the LightningModule where it defines ``forward``, else its only child that
            has parameters.

    Returns:
        The name; ``""`` is the LightningModule itself.

    Raises:
        ConfigError: No such module, or several children and no ``forward``.
    """
    if name is not None:
        try:
            pl_module.get_submodule(name)
        except AttributeError as error:
            there = ", ".join(n for n, _ in pl_module.named_children())
            raise ConfigError(
                f"module={name!r}: this {type(pl_module).__name__} has no such module; its children: {there}."
            ) from error
        return name
    if type(pl_module).forward is not pl.LightningModule.forward:
        return ""
    children = [n for n, m in pl_module.named_children() if next(m.parameters(), None) is not None]
    own = next(pl_module.parameters(recurse=False), None)
    if len(children) == 1 and own is None:
        return children[0]
    raise ConfigError(
        f"{type(pl_module).__name__} defines no forward(), and its weights lie in several places "
        f"({', '.join(children) or 'itself'}): name the network with module='...', or define forward()."
    )


def given_inputs(given: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Example inputs that need no data: the argument, else the module's ``example_input_array``.

    Returns:
        Inputs as :func:`trace_channels` takes them, on the module's device; ``None`` where there are none.
    """
    for inputs in (given, pl_module.example_input_array):
        if inputs is not None:
            return _to_device(inputs, trainer, pl_module)
    return None


def early_inputs(given: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, module: nn.Module) -> Any:
    """Example inputs before the first batch: :func:`given_inputs`, else of :func:`samples`, else ``None``."""
    inputs = given_inputs(given, trainer, pl_module)
    if inputs is not None:
        return inputs
    with undisturbed(trainer.strategy.root_device):
        batch = samples(trainer)
        return None if batch is None else inputs_of(to_batch(batch, trainer, pl_module), module)


def samples(trainer: pl.Trainer) -> Any:
    """The first two samples of the training data, collated; ``None`` where its data set cannot be indexed.

    The loader's iterator is not touched.
    """
    loader = trainer.train_dataloader
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return None
    data: Any = loader.dataset
    return loader.collate_fn([data[i] for i in range(min(_SAMPLES, len(data)))])


def to_batch(batch: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """What the trainer would make of a collated batch: the module's precision, hooks and device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module.on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch, pl_module.device, 0)


def inputs_of(batch: Any, module: nn.Module) -> Any:
    """Two samples of what :func:`arguments_of` gives."""
    return _first_samples(arguments_of(batch, module))


def arguments_of(batch: Any, module: nn.Module) -> Any:
    """The part of a training batch that goes into ``module``.

    A mapping gives keyword arguments by their names; a sequence its first items, as many as ``forward`` asks for;
    anything else is the one argument.

    Raises:
        ConfigError: The batch does not fit ``forward``.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in positional if p.default is p.empty]
    if isinstance(batch, Mapping):
        names = {p.name for p in parameters}
        inputs: Any = {name: value for name, value in batch.items() if name in names}
        fits = bool(inputs) and set(needed) <= set(inputs)
    elif isinstance(batch, list | tuple):
        count = max(1, len(needed))
        inputs, fits = tuple(batch[:count]), len(batch) >= count
    else:
        inputs, fits = (batch,), len(needed) <= 1
    if not fits:
        raise ConfigError(
            f"the training batch does not tell what {type(module).__name__}.forward({', '.join(needed)}) takes. Give "
            "example_inputs (a tuple of arguments, or a dict of keyword arguments), or set "
            "self.example_input_array on the LightningModule."
        )
    return inputs


def _first_samples(inputs: Any) -> Any:
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(len(t)) if t.dim() else None, inputs)
    if not sizes:
        return inputs

    def cut(tensor: Tensor) -> Tensor:
        shared = tensor.dim() > 0 and len(tensor) == sizes[0]
        return (tensor[:_SAMPLES] if shared else tensor).detach().clone()

    return map_tensors(cut, inputs)


def _to_device(inputs: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    inputs = map_tensors(lambda t: t.detach().to(pl_module.device), inputs)
    return trainer.precision_plugin.convert_input(inputs)
