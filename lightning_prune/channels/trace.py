"""Trace a model: run it once, follow its channels, sort them into groups."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_prune.channels.attention import replaceable, replaced, replaced_modules
from lightning_prune.channels.groups import ChannelGroup, FrozenAxis, Grouping, make_groups
from lightning_prune.channels.labels import Labels
from lightning_prune.channels.recording import Recording, Value, record
from lightning_prune.channels.rules import RULES
from lightning_prune.errors import ConfigError, TraceError
from lightning_prune.wrappers import bare, uncompiled


def propagate(recordings: Sequence[Recording], labels: Labels) -> Labels:
    """Carry labels through every recorded operation; an operation without a rule freezes whatever it touches."""
    for recording in recordings:
        unread = _unread_averages(recording, labels)
        for op in recording.ops:
            labels.op = op
            if id(op) in unread:
                op.outs[0].factors = []
                continue
            rule = RULES.get(op.name)
            if rule is None:
                _unknown(labels, op, f"{op.name} has no rule")
                continue
            try:
                rule(labels, op)
            except (IndexError, ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
                _unknown(labels, op, f"this form of {op.name} has no rule ({type(error).__name__}: {error})")
        labels.op = None
        for value in recording.outputs:
            labels.freeze(labels.factors(value), "it is an output of the model")
    return labels


def _unread_averages(recording: Recording, labels: Labels) -> set[int]:
    """Averages over heads that replaced attention returns because nobody asked it not to, and that nobody reads."""
    averages = [op for op in recording.ops if op.name == "mean" and op.module in labels.trusted]
    if not averages:
        return set()
    read = {id(value) for op in recording.ops for value in op.tensors()} | {id(v) for v in recording.outputs}
    return {id(op) for op in averages if id(op.outs[0]) not in read}


def _unknown(labels: Labels, op: Any, reason: str) -> None:
    tensors = op.tensors()
    for value in tensors:
        if value.name is None or value.factors is not None:
            labels.freeze(labels.factors(value), reason)
        else:
            labels.freeze(labels.factors(value), reason)
    for value in op.outs:
        if value not in tensors:
            value.factors = []


class ChannelGraph:
    """How the channels of a model hang together. Made by :func:`trace_channels`.

    Attributes:
        model: The model that was traced.
        example_inputs: What it was traced with.
        groups: Channels that can leave, sorted into groups that leave together.
        frozen: Channels that may not leave, with the reason.
        unseen: Parameters that no recorded operation used; they stay as they are.
        without_effect: Parameters that were used, but on which no output depended.
        replaced: Attention modules that were replaced while the model was traced, by name: their kinds. Those whose
            heads really leave are replaced for good by :func:`compact`.
        notes: What else the caller should know.
        blocks: The model's residual blocks, once :func:`find_blocks` was asked.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, labels: Labels, grouping: Grouping, recordings: list[Recording]
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.labels = labels
        self.grouping = grouping
        self.recordings = recordings
        self.training = False
        self.unseen: list[str] = []
        self.without_effect: list[str] = []
        self.replaced: dict[str, str] = {}
        self.notes: list[str] = []
        self.operations = 0
        self.blocks: Any = None

    @property
    def groups(self) -> list[ChannelGroup]:
        """Groups, in the order in which the model makes them."""
        return self.grouping.groups

    @property
    def frozen(self) -> list[FrozenAxis]:
        """Axes of which nothing, or not everything, may leave."""
        return self.grouping.frozen

    def keep_whole(self, groups: Iterable[ChannelGroup], reason: str) -> None:
        """Freeze groups, so that none of their channels leaves; ``explain()`` gives the reason.

        Args:
            groups: Some of ``self.groups``. Groups bound to them may be frozen with them.
            reason: Why.
        """
        channels = [group.channels for group in groups]
        if channels:
            chosen = np.isin(self.grouping.component, np.concatenate(channels))
            self.labels.freeze(np.flatnonzero(chosen), reason)
            self.grouping = make_groups(self.labels)

    def explain(self) -> str:
        """Describe groups, widths and frozen channels, by name, as text."""
        lines = [f"{len(self.groups)} groups of channels that can leave ({self.operations} operations recorded)"]
        for group in self.groups:
            tied = ", width tied to other groups" if group.tied else ""
            lines.append(f"  {group.name}: {group.size} channels{tied}")
            lines += [f"      {name}, axis {axis}" + (f" x {n}" if n > 1 else "") for name, axis, n in group.members]
        lines.append(f"{len(self.frozen)} axes with channels that stay")
        lines += [f"  {f.name}, axis {f.axis}: {f.size} channels: {f.reason} [{f.where}]" for f in self.frozen]
        if self.unseen:
            lines.append(f"{len(self.unseen)} parameters that the recorded pass did not use: {_few(self.unseen)}")
        if self.without_effect:
            lines.append(
                f"{len(self.without_effect)} parameters on which no output depends: {_few(self.without_effect)}"
            )
        averaging = list(dict.fromkeys(s.op.where() for s in self.labels.statistics))
        if averaging:
            lines.append(f"{len(averaging)} normalisations average over channels that may leave, which moves outputs:")
            lines += [f"  {where}" for where in averaging]
        for name, kind in self.replaced.items():
            lines.append(f"  {name}: a {kind.rpartition('.')[2]}, replaced by one of free inner width if heads leave")
        lines += self.notes
        lines.append("Only the path that ran with these example inputs was seen.")
        return "\n".join(lines)


