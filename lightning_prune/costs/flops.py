"""Parameters and multiply-adds of a network, whole and without its zeros, by module and by operator."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.costs.products import ProductCounts, count_products
from lightning_prune.costs.tables import align
from lightning_prune.errors import MaskMismatchError, MeasurementError, PruneError
from lightning_prune.prunable import canonical_name, close_names
from lightning_prune.running import call_model, evaluation, map_tensors, output_tensors
from lightning_prune.wrappers import bare, uncompiled

# fvcore's names of operations that are multiply-adds; what else it counts are a few operations an entry.
_PRODUCTS = {"conv", "linear", "matmul", "addmm", "bmm", "einsum"}
# Operations that consist of multiply-adds and that fvcore has no count for.
_UNKNOWN_PRODUCTS = {
    "scaled_dot_product_attention", "baddbmm", "addbmm", "bilinear", "mv", "addmv", "dot", "vdot", "inner", "tensordot",
    "chain_matmul", "linalg_multi_dot", "cdist", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "conv_tbc",
}  # fmt: skip


class Count(NamedTuple):
    """A number of things and how many of them are not zeros: parameters, or multiply-adds by such parameters."""

    total: int
    nonzero: int

    @property
    def density(self) -> float:
        """``nonzero / total``, in [0, 1]; 1 where there is nothing."""
        return self.nonzero / self.total if self.total else 1.0


@dataclass(frozen=True)
class ModuleCosts:
    """What one module costs with everything inside it.

    Attributes:
        kind: Its class.
        params: Its parameters, shared ones once.
        macs: Multiply-adds while it runs.
    """

    kind: str
    params: Count
    macs: Count


@dataclass(frozen=True)
class Costs:
    """What a network costs at the example inputs (their whole batch).

    Attributes:
        params: Parameters of the model; buffers are none. ``nonzero``: those that are not exactly 0 (of a masked model
            or with ``masks``: what is kept; zero-initialised biases are zeros too).
        macs: Multiply-adds of convolutions and matrix products, a fused multiply-add counted once; additions of biases
            are none. ``nonzero``: those that remain if products with a weight of 0 are skipped.
        by_operator: ``macs.total`` by operator, with fvcore's names.
        recovered: The part of it that fvcore could not count and torch's formulas did.
        other: What fvcore counts beside multiply-adds (normalisation, pooling, upsampling), by operator. It is not in
            ``macs``; ``macs.total + sum(other.values())`` is fvcore's figure, completed.
        uncounted: Operations that nobody counted: ``{name: how many of them ran}``. They are additions, activations and
            the like, except those in ``incomplete``.
        incomplete: Names in ``uncounted`` that do consist of multiply-adds: ``macs`` is too low by these.
        modules: :class:`ModuleCosts` of every module, by name; ``""`` is the model.
        notes: What else the reader should know.
    """

    params: Count
    macs: Count
    by_operator: Mapping[str, int]
    recovered: Mapping[str, int]
    other: Mapping[str, int]
    uncounted: Mapping[str, int]
    incomplete: tuple[str, ...]
    modules: Mapping[str, ModuleCosts]
    notes: tuple[str, ...] = ()

    def table(self, depth: int = 2) -> str:
        """The costs as text: modules down to ``depth``, then what is counted apart and what is not counted."""
        rows = [["module", "kind", "parameters", "not 0", "MACs", "zeros skipped"]]
        for name, module in self.modules.items():
            if not name or name.count(".") < depth:
                (params, left), (macs, remain) = module.params, module.macs
                row = [name or "(all)", module.kind, f"{params:,}", f"{left:,}", f"{macs:,}", f"{remain:,}"]
                rows.append(row)
        lines = align(rows, left=2)
        lines += [f"{count:,} MACs of {name} by torch, fvcore has no count" for name, count in self.recovered.items()]
        lines += [f"{count:,} operations of {name} by fvcore, not in the MACs" for name, count in self.other.items()]
        if self.uncounted:
            lines.append("not counted: " + ", ".join(f"{n} x {name}" for name, n in self.uncounted.items()))
        if self.incomplete:
            lines.append(f"THE MACS ARE TOO LOW: {', '.join(self.incomplete)} could not be counted")
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """The costs of the whole model as JSON content (without its modules)."""
        return {
            "params": self.params._asdict(),
            "macs": self.macs._asdict(),
            "by_operator": dict(self.by_operator),
            "recovered": dict(self.recovered),
            "other": dict(self.other),
            "uncounted": dict(self.uncounted),
            "incomplete": list(self.incomplete),
            "notes": list(self.notes),
        }


def count_costs(model: nn.Module, example_inputs: Any, masks: Mapping[str, Tensor] | None = None) -> Costs:
    """Count parameters and multiply-adds of a model.

    fvcore counts, a multiply-add once. What it has no count for, attention above all, is counted by the formulas of
    torch's ``FlopCounterMode`` (half its FLOPs) where those exist, and named where they do not. The model runs twice
    in evaluation mode without gradients; modes, weights and random-number state come back as they were. Inside DDP's
    or ``torch.compile``'s wrapper, the module within is counted.

    Args:
        model: Any module, on any device.
        example_inputs: A tuple holds positional arguments, a dict keyword arguments, anything else is one argument.
            MACs are those of the whole batch; give a batch of 1 for MACs an example.
        masks: ``{parameter name: boolean tensor}`` (a :class:`MaskSet`): pruned entries count as zeros, whatever values
            they hold now.

    Returns:
        The costs.

    Raises:
        MeasurementError: The model does not run with these inputs.
        MaskMismatchError: Masks of another network, or with a fill (pruned entries that are no zeros save nothing).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.ReLU())
        >>> count_costs(net, torch.zeros(1, 3, 10, 10)).macs
        Count(total=13824, nonzero=13824)

    Limits:
        Only the path that ran is counted. Zeros of weights are seen where a weight, a view of it or something computed
        from weights alone is a factor of the product.
    """
    model = bare(model)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with uncompiled(model), torch.random.fork_rng(devices), _masked(model, masks):
        try:
            products = count_products(model, example_inputs)
        except PruneError:
            raise
        except Exception as error:
            raise MeasurementError(
                f"{type(model).__name__} cannot be run with these example inputs ({type(error).__name__}: {error}); "
                "give a tuple of positional arguments, a dict of keyword arguments, or the single argument, on the "
                "model's device."
            ) from error
        params = _count_params(model)
        try:
            found = _by_fvcore(model, example_inputs)
        except Exception as error:
            note = f"fvcore could not follow this model ({type(error).__name__}: {error}): all MACs are by torch."
            return _assemble(model, params, products, _Found(), note)
    return _assemble(model, params, products, found)


@dataclass
class _Found:
    """fvcore's counts: by module and operator, and what it has no count for, by module."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    unsupported: dict[str, Counter[str]] = field(default_factory=dict)
    einsums: bool = False

    def macs(self, name: str) -> int:
        return round(sum(n for op, n in self.counts.get(name, {}).items() if op in _PRODUCTS))


