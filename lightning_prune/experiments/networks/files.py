"""Networks that begin with what an earlier run has left: its weights, or only its widths."""

from pathlib import Path

from torch import nn

from lightning_prune.compact_files import KIND, VERSION, load_compact
from lightning_prune.errors import ConfigError, MaskMismatchError
from lightning_prune.files import read_state_dict, read_tensors


def trained(network: nn.Module, weights: str | Path) -> nn.Module:
    """Load trained weights into a network, so that a run begins where another one has ended.

    Args:
        network: Of the very widths that were trained; changed in place.
        weights: A checkpoint of :class:`ImageClassifier` (its network is taken), or a ``state_dict`` of the network,
            written by ``torch.save`` or as safetensors. Nothing in it is unpickled into code.

    Returns:
        The same network.

    Raises:
        FileFormatError: The file is missing, damaged, or holds no tensors by name.
        MaskMismatchError: Its tensors do not fit the network.

    Example:
        >>> import tempfile
        >>> import torch
        >>> network = nn.Linear(2, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(network.state_dict(), f"{folder}/weights.pt")
        ...     copy = trained(nn.Linear(2, 3), f"{folder}/weights.pt")
        >>> torch.equal(copy.weight, network.weight)
        True
    """
    state = read_state_dict(weights)
    inside = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
    state = inside or state  # a classifier's checkpoint has the network under this name
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        first = " ".join(str(error).split())[:300]
        raise MaskMismatchError(
            f"{weights} does not fit this {type(network).__name__}: {first}. Build the network as it was trained: with "
            "the same width and number of classes."
        ) from error
    return network


def shaped_like(network: nn.Module, compact: str | Path) -> nn.Module:
    """Shrink a network to the widths of a compact one and draw fresh weights: the control that pruning has to beat.

    Paper: Liu et al. 2019, "Rethinking the Value of Network Pruning", arXiv:1810.05270, which trains the pruned
    architecture from scratch.

    Args:
        network: Of the original width, with a ``reset_parameters()`` that fills all its parameters by their present
            shapes, as the networks here have; changed in place.
        compact: A file of :func:`save_compact`, of such a network or of a classifier that holds it as ``network`` (what
            a fit writes). Its weights are not used.

    Returns:
        The same network.

    Raises:
        ConfigError: The network cannot draw fresh weights.
        FileFormatError: The file is missing or damaged.
        MaskMismatchError: The file belongs to another architecture.
    """
    reset = getattr(network, "reset_parameters", None)
    if not callable(reset):
        raise ConfigError(
            f"{type(network).__name__} has no reset_parameters(), so shaped_like cannot give it fresh weights: define "
            "one that fills all its parameters."
        )
    compacted(network, compact)
    reset()
    return network


def compacted(network: nn.Module, compact: str | Path) -> nn.Module:
    """Shrink a network to a compact one and load its weights.

    Args:
        network: Of the original width; changed in place.
        compact: A file of :func:`save_compact`, of such a network or of a classifier that holds it as ``network``.

    Returns:
        The same network.

    Raises:
        FileFormatError: The file is missing or damaged.
        MaskMismatchError: The file belongs to another architecture.
    """
    tensors, _ = read_tensors(compact, kind=KIND, version=VERSION)
    if all(name.startswith("network.") for name in tensors):
        load_compact(nn.ModuleDict({"network": network}), compact)
    else:
        load_compact(network, compact)
    return network
