"""Constants that leaving channels emit are folded into what reads them.

A channel whose BatchNorm scale is 0 gives its shift at every place. Activations make of it another constant, and each
layer that reads it adds a constant to its own outputs: that sum goes into the layer's bias, or into the running mean of
the BatchNorm behind it, before the channel leaves.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.channels.equality import check_inputs, default_dtype, random_tensors
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.recording import Op, Recording, record
from lightning_prune.channels.surgery import substituted, take
from lightning_prune.running import call_model, evaluation, map_tensors, named_tensors

SAME = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Spread, relative, within which values in this type count as one constant."""

_SEEDS = (0, 1)


@dataclass(eq=False)
class _Reader:
    """A weight that reads leaving channels.

    Attributes:
        name: Of the weight.
        axis: Its axis that reads them.
        width: Positions along that axis.
        leaving: Those that leave.
        module: Name of the layer, if it is one whose input can be watched.
        why: Reason why constants cannot be folded there, or "".
        target: The bias or running mean that takes them; "" if a BatchNorm by the batch's own mean absorbs them.
        folded: Which of ``leaving`` are folded.
        low: Least value seen at each input feature; grouped layers have several features for a position.
        high: Greatest value.
    """

    name: str
    axis: int
    width: int
    leaving: Tensor
    module: str | None = None
    why: str = ""
    target: str = ""
    folded: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    low: Tensor | None = None
    high: Tensor | None = None

    def see(self, module: nn.Module, args: Sequence[Any]) -> None:
        """Note the range of each input feature of one call."""
        if not args:
            return
        x = args[0]
        axis = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)  # type: ignore[arg-type]
        rows = x.detach().movedim(axis, -1).reshape(-1, x.shape[axis]).double().cpu()
        low, high = rows.amin(0), rows.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def constants(self) -> Tensor:
        """What leaving channels gave: (groups, leaving positions)."""
        assert self.low is not None
        assert self.high is not None
        return ((self.low + self.high) / 2).reshape(-1, self.width)[:, self.leaving]

    def constant(self, tolerance: float) -> Tensor:
        """Whether each leaving position gave the same wherever it was read."""
        if self.low is None or self.high is None:
            return torch.zeros(len(self.leaving), dtype=torch.bool)
        same = self.high - self.low <= tolerance * torch.maximum(self.high.abs(), self.low.abs())
        return same.reshape(-1, self.width)[:, self.leaving].all(0)


@dataclass
class Folded:
    """Where constants went.

    Attributes:
        into: Bias or running mean -> how many channels' constants it took.
        silenced: Weight that reads channels -> why constants there were dropped, as the plain rule does.
    """

    into: dict[str, int] = field(default_factory=dict)
    silenced: dict[str, str] = field(default_factory=dict)


