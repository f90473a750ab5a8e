"""Multiply-adds of the operations that really run, and how many of them zeros in weights would save."""

import warnings
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.running import call_model, evaluation, following, map_tensors

# Where an operation takes the factors of its products; the others of its arguments are added.
_FACTORS = {"addmm": (1, 2), "baddbmm": (1, 2), "mm": (0, 1), "bmm": (0, 1), "convolution": (0, 1)}


class ProductCounts:
    """Multiply-adds by module, counted while a model ran.

    Attributes:
        macs: ``{module name: multiply-adds}`` of everything that ran inside the module; ``""`` is the whole model.
        nonzero: The same without products with a zero weight.
    """

    def __init__(self) -> None:
        self.macs: Counter[str] = Counter()
        self.nonzero: Counter[str] = Counter()


class _Products(TorchDispatchMode):
    def __init__(self, model: nn.Module, running: list[str], counts: ProductCounts) -> None:
        super().__init__()
        from torch.utils.flop_counter import FlopCounterMode

        self.formulas = FlopCounterMode(display=False).flop_registry
        self.running = running
        self.counts = counts
        # By storage, so that views (a transposed weight, one of three stacked projections) are known as weights too.
        # Tensors computed from weights alone (a cast, a standardised weight) are weights; they are kept, since the
        # place of a freed one would be given to another tensor.
        self.weights: dict[int, Tensor] = {_place(p): p for p in model.parameters() if p.numel()}
        self.fractions: dict[tuple[Any, ...], float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            macs = int(formula(*args, **kwargs, out_val=out)) // 2
            left = round(macs * self._fraction_nonzero(func._overloadpacket.__name__, args))
            for name in set(self.running):
                self.counts.macs[name] += macs
                self.counts.nonzero[name] += left
        self._note_weights(args, kwargs, out)
        return out

    def _fraction_nonzero(self, name: str, args: Any) -> float:
        """Of the entries of the operation's weight; of two weights the sparser counts, without one nothing is 0."""
        factors = [args[i] for i in _FACTORS.get(name, ()) if i < len(args)]
        return min((self._nonzero(t) for t in factors if _place(t) in self.weights), default=1.0)

    def _nonzero(self, tensor: Tensor) -> float:
        key = (_place(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if key not in self.fractions:
            self.fractions[key] = int(torch.count_nonzero(tensor)) / max(tensor.numel(), 1)
        return self.fractions[key]

    def _note_weights(self, args: Any, kwargs: Any, out: Any) -> None:
        read: list[Tensor] = []
        map_tensors(read.append, (list(args), kwargs))
        if read and all(_place(t) in self.weights for t in read):
            map_tensors(lambda t: self.weights.setdefault(_place(t), t), out)


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def count_products(model: nn.Module, example_inputs: Any) -> ProductCounts:
    """Run a model once in evaluation mode and count its multiply-adds by torch's own formulas.

    They are those of ``torch.utils.flop_counter.FlopCounterMode`` (2 FLOPs are 1 MAC). Attention and recurrent layers
    run as the products they consist of, since their fused kernels are opaque.

    Args:
        model: The model; weights that are exactly 0 are what ``nonzero`` leaves out.
        example_inputs: A tuple holds positional arguments, a dict keyword arguments, anything else is one argument.
    """
    counts = ProductCounts()
    with ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*TF32 acceleration")  # of the next line, on every CPU
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        running = stack.enter_context(following(model))
        stack.enter_context(evaluation(model))
        stack.enter_context(_Products(model, running, counts))
        call_model(model, map_tensors(torch.clone, example_inputs))
    return counts