def trace_channels(
    model: nn.Module, example_inputs: Any, approximate: bool = False, replace_attention: bool | str = True
) -> ChannelGraph:
    """Find which channels of a model can leave, and which only together.

    The model runs once in eval mode without gradients (modes and flags come back as they were) and every tensor
    operation is recorded. Each position of each parameter's axes gets a label; labels are carried through the
    operations by one rule for each kind. Parameters that this pass did not use are looked for in a second pass
    with container modules in training mode (auxiliary classifiers).

    Args:
        model: Any module, on any device; inside DDP's or ``torch.compile``'s wrapper, the module within is traced.
        example_inputs: A tuple holds positional arguments, a dict keyword arguments, anything else is one argument.
        approximate: Whether LayerNorm, RMSNorm, GroupNorm with one group, and means and variances over channels may
            lose channels. Their statistics then change, so that outputs move; :func:`compact` reports by how much. All
            else is still checked exactly. (GroupNorm with several groups loses whole groups, which is exact.)
        replace_attention: Whether heads may leave where the forward code takes its inner width from its input
            (``nn.MultiheadAttention``; Swin, SwinV2 and MaxViT attention of torchvision; BEiT, EVA and SwinV2 attention
            of timm). Such modules are traced, and where heads leave replaced for good, as subclasses of their own class
            whose inner width is free: the same objects, parameters, hooks and ``state_dict`` keys. True or ``"heads"``:
            whole heads leave. ``"width"``: in these modules all heads stay and every head loses the same places (of
            queries and keys, and of values), scores being scaled as before; EVA, with its rotary embeddings, loses
            heads all the same. False: nothing leaves there. Attention that reads its own head counts needs no
            replacement: it loses heads in any case.

    Returns:
        The graph: ``groups``, ``frozen`` and ``explain()``.

    Raises:
        TraceError: The model cannot be run with these inputs, or runs too many operations.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> [(g.name, g.size) for g in trace_channels(net, torch.zeros(1, 3, 8, 8)).groups]
        [('0', 8)]

    Limits:
        Only the executed path is seen. Values that leave tensors (``.item()``, ``.tolist()``) are not followed; the
        equality check of :func:`compact` is what catches their effect.
    """
    model = bare(model)
    scripted = [name or "the model" for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise TraceError(
            f"{scripted[0]} is a scripted module, whose code and sizes are fixed; give the module it was scripted from."
        )
    if replace_attention not in (True, False, "heads", "width"):
        raise ConfigError(f"replace_attention={replace_attention!r}: expected True, False, 'heads' or 'width'.")
    kinds = replaceable(model) if replace_attention else {}
    thin = replace_attention == "width"
    with uncompiled(model):
        try:
            with replaced(model, kinds):
                return _trace(model, example_inputs, approximate, kinds, thin)
        except TraceError as error:
            if not kinds:
                raise
            graph = _trace(model, example_inputs, approximate, {}, thin)
            graph.notes.append(f"No attention was replaced, since the model did not run with replacements: {error}")
            return graph


def _few(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _trace(
    model: nn.Module,
    example_inputs: Any,
    approximate: bool,
    kinds: dict[str, str],
    thin: bool,
    settled: bool = False,
) -> ChannelGraph:
    try:
        recordings = [record(model, example_inputs)]
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be run with these example inputs ({type(error).__name__}: {error}); give a "
            "tuple of positional arguments, a dict of keyword arguments, or the single argument."
        ) from error
    free = replaced_modules(model)
    thinned = frozenset(name for name, module in free.items() if thin and module.can_thin)
    labels = Labels(approximate=approximate, trusted=frozenset(free), thinned=thinned)
    labels.modules = dict(model.named_modules())
    propagate(recordings, labels)
    names = [name for name, _ in model.named_parameters()]
    unseen = _unseen(names, recordings)
    if unseen:
        second = Recording()
        try:
            record(model, example_inputs, training=True, into=second)
        except Exception:
            propagate([second], labels)
            for name in unseen:
                labels.freeze(labels.known(name), "only training reads it, which did not run with these inputs")
        else:
            recordings.append(second)
            propagate([second], labels)
            unseen = _unseen(names, recordings)
    graph = ChannelGraph(model, example_inputs, labels, make_groups(labels), recordings)
    graph.training = len(recordings) > 1
    graph.unseen = unseen
    graph.without_effect = _without_effect(names, recordings)
    graph.replaced = kinds
    graph.operations = sum(len(r.ops) for r in recordings)
    if graph.labels.suspects:
        from lightning_prune.channels.fixed_sizes import freeze_fixed_sizes

        if not freeze_fixed_sizes(graph, settled):
            return _trace(model, example_inputs, approximate, kinds, thin, settled=True)
    return graph


def _without_effect(names: list[str], recordings: Sequence[Recording]) -> list[str]:
    """Parameters that were used, but not for any output, as the last residual branch of a network read by its skips."""
    leaves: dict[str, list[Value]] = {}
    needed: set[int] = set()
    for recording in recordings:
        needed.update(id(value) for value in recording.outputs)
        for op in reversed(recording.ops):
            # what is written in place may be seen through another view
            if op.name.endswith("_") or any(id(out) in needed for out in op.outs):
                needed.update(id(value) for value in op.tensors())
        for name, value in recording.leaves.items():
            leaves.setdefault(name, []).append(value)
    used = [n for n in names if any(v.factors is not None for v in leaves.get(n, ()))]
    return [n for n in used if not any(id(v) in needed for v in leaves[n])]


def _unseen(names: list[str], recordings: Sequence[Recording]) -> list[str]:
    return [n for n in names if all(r.leaves[n].factors is None for r in recordings if n in r.leaves)]
