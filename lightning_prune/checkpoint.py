"""Tickets on disk: a mask and the weights that its network starts from, in one safetensors file without code."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.environment import package_versions
from lightning_prune.errors import ConfigError, FileFormatError, MaskMismatchError
from lightning_prune.files import read_tensors, write_tensors
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name
from lightning_prune.sharding import any_sharded, collect, local, part_like, reshard

KIND = "ticket"
VERSION = 1

_MASK = "mask/"
_WEIGHT = "weight/"
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Ticket:
    """A mask and the weights that the masked network starts from.

    Paper: Frankle & Carbin 2019, arXiv:1803.03635, section 1: ``(m, theta_0)``; with a later rewinding point it is
    ``(m, theta_k)`` (arXiv:1903.01611). Deviation: none. Whether it *wins* is a result, not a property of the file.

    Args:
        masks: The masks (True = kept), by canonical parameter name.
        weights: Parameters and buffers by name. Of a shared tensor one of its names is enough.
        info: JSON content that goes with it: ``round``, rewinding point, ``density``, versions.

    Example:
        >>> network = nn.Linear(3, 2)
        >>> masks = MaskSet({"weight": torch.tensor([[True, False, True], [False, True, True]])})
        >>> ticket = Ticket(masks, dict(network.state_dict()), {"round": 1})
        >>> ticket.apply_(network)
        >>> int((network.weight == 0).sum())
        2
    """

    masks: MaskSet
    weights: Mapping[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def apply_(self, module: nn.Module, rewound: bool = True) -> None:
        """Load the weights into ``module`` and prune it, both in place.

        Every parameter and every persistent buffer of the module must be in the ticket and nothing else; buffers that
        are not persistent are loaded where the ticket has them. Values take the module's type and device. Of sharded
        parameters each process loads its own part.

        Args:
            module: The network the ticket was written from, built anew; compiled or not.
            rewound: False leaves the module's own weights and only applies the mask: the control with a random
                re-initialisation, or a mask for weights from elsewhere.

        Raises:
            MaskMismatchError: A ticket of another network. The module is unchanged.
            ConfigError: A lazy module that has not seen a batch yet.
        """
        reshard(module)
        named = _named_tensors(module)
        parameters = {canonical_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
        wrong = _mis_shaped(self.masks, named, "mask")
        unknown = [name for name in self.masks if name not in parameters]
        weights = {canonical_name(name): tensor for name, tensor in self.weights.items()} if rewound else {}
        if rewound:
            unknown += [name for name in weights if name not in named]
            wrong += _mis_shaped(weights, named, "weights") + _differently_tied(weights, named)
        missing = _missing(weights, named, module) if rewound else []
        if missing or unknown or wrong:
            parts = [("not in the ticket", missing), ("not in the module", unknown), ("do not fit", wrong)]
            found = "; ".join(f"{what}: {_few(names)}" for what, names in parts if names)
            raise MaskMismatchError(
                f"this ticket belongs to another network than {type(module).__name__}: {found}. "
                "Nothing was changed; apply it to the network that it was written from."
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                local(named[name]).copy_(part_like(tensor, named[name]))
        self.masks.apply_(module)


def save_ticket(path: str | Path, ticket: Ticket) -> None:
    """Write a ticket as one safetensors file, atomically: weights as they are, masks at one bit a weight.

    Shared tensors are stored once. ``info["versions"]`` is added where it is missing. Of sharded tensors the whole is
    written, by process 0, which needs room for it; every process must call this then. The file is the one that a single
    process would have written.

    Raises:
        ConfigError: Two names that differ only in a compiler's prefix, or a tensor that safetensors cannot hold.
        WriteError: The system could not write; an earlier file is unchanged.
    """
    weights = {canonical_name(name): tensor for name, tensor in ticket.weights.items()}
    if len(weights) != len(ticket.weights):
        raise ConfigError("the ticket holds a tensor twice, with and without the '_orig_mod.' of torch.compile.")
    masks = ticket.masks.state_dict()
    sharded = ticket.masks.is_sharded or any_sharded(weights.values())
    if sharded:
        weights = {name: tensor for name, tensor in collect(weights) if tensor is not None}
    tensors = {_WEIGHT + name: tensor for name, tensor in weights.items()}
    tensors |= {_MASK + name: tensor for name, tensor in masks.pop("tensors").items()}
    header = {
        "masks": masks,
        "digest": ticket.masks.digest(),
        "info": {"versions": package_versions()} | ticket.info,
    }
    if not sharded or torch.distributed.get_rank() == 0:
        write_tensors(path, tensors, kind=KIND, version=VERSION, header=header)


def load_ticket(path: str | Path) -> Ticket:
    """Read a ticket, onto the CPU. No code in the file can run.

    Raises:
        FileFormatError: Missing, damaged, no ticket, or written by a later version.
    """
    tensors, header = read_tensors(path, kind=KIND, version=VERSION)
    damaged = f"{path} is a damaged ticket"
    if not isinstance(header, dict) or not isinstance(header.get("info"), dict):
        raise FileFormatError(f"{damaged}: its header has no info.")
    packed = {name.removeprefix(_MASK): t for name, t in tensors.items() if name.startswith(_MASK)}
    weights = {name.removeprefix(_WEIGHT): t for name, t in tensors.items() if name.startswith(_WEIGHT)}
    if not isinstance(header.get("masks"), dict) or len(packed) + len(weights) != len(tensors):
        raise FileFormatError(f"{damaged}: its header has no masks, or it holds what is neither mask nor weight.")
    try:
        masks = MaskSet.from_state_dict(header["masks"] | {"tensors": packed})
    except FileFormatError as error:
        raise FileFormatError(f"{damaged}: {error}") from error
    if masks.digest() != header.get("digest"):
        raise FileFormatError(f"{damaged}: its masks do not have the digest that its header states.")
    return Ticket(masks, weights, header["info"])


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by canonical name, shared ones under each of their names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    lazy = [name for name, tensor in named if is_lazy(tensor)]
    if lazy:
        raise ConfigError(f"{_few(lazy)}: no shape yet; run one batch through the lazy module, then apply the ticket.")
    return {canonical_name(name): tensor for name, tensor in named}


def _missing(weights: Mapping[str, Tensor], named: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """Tensors of the module that the ticket has under none of their names, without buffers that are not persistent."""
    covered = {id(named[name]) for name in weights if name in named}
    optional = {
        id(buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False)
        if name in part._non_persistent_buffers_set
    }
    return [name for name, tensor in named.items() if id(tensor) not in covered | optional]


def _mis_shaped(tensors: Mapping[str, Tensor], named: Mapping[str, Tensor], what: str) -> list[str]:
    return [
        f"{name} ({what} {tuple(tensor.shape)}, module {tuple(named[name].shape)})"
        for name, tensor in tensors.items()
        if name in named and named[name].shape != tensor.shape
    ]


def _differently_tied(weights: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> list[str]:
    """Names of one tensor in the module for which the ticket has different values."""
    first: dict[int, str] = {}
    found = []
    for name in weights:
        if name in named:
            other = first.setdefault(id(named[name]), name)
            a, b = weights[other], weights[name]
            if a is not b and not (a.shape == b.shape and torch.equal(a, b)):
                found.append(f"{name} (one tensor with {other} in the module, another in the ticket)")
    return found


def _few(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(dict.fromkeys(names))
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
