"""Normalisation over channels that lose some: what is noted, how the gate checks it, by how much outputs move."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.channels.labels import Labels, span
from lightning_prune.channels.recording import Op
from lightning_prune.errors import EqualityError
from lightning_prune.running import call_model, evaluation, following, map_tensors, output_tensors

if TYPE_CHECKING:
    from lightning_prune.channels.plan import RemovalPlan
    from lightning_prune.channels.trace import ChannelGraph

_LAYER_NORMS = {"native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"}
_GROUP_NORMS = {"native_group_norm"}
_REDUCTIONS = {"mean", "var", "std", "var_mean", "std_mean"}
STATISTICS = _LAYER_NORMS | _GROUP_NORMS | _REDUCTIONS
"""Operations that may lose channels from what they average over, on request."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """An operation that averages over channels: the labels along an axis (counted from the end) of its input."""

    op: Op
    axis: int
    ids: np.ndarray


def note(labels: Labels, op: Op, axes: Sequence[int]) -> list[np.ndarray]:
    """Note that statistics run over these axes of the first argument; return the label arrays that lie along them.

    Only channels that lie along one axis can be approximated: what a statistic does to joint arrays (heads and width)
    is left to the exact rules.
    """
    x = op.args[0]
    if not labels.approximate or op.name not in STATISTICS:
        return []
    own = [f for f in labels.factors(x) if len(span(f)) == 1 and span(f)[0] in axes]
    labels.statistics += [Statistic(op, span(f)[0] - len(x.shape), f.reshape(-1)) for f in own]
    return own


def statistics_of(graph: "ChannelGraph", stays: np.ndarray) -> list[dict[str, Any]]:
    """Entries of a plan: each operation that averages over channels of which some leave, by module and place in it."""
    places: dict[int, tuple[str, int]] = {}
    for recording in graph.recordings:
        counts: Counter[str] = Counter()
        for op in recording.ops:
            if op.name in STATISTICS:
                places[id(op)] = (op.module, counts[op.module])
                counts[op.module] += 1
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for statistic in graph.labels.statistics:
        alive = stays[statistic.ids]
        if not alive.all():
            module, call = places[id(statistic.op)]
            found[module, call] = {
                "module": module,
                "call": call,
                "name": statistic.op.name.removeprefix("native_").lstrip("_"),
                "axis": statistic.axis,
                "size": len(alive),
                "keep": np.flatnonzero(alive).tolist(),
            }
    return list(found.values())


def normalised_sizes(model: nn.Module, statistics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """New values of the sizes that normalisation modules hold."""
    found: dict[str, dict[str, Any]] = {}
    for entry in statistics:
        module = model.get_submodule(entry["module"])
        shape = getattr(module, "normalized_shape", None)
        if isinstance(shape, (tuple, list)) and len(shape) >= -entry["axis"] and shape[entry["axis"]] == entry["size"]:
            new = list(shape)
            new[entry["axis"]] = len(entry["keep"])
            found[entry["module"]] = {"normalized_shape": type(shape)(new) if type(shape) is list else tuple(new)}
        elif isinstance(module, nn.GroupNorm):
            found[entry["module"]] = {"num_channels": len(entry["keep"])}
    return found


class _Ignoring(TorchDispatchMode):
    """Takes statistics over the channels that stay, in a network that still has all of them.

    What a normalisation gives at the other channels is its input there: not zero, so that a reader that is not
    silenced shows.
    """

    def __init__(self, statistics: Sequence[Mapping[str, Any]], modules: Sequence[str]) -> None:
        super().__init__()
        self.entries = {(entry["module"], entry["call"]): entry for entry in statistics}
        self.modules = modules
        self.counts: Counter[str] = Counter()
        self.met: set[tuple[str, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name not in STATISTICS:
            return func(*args, **kwargs)
        place = (self.modules[-1], self.counts[self.modules[-1]])
        self.counts[place[0]] += 1
        entry = self.entries.get(place)
        if entry is None:
            return func(*args, **kwargs)
        self.met.add(place)
        x, axis = args[0], entry["axis"]
        if x.dim() < -axis or x.shape[axis] != entry["size"]:
            raise EqualityError(
                f"{name} in {place[0] or 'the model'} averages over a tensor of shape {tuple(x.shape)}, the plan knows "
                f"{entry['size']} channels there; trace the model with inputs like these."
            )
        keep = torch.tensor(entry["keep"], device=x.device)
        narrow = x.index_select(axis, keep)
        if name in _REDUCTIONS:
            return func(narrow, *args[1:], **kwargs)
        outs = func(narrow, *_narrowed(name, args[1:], axis, keep), **kwargs)
        first = outs if isinstance(outs, Tensor) else outs[0]
        full = x.to(first.dtype).index_copy(axis, keep, first)
        return full if isinstance(outs, Tensor) else (full, *outs[1:])


def _narrowed(name: str, args: Sequence[Any], axis: int, keep: Tensor) -> list[Any]:
    """The other arguments of a normalisation at the width that stays."""
    changed = list(args)
    if name in _GROUP_NORMS:  # weight, bias, N, C, places, groups, eps
        changed[3] = len(keep)
        return [a.index_select(0, keep) if isinstance(a, Tensor) else a for a in changed]
    sizes = list(args[0])
    sizes[axis] = len(keep)
    return [sizes, *[a.index_select(axis, keep) if isinstance(a, Tensor) else a for a in args[1:]]]


@contextmanager
def ignoring(model: nn.Module, plan: "RemovalPlan") -> Iterator[None]:
    """Run the masked parent so that its normalisations ignore the channels that leave.

    Raises:
        EqualityError: A normalisation that the plan names did not run, or has another size.
    """
    if not plan.statistics:
        yield
        return
    with following(model) as modules, _Ignoring(plan.statistics, modules) as mode:
        yield
    missed = sorted(set(mode.entries) - mode.met)
    if missed:
        raise EqualityError(f"the normalisation in {missed[0][0] or 'the model'}, which loses channels, did not run.")


@dataclass
class Moved:
    """By how much outputs moved, where normalisations lost channels.

    Both numbers are of the model's own weights at the given example inputs, in eval mode: the norm of the change of an
    output over the norm of that output before, the largest over outputs.

    Attributes:
        normalisations: Operations that average over fewer channels now, with their modules.
        by_statistics: From the masked parent, whose normalisations still see every channel, to the compact model: what
            the approximation costs.
        in_all: From the model as it was to the compact model.
    """

    normalisations: list[str]
    by_statistics: float
    in_all: float


def outputs_of(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Floating-point outputs in eval mode."""
    with evaluation(model):
        found = output_tensors(call_model(model, map_tensors(torch.clone, example_inputs)))
    return [t.detach().clone() for t in found if t.is_floating_point()]


def moved(plan: "RemovalPlan", dense: list[Tensor], masked: list[Tensor], child: list[Tensor]) -> Moved:
    """Compare outputs before and after."""
    names = [f"{entry['name']} in {entry['module'] or 'the model'}" for entry in plan.statistics]
    return Moved(names, _distance(masked, child), _distance(dense, child))


def _distance(before: list[Tensor], after: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        scale = float(a.double().norm())
        change = float((a.double() - b.double()).norm())
        worst = max(worst, change / scale if scale else change)
    return worst