class Fold:
    """Which constants of a plan can be folded, and where to. Made by :func:`find_folds`.

    Attributes:
        scales: Scales of the BatchNorms that leaving channels pass, with the positions that leave.
        readers: What reads leaving channels.
    """

    def __init__(self, plan: RemovalPlan, scales: dict[str, Tensor], readers: list[_Reader]) -> None:
        self.plan, self.scales, self.readers = plan, scales, readers

    def hold_(self, tensors: Mapping[str, Tensor]) -> None:
        """Make leaving channels constant, in place: the scales of their BatchNorms become 0."""
        for name, leaving in self.scales.items():
            tensors[name].index_fill_(0, leaving.to(tensors[name].device), 0)

    def silence_(self, tensors: Mapping[str, Tensor]) -> None:
        """Silence leaving channels where they are read and not folded, in place."""
        for reader in self.readers:
            weight = tensors[reader.name]
            weight.index_fill_(reader.axis, reader.leaving[~reader.folded].to(weight.device), 0)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note what readers are given, over all calls inside."""
        hooks = []
        for reader in self.readers:
            reader.low = reader.high = None
            if reader.module is not None:
                module = model.get_submodule(reader.module)
                hooks.append(module.register_forward_pre_hook(reader.see))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def corrections(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What biases and running means of the whole model gain from the constants that were seen, in float64."""
        found: dict[str, Tensor] = {}
        for reader in self.readers:
            if not reader.target or reader.module is None or not bool(reader.folded.any()):
                continue
            weight = tensors[reader.name].detach().double().cpu()
            weight = weight.reshape(*weight.shape[:2], -1).sum(2)
            groups = getattr(model.get_submodule(reader.module), "groups", 1)
            rows = weight[:, reader.leaving[reader.folded]].unflatten(0, (groups, -1))
            total = torch.einsum("goi,gi->go", rows, reader.constants()[:, reader.folded]).flatten()
            found[reader.target] = -total if reader.target.endswith("running_mean") else total
        return found

    def added(self, model: nn.Module, tensors: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The compact model's biases and running means with what the watched parent's leaving channels gave."""
        changed = {}
        for name, total in self.corrections(model, tensors).items():
            held = small.get(name, tensors[name])
            changed[name] = held + take(total, self.plan.keep.get(name, {})).to(held)
        return changed

    def report(self, tolerance: float) -> Folded:
        """Where constants went, and which other than 0 were dropped; after a watched pass on the model's weights."""
        found = Folded()
        for reader in self.readers:
            count = int(reader.folded.sum())
            if count and reader.target:
                found.into[reader.target] = found.into.get(reader.target, 0) + count
            constant = reader.constant(tolerance)
            nothing = constant & (reader.constants() == 0).all(0) if reader.low is not None else constant
            parts = [(~reader.folded & ~constant, "no constants where it reads them")]
            parts.append((~reader.folded & constant & ~nothing, reader.why))
            told = [f"{int(which.sum())} of {len(which)} channels: {why}" for which, why in parts if which.any()]
            if told:
                found.silenced[reader.name] = "; ".join(told)
        return found


def find_folds(model: nn.Module, plan: RemovalPlan, example_inputs: Any) -> Fold:
    """Find which constants can be folded: watched on random weights and two inputs, where the scales are 0.

    Args:
        model: The model at its full width.
        plan: What leaves.
        example_inputs: As for :func:`trace_channels`.

    Limits:
        A convolution that pads with zeros reads no constant at the border, so what it is given is not folded (unless
        that is 0); likewise weights that no convolution or linear layer holds, transposed convolutions, weights that
        several layers share, and layers without a bias that no BatchNorm follows.
    """
    modules = dict(model.named_modules())
    scales = {}
    for name in plan.keep:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(modules.get(owner), _NormBase):
            scales[name] = _leaving(plan, name, 0)
    readers = [_reader(model, modules, plan, name, axis) for name, axis in plan.reads]
    fold = Fold(plan, scales, readers)
    if any(not reader.why and reader.target == "" for reader in readers):
        _find_norms(model, plan, example_inputs, readers)
    try:
        _settle(model, fold, example_inputs, torch.float64)
    except RuntimeError as error:
        if not any(w in str(error) for w in ("dtype", "Double", "double")):
            raise
        _settle(model, fold, example_inputs, torch.float32)
    return fold


def _leaving(plan: RemovalPlan, name: str, axis: int) -> Tensor:
    stays = torch.zeros(plan.shapes[name][axis], dtype=torch.bool)
    stays[plan.keep[name][axis]] = True
    return (~stays).nonzero()[:, 0]


def _reader(model: nn.Module, modules: Mapping[str, nn.Module], plan: RemovalPlan, name: str, axis: int) -> _Reader:
    owner, _, leaf = name.rpartition(".")
    module = modules.get(owner)
    reader = _Reader(name, axis, plan.shapes[name][axis], _leaving(plan, name, axis))
    if leaf != "weight" or not isinstance(module, (nn.Linear, _ConvNd)):
        reader.why = "no convolution or linear layer holds this weight"
        return reader
    reader.module = owner
    holders = [m for m in modules.values() for t in m._parameters.values() if t is module.weight]
    if isinstance(module, _ConvNd) and module.transposed:
        reader.why = "a transposed convolution spreads a constant unevenly"
    elif len(holders) > 1:
        reader.why = "several layers share this weight"
    elif isinstance(module, _ConvNd) and _pads_zeros(module):
        reader.why = "it pads with zeros, which are no constant of the channel"
    elif module.bias is not None:
        reader.target = f"{owner}.bias" if owner else "bias"
        if sum(t is module.bias for m in modules.values() for t in m._parameters.values()) > 1:
            reader.why = "several layers share its bias"
    return reader


def _pads_zeros(module: _ConvNd) -> bool:
    if module.padding_mode != "zeros" or module.padding == "valid":
        return False
    if module.padding == "same":
        return any(k > 1 for k in module.kernel_size)
    return any(p > 0 for p in module.padding)  # type: ignore[operator]


def _find_norms(model: nn.Module, plan: RemovalPlan, example_inputs: Any, readers: Sequence[_Reader]) -> None:
    """Of layers without a bias: the running mean of the BatchNorm that alone reads what they give."""
    recording = record(model, example_inputs, training=plan.training)
    read_by: dict[int, list[Op]] = {}
    for op in recording.ops:
        for value in op.tensors():
            read_by.setdefault(id(value), []).append(op)
    for reader in readers:
        if reader.why or reader.target:
            continue
        means = _means_after(recording, read_by, reader.module)
        if means is None or len(means) != 1:
            reader.why = "the layer has no bias and no BatchNorm follows it alone"
        else:
            reader.target = means.pop()


def _means_after(recording: Recording, read_by: Mapping[int, list[Op]], module: str | None) -> set[str] | None:
    ops = recording.ops
    ends = [i for i, op in enumerate(ops) if op.module == module and (i + 1 == len(ops) or ops[i + 1].module != module)]
    found, norms = set(), []
    for i in ends:
        value = ops[i].outs[0]
        after = read_by.get(id(value), [])
        norm = after[0] if len(after) == 1 else None
        if norm is None or "batch_norm" not in norm.name or norm.args[0] is not value or value in recording.outputs:
            return None
        norms.append(norm)
        found.add(norm.args[3].name or "" if norm.args[3] is not None else "")
    shared = any(op not in norms for norm in norms if norm.args[3] is not None for op in read_by[id(norm.args[3])])
    return None if shared else found


def _settle(model: nn.Module, fold: Fold, example_inputs: Any, precision: torch.dtype) -> None:
    """Fold what is constant, and not 0, under other weights and inputs.

    Shifts are positive there, so that activations let them through: a ReLU that happens to be off gives 0 as well.
    """
    for reader in fold.readers:
        reader.folded = torch.full((len(reader.leaving),), not reader.why)
    for seed in _SEEDS:
        tensors = random_tensors(model, precision, seed)
        fold.hold_(tensors)
        for name in fold.scales:
            shift = tensors.get(name.removesuffix("weight") + "bias")
            if shift is not None:
                shift.abs_().add_(0.1)
        with (
            substituted(model, tensors),
            default_dtype(precision),
            evaluation(model, training=fold.plan.training),
            fold.watching(model),
        ):
            for again in (seed, seed + len(_SEEDS)):
                call_model(model, check_inputs(example_inputs, precision, again))
        for reader in fold.readers:
            if reader.low is None:
                reader.folded[:] = False
                reader.why = reader.why or "the layer is not called as a module"
            else:
                reader.folded &= reader.constant(SAME[precision]) & (reader.constants() != 0).all(0)


def own_constants(model: nn.Module, fold: Fold, example_inputs: Any) -> tuple[dict[str, Tensor], Folded]:
    """Corrections for the model's own weights, and the report on them; what is not constant there is not folded."""
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model)}
    held = {name: tensors[name].clone() for name in fold.scales}
    fold.hold_(held)
    with substituted(model, held), evaluation(model, training=fold.plan.training), fold.watching(model):
        call_model(model, map_tensors(torch.clone, example_inputs))
    dtypes = [t.dtype for t in tensors.values() if t.dtype in SAME] or [torch.float32]
    tolerance = max(SAME[d] for d in dtypes)
    for reader in fold.readers:
        reader.folded &= reader.constant(tolerance)
    return fold.corrections(model, tensors), fold.report(tolerance)


@torch.no_grad()
def apply_(model: nn.Module, plan: RemovalPlan, corrections: Mapping[str, Tensor]) -> None:
    """Add corrections, given at full width, to a model that has been shrunk."""
    tensors = dict(named_tensors(model))
    for name, total in corrections.items():
        tensors[name].add_(take(total, plan.keep.get(name, {})).to(tensors[name]))
