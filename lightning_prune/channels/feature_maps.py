"""Feature maps of a network's convolutions, after activation, and their ranks: the scores of HRank."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.channels.labels import span
from lightning_prune.channels.ranks import matrix_ranks
from lightning_prune.channels.recording import Op, Value
from lightning_prune.channels.rules.elementwise import POINTWISE
from lightning_prune.channels.trace import ChannelGraph, trace_channels
from lightning_prune.errors import ConfigError, TraceError
from lightning_prune.progress import progress
from lightning_prune.running import call_model, evaluation, map_tensors
from lightning_prune.wrappers import bare, uncompiled

_CONVOLUTIONS = ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv_transpose2d")
_ACTIVATIONS = frozenset(
    name + ending
    for name in [
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "celu",
        "selu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardtanh",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "softplus",
        "threshold",
        "prelu",
        "_prelu_kernel",
    ]
    for ending in ("", "_")
)


@dataclass(frozen=True)
class Tap:
    """Where a convolution's maps are read.

    Attributes:
        name: Of the convolution.
        step: Number of the operation whose output holds the maps.
        operation: Its name.
        channels: Which channels of that output are the convolution's, in its order; None: all.
        limit: The largest rank a map can have: the smaller of height and width.
    """

    name: str
    step: int
    operation: str
    channels: Tensor | None
    limit: int


def find_taps(graph: ChannelGraph) -> list[Tap]:
    """Find where each convolution's maps appear after BatchNorm, additions and activation.

    A convolution's output is followed through element-wise operations, normalisation and concatenation to the first
    activation. Without one on the way (a linear bottleneck) the last value before anything else is taken.
    """
    ops = graph.recordings[0].ops
    readers: dict[int, list[int]] = {}
    for step, op in enumerate(ops):
        for value in op.tensors():
            readers.setdefault(id(value), []).append(step)
    taps: dict[str, Tap] = {}
    for step, op in enumerate(ops):
        weight = op.args[1] if op.name in _CONVOLUTIONS else None
        if isinstance(weight, Value) and weight.name is not None and len(op.outs[0].shape) == 4:
            name = weight.name.rpartition(".")[0] or weight.name
            taps.setdefault(name, _follow(graph, name, step, readers))
    return list(taps.values())


def _follow(graph: ChannelGraph, name: str, step: int, readers: Mapping[int, Sequence[int]]) -> Tap:
    ops = graph.recordings[0].ops
    own = _components(graph, ops[step].outs[0])
    value = ops[step].outs[0]
    channels: Tensor | None = None
    while ops[step].name not in _ACTIVATIONS:
        after = next((s for s in readers.get(id(value), ()) if s > step), None)
        if after is None:
            break
        result = ops[after].outs[0] if ops[after].outs else None
        if result is None or not _passes(ops[after], value, result):
            break
        if result.shape[1] != value.shape[1]:
            positions = _positions(own, _components(graph, result))
            if positions is None:
                break
            channels = positions
        step, value = after, result
    return Tap(name, step, ops[step].name, channels, min(value.shape[2:]))


def _passes(op: Op, value: Value, result: Value) -> bool:
    """Whether an operation leaves maps what they are, but for the values in them."""
    if len(result.shape) != 4 or result.shape[2:] != value.shape[2:]:
        return False
    same = result.shape == value.shape and (op.name in POINTWISE or op.name in _ACTIVATIONS or "batch_norm" in op.name)
    return same or op.name in ("cat", "concat", "concatenate")


def _components(graph: ChannelGraph, value: Value) -> np.ndarray | None:
    """Which channel of the network each channel of a value is; None where that is not known."""
    for factor in graph.labels.factors(value):
        if span(factor) == (1,):
            return graph.grouping.component[factor.ravel()]
    return None


def _positions(own: np.ndarray | None, there: np.ndarray | None) -> Tensor | None:
    if own is None or there is None:
        return None
    place = {int(component): i for i, component in enumerate(there)}
    if len(place) < len(there) or not all(int(component) in place for component in own):
        return None
    return torch.tensor([place[int(component)] for component in own])


class _Reader(TorchDispatchMode):
    """Adds up the ranks of tapped outputs while the network runs; maps are gone when it goes on."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.at: dict[int, list[Tap]] = {}
        for tap in taps:
            self.at.setdefault(tap.step, []).append(tap)
        self.step = -1
        self.names: dict[Any, str] = {}
        self.sums: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.step += 1
        here = self.at.get(self.step)
        if here is not None:
            name = func._schema.name.removeprefix("aten::")
            if name != here[0].operation:
                raise TraceError(
                    f"operation {self.step} of the forward pass is {name}, and was {here[0].operation} when it was "
                    "traced: the code chooses its path by values, so maps cannot be told apart. Rank maps of a network "
                    "with one path."
                )
            self._read(out if isinstance(out, Tensor) else out[0], here)
        return out

    def _read(self, maps: Tensor, taps: Sequence[Tap]) -> None:
        asked = [tap.channels for tap in taps if tap.channels is not None]
        everything = torch.arange(maps.shape[1])
        wanted = everything if len(asked) < len(taps) else torch.unique(torch.cat(asked))
        if len(wanted) < len(everything):
            maps = maps.index_select(1, wanted.to(maps.device))
        ranks = everything.new_zeros(len(everything)).to(maps.device)
        ranks[wanted.to(maps.device)] = matrix_ranks(maps.flatten(0, 1)).view(maps.shape[:2]).sum(0)
        for tap in taps:
            own = ranks if tap.channels is None else ranks[tap.channels.to(ranks.device)]
            self.sums[tap.name] = self.sums[tap.name] + own if tap.name in self.sums else own


