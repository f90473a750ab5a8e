"""Turns masks into speed: emptied channels leave, then each layer runs in the form that measures fastest."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.compact import compact
from lightning_prune.channels.emptied import fold_constants_, plan_emptied
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.trace import trace_channels
from lightning_prune.compressed import candidates
from lightning_prune.costs import LatencyComparison, compare_latency
from lightning_prune.costs.tables import align
from lightning_prune.costs.timing import Interval, Timer, by_turns, ratio_of
from lightning_prune.errors import EqualityError, MaskMismatchError, NoEffectWarning, TraceError
from lightning_prune.masks import MaskSet
from lightning_prune.running import call_model, copy_model, evaluation, map_tensors, output_tensors
from lightning_prune.wrappers import bare, uncompiled

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""How far outputs may differ from the masked model's, as a part of their scale."""

MOST_DENSITY = 0.5
GAIN = 0.95


@dataclass(frozen=True)
class LayerChoice:
    """In which form a layer runs.

    Attributes:
        name: Of the module.
        density: Weights that are not 0, as a part of all.
        form: ``"dense"``, ``"compressed rows"``, ``"compiled rows"`` or ``"2:4"``.
        ratios: For each form that was tried, its time as a part of the dense layer's, with the 95 % interval.
    """

    name: str
    density: float
    form: str
    ratios: Mapping[str, Interval] = field(default_factory=dict)