class _Plain(nn.Module):
    """A model as fvcore takes it: tensors in, tensors out."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.model = model
        self._inputs = example_inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        return tuple(output_tensors(call_model(self.model, map_tensors(lambda _: next(remaining), self._inputs))))


def _by_fvcore(model: nn.Module, example_inputs: Any) -> _Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about itself
        from fvcore.nn import FlopCountAnalysis

        tensors: list[Tensor] = []
        map_tensors(lambda t: tensors.append(t.clone()), example_inputs)
        analysis = FlopCountAnalysis(_Plain(model, example_inputs), tuple(tensors))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).ancestor_mode("caller")
        einsums: list[Any] = []

        def note_einsum(inputs: Any, outputs: Any) -> Counter[str]:
            einsums.append(outputs)
            return Counter()

        # fvcore reads an einsum's count from a text of four digits; torch's is exact.
        analysis.set_op_handle("aten::einsum", note_einsum)
        with evaluation(model):
            counts = analysis.by_module_and_operator()
        names = {name: name.removeprefix("model").removeprefix(".") for name in counts if name}
        return _Found(
            {short: counts[name] for name, short in names.items()},
            {
                short: Counter({op.removeprefix("aten::"): n for op, n in analysis.unsupported_ops(name).items()})
                for name, short in names.items()
            },
            bool(einsums),
        )


def _assemble(
    model: nn.Module, params: Mapping[str, Count], products: ProductCounts, found: _Found, note: str = ""
) -> Costs:
    def macs(name: str) -> Count:
        total = max(products.macs[name], found.macs(name))
        return Count(total, total - (products.macs[name] - products.nonzero[name]))

    recovered: Counter[str] = Counter()
    incomplete: set[str] = set()
    extra = products.macs[""] - found.macs("")
    unknown = {op for op in found.unsupported.get("", ()) if op in _UNKNOWN_PRODUCTS}
    for op in unknown:
        where = [name for name, ops in found.unsupported.items() if op in ops]
        innermost = [name for name in where if not any(o != name and _within(o, name) for o in where)]
        if any(products.macs[name] <= found.macs(name) for name in innermost):
            incomplete.add(op)
    operators = Counter({op: round(n) for op, n in found.counts.get("", Counter()).items() if op in _PRODUCTS and n})
    if extra > 0:
        named = sorted(unknown - incomplete) + ["einsum"] * found.einsums
        recovered["matmul" if found.counts and not named else " + ".join(named) or "all operators"] = extra
    other = {op: round(n) for op, n in found.counts.get("", Counter()).items() if op not in _PRODUCTS}
    uncounted = {op: n for op, n in found.unsupported.get("", Counter()).items() if op not in unknown - incomplete}
    modules = {n: ModuleCosts(type(m).__name__, params[n], macs(n)) for n, m in model.named_modules()}
    return Costs(
        params[""],
        macs(""),
        dict(operators + recovered),
        dict(recovered),
        other,
        dict(sorted(uncounted.items())),
        tuple(sorted(incomplete)),
        modules,
        (note,) if note else (),
    )


def _within(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _count_params(model: nn.Module) -> dict[str, Count]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import parameter_count

        totals = parameter_count(model)
    nonzero: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for end in range(len(parts)):
            nonzero[".".join(parts[:end])] += int(torch.count_nonzero(parameter))
    return {name: Count(totals.get(name, 0), nonzero[name]) for name, _ in model.named_modules()}


@contextmanager
def _masked(model: nn.Module, masks: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Hold pruned entries at 0 inside; afterwards every parameter has its values again."""
    if getattr(masks, "fills", None):
        raise MaskMismatchError(
            "these masks have fills: pruned weights that hold other values than 0 save nothing. Count without masks."
        )
    parameters = {canonical_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    saved: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        try:
            for name, mask in (masks or {}).items():
                own = parameters.get(canonical_name(name))
                if own is None or own.shape != mask.shape:
                    reason = close_names(name, parameters) if own is None else f" of shape {tuple(mask.shape)}."
                    raise MaskMismatchError(
                        f"the masks belong to another network: {type(model).__name__} has no parameter {name!r}{reason}"
                    )
                saved.append((own, own.detach().clone()))
                own.masked_fill_(mask.to(own.device).logical_not(), 0)
            yield
        finally:
            for parameter, values in saved:
                parameter.copy_(values)