@dataclass
class RankSums:
    """Ranks added up over images.

    Attributes:
        sums: For each convolution, the sum of each channel's ranks: (C,) int64.
        limits: For each convolution, the largest rank a map can have.
        images: How many images.
    """

    sums: dict[str, Tensor]
    limits: dict[str, int]
    images: int = 0

    def means(self) -> dict[str, Tensor]:
        """Mean rank of each channel: (C,) float64."""
        return {name: total.double().cpu() / max(self.images, 1) for name, total in self.sums.items()}


def sum_ranks(graph: ChannelGraph, batches: Iterable[Any], images: int) -> RankSums:
    """Run images through a traced network and add up the ranks of its feature maps.

    Args:
        graph: The traced network.
        batches: Inputs as :func:`trace_channels` takes them.
        images: How many images; the last batch is cut.

    Raises:
        ConfigError: Fewer images than asked for.
        TraceError: The network takes another path than when it was traced.
    """
    model = graph.model
    taps = find_taps(graph)
    found = RankSums({}, {tap.name: tap.limit for tap in taps})
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    reader = _Reader(taps)
    with uncompiled(model), evaluation(model), progress("ranks of feature maps, images", images) as bar:
        for batch in batches:
            inputs, count = _first(batch, images - found.images)
            inputs = map_tensors(lambda t: t.detach().to(device), inputs)
            reader.step = -1
            with reader:
                call_model(model, inputs)
            found.images += count
            bar.advance(count)
            if found.images >= images:
                break
    if found.images < images:
        raise ConfigError(
            f"images={images} asks for more than the {found.images} images that the data gives; ask for fewer."
        )
    found.sums = reader.sums
    return found


def _first(batch: Any, wanted: int) -> tuple[Any, int]:
    """The first images of a batch, and how many they are."""
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(len(t)) if t.dim() else None, batch)
    if not sizes:
        raise ConfigError(f"a batch of type {type(batch).__name__} holds no tensor; expected inputs of the network.")
    count = min(sizes[0], wanted)
    return map_tensors(lambda t: t[:count].clone() if t.dim() and len(t) == sizes[0] else t, batch), count


def feature_ranks(model: nn.Module, batches: Iterable[Any], images: int = 640) -> dict[str, Tensor]:
    """Mean rank of each convolution's feature maps after activation, over images, in one pass for all layers.

    The rank of a map is ``torch.linalg.matrix_rank``'s in float32: singular values above ``max(H, W) * eps`` of the
    largest. The model runs in eval mode without gradients. Maps are dropped as soon as they are read, so memory does
    not grow with the number of images. Ranks are whole numbers and added up as such: the same images give the same
    means in any order.

    Where: the first activation after the convolution, behind BatchNorm, a residual addition or a concatenation; without
    one on the way, the last value before the next layer.

    Paper: Lin et al. 2020 (HRank), arXiv:2002.10179, Eq. 3. Deviations: in VGG the authors read four layers after the
    pooling that follows the activation; here all are read at the activation. They run over augmented images in an order
    drawn without a seed; here the caller gives the images.

    Args:
        model: Any network with 2d convolutions; inside DDP's or ``torch.compile``'s wrapper, the module within.
        batches: Inputs: a tensor is the one argument, a tuple positional arguments, a dict keyword arguments, and of a
            list (a DataLoader's images and labels) the first item is the one argument.
        images: How many images; the last batch is cut.

    Returns:
        ``{name of the convolution: (C,) float64}``, each in [0, min(H, W)].

    Raises:
        ConfigError: ``images`` below 1 or beyond the data; no 2d convolution.
        TraceError: The network cannot be run, or chooses its path by values.
        MeasurementError: Maps with infinite or NaN entries.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> feature_ranks(net, [torch.randn(8, 1, 8, 8)], images=8)["0"].shape
        torch.Size([4])
    """
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ConfigError(f"images={images!r}: expected a whole number of images, at least 1.")
    model = bare(model)
    source = (batch[0] if isinstance(batch, list) and batch else batch for batch in batches)
    first = next(source, None)
    if first is None:
        raise ConfigError(f"images={images} asks for more than the 0 images that the data gives.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    graph = trace_channels(model, map_tensors(lambda t: t.to(device), _first(first, 2)[0]), replace_attention=False)

    def everything() -> Iterable[Any]:
        yield first
        yield from source

    found = sum_ranks(graph, everything(), images)
    if not found.sums:
        raise ConfigError(f"{type(model).__name__} has no 2d convolution, so there are no feature maps to rank.")
    return found.means()