@dataclass
class Accelerated:
    """A network that computes what the masked one does, faster where measurement says so. Call it like the network.

    Attributes:
        model: The network, for inference on the device, in the data type and near the batch size of the example inputs.
        layers: What each sparse layer runs as.
        plan: Which channels left; None if none was empty.
        error: Largest difference of outputs from the masked model's, as a part of their scale.
        comparison: The masked model, dense, and this one, by turns.
        notes: What else the reader should know.
    """

    model: nn.Module
    layers: list[LayerChoice]
    plan: RemovalPlan | None
    error: float
    comparison: LatencyComparison
    notes: list[str] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network in inference mode."""
        with torch.inference_mode():
            return self.model(*args, **kwargs)

    def table(self) -> str:
        """Layers with their forms and measured ratios, then the whole, as text."""
        rows = [["layer", "runs as", "weights left", "measured against dense"]]
        for layer in self.layers:
            told = "; ".join(f"{form} {i.median:.2f} ({i.low:.2f} to {i.high:.2f})" for form, i in layer.ratios.items())
            rows.append([layer.name, layer.form, f"{100 * layer.density:.1f} %", told])
        lines = align(rows, left=2)
        if self.plan is not None:
            before, after = self.plan.costs["channels"]
            lines.append(f"{before - after} of {before} channels were empty and have left")
        return "\n".join([*lines, f"whole network: {self.comparison}", *self.notes])


def accelerate(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    example_inputs: Any,
    *,
    seconds: float = 0.2,
    remove_channels: bool = True,
) -> Accelerated:
    """Make a masked network fast on the device that it is on.

    First, channels that the masks have emptied leave for real, exactly. Then every linear layer and convolution with
    at most half of its weights left is timed by turns with other forms of itself, on the inputs that it gets:
    compressed rows (convolutions over their patches) by torch's product and, on a CPU, by one that Numba compiles if it
    is installed, and on a GPU 2:4. A form is taken where the whole 95 % interval of its ratio lies under 0.95. At last
    the whole is timed beside the masked network, and where it is not faster the forms are taken back. The model itself
    does not change.

    Args:
        model: Any module; in the data type and on the device where it will run.
        masks: ``{parameter name: boolean tensor}`` (a :class:`MaskSet`); None: weights that are 0 already.
        example_inputs: A tuple holds positional arguments, a dict keyword arguments, anything else is one argument. The
            choice holds for their batch size.
        seconds: How long each comparison takes samples, at least; the whole is compared for ten times as long.
        remove_channels: Whether emptied channels leave.

    Returns:
        The fast network with what was chosen and measured.

    Raises:
        MaskMismatchError: Masks of another network, or with a fill.
        EqualityError: The result does not compute what the masked model computes.
        MeasurementError: The model cannot be run with these inputs, or so fast that it cannot be timed.

    Limits:
        For inference in evaluation mode. A layer that is not called as a module (attention's projections) stays dense.
    """
    if getattr(masks, "fills", None):
        raise MaskMismatchError("these masks have fills: pruned weights that hold other values than 0 save nothing.")
    notes: list[str] = []
    masked = copy_model(bare(model)).eval()
    if masks is not None:
        MaskSet(dict(masks)).apply_(masked)
    with uncompiled(masked):
        plan, small = _without_emptied(masked, example_inputs, notes) if remove_channels else (None, masked)
        expected = _outputs(masked, example_inputs)
        fast, layers, found = _in_other_forms(small, example_inputs, seconds)
        error = _difference(expected, found)
        if all(layer.form == "dense" for layer in layers):
            fast = small  # not its copy, whose place in memory alone can make a few hundredths
        comparison = compare_latency(masked, fast, example_inputs, seconds=10 * seconds)
        if comparison.ratio > 1 and fast is not small:
            notes.append(f"Layers stayed dense: in other forms the whole was {comparison}.")
            layers = [LayerChoice(layer.name, layer.density, "dense", layer.ratios) for layer in layers]
            fast, error = small, _difference(expected, _outputs(small, example_inputs))
            comparison = compare_latency(masked, fast, example_inputs, seconds=10 * seconds)
        if comparison.low > 1 and plan is not None:
            notes.append(f"Emptied channels stayed: without them the whole was {comparison}.")
            plan, fast, error = None, masked, 0.0
            comparison = compare_latency(masked, fast, example_inputs, seconds=10 * seconds)
    own = next(masked.parameters()).dtype
    if not error <= TOLERANCE.get(own, 1e-4):
        raise EqualityError(
            f"the accelerated network differs from the masked one by {error:.3g} of the outputs' scale, allowed is "
            f"{TOLERANCE.get(own, 1e-4):.0e} in {own}. Leave out remove_channels, and report this."
        )
    if plan is None and all(layer.form == "dense" for layer in layers):
        warnings.warn("nothing was faster than dense: the network runs as it did.", NoEffectWarning, stacklevel=2)
    return Accelerated(fast, layers, plan, error, comparison, notes)


def _without_emptied(masked: nn.Module, example_inputs: Any, notes: list[str]) -> tuple[RemovalPlan | None, nn.Module]:
    """A copy without the channels that are empty, or the model itself."""
    small = copy_model(masked)
    try:
        graph = trace_channels(small, example_inputs)
        if not graph.groups:
            return None, masked
        while fold_constants_(graph, example_inputs):
            pass
        plan = plan_emptied(graph)
        if plan is None:
            return None, masked
        compact(small, plan, example_inputs)
    except (TraceError, EqualityError) as error:
        notes.append(f"Emptied channels stayed: {error}")
        return None, masked
    return plan, small


def _in_other_forms(
    small: nn.Module, example_inputs: Any, seconds: float, contiguous: bool = False
) -> tuple[nn.Module, list[LayerChoice], list[Tensor]]:
    """A copy with every layer in its fastest form, what was chosen, and its outputs."""
    fast = copy_model(small)
    try:
        layers = _choose(fast, example_inputs, seconds, contiguous)
        return fast, layers, _outputs(fast, example_inputs)
    except RuntimeError as failure:
        if contiguous or "view" not in str(failure):
            raise
    return _in_other_forms(small, example_inputs, seconds, contiguous=True)  # as code insists on dense layers' layout


def _choose(model: nn.Module, example_inputs: Any, seconds: float, contiguous: bool) -> list[LayerChoice]:
    """Put every layer into its fastest form, in place."""
    sparse = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and _density(layer) <= MOST_DENSITY
    }
    chosen: list[LayerChoice] = []
    for name, layer in sparse.items():
        x = _layer_input(model, layer, example_inputs)  # as it comes from the forms that were chosen before
        forms = {} if x is None else candidates(layer, contiguous)
        tried = {form: _ratio(layer, other, x, seconds) for form, other in forms.items() if x is not None}
        ratios = {form: ratio for form, ratio in tried.items() if ratio is not None}
        gains = {form: ratio for form, ratio in ratios.items() if ratio.high < GAIN}
        best = min(gains, key=lambda form: gains[form].median, default="dense")
        if best != "dense":
            _replace(model, layer, forms[best])
        chosen.append(LayerChoice(name, _density(layer), best, ratios))
    return chosen


def _density(layer: nn.Linear | nn.Conv2d) -> float:
    return int(torch.count_nonzero(layer.weight)) / max(layer.weight.numel(), 1)


def _layer_input(model: nn.Module, layer: nn.Module, example_inputs: Any) -> Tensor | None:
    """What a layer gets in its first call, in the same layout; None if it is not called."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().clone()) if args else None)
    try:
        _outputs(model, example_inputs)
    finally:
        hook.remove()
    return found[0] if found else None


def _ratio(dense: nn.Module, other: nn.Module, x: Tensor, seconds: float) -> Interval | None:
    """Time of another form as a part of the dense layer's; None where this data type has no such kernel."""
    with torch.inference_mode():
        a, b = (Timer(lambda layer=layer: layer(x), x.device) for layer in (dense, other))  # type: ignore[misc]
        try:
            b.call()
        except (RuntimeError, NotImplementedError):
            return None
        a.warm_up(), b.warm_up()
        for patience in (1, 2, 4):  # longer where noise leaves it open
            found = ratio_of(by_turns(a, b, patience * seconds, within=0.02))
            if found.high < GAIN or found.low > GAIN:
                break
        return found


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    with evaluation(model, fast_path=True), torch.inference_mode():
        return output_tensors(call_model(model, map_tensors(torch.clone, example_inputs)))


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.is_floating_point() and a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)))
    return worst
