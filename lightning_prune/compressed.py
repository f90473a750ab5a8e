"""Layers that run on the weights that are left: compressed rows on any device, 2:4 on GPUs that have it.

The product of compressed rows is torch's, or on a CPU one that Numba compiles (:mod:`lightning_prune.compiled_rows`).
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import compiled_rows


class _Compressed(nn.Module):
    """A weight matrix in compressed rows and a bias, kept as plain tensors: torch's sparse ones cannot be copied."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, compiled: bool) -> None:
        super().__init__()
        self.compiled = compiled
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta")
            rows = weight.detach().to_sparse_csr()
        self.shape = tuple(weight.shape)
        # of 32 bits: the kernels take them as they are, longer ones are converted at every call
        self.register_buffer("starts", rows.crow_indices().int())
        self.register_buffer("columns", rows.col_indices().int())
        self.register_buffer("values", rows.values())
        column = weight.new_zeros(len(weight)) if bias is None else bias
        self.register_buffer("bias", column.detach().reshape(-1, 1).clone())
        self._rows: Tensor | None = None
        self._multiply: Callable[[Tensor], Tensor] | None = None

    def product(self, matrix: Tensor) -> Tensor:
        """``weight @ matrix + bias``."""
        parts = self.starts, self.columns, self.values
        if self._rows is None:
            self._rows = torch.sparse_csr_tensor(*parts, self.shape, check_invariants=True)  # what a file held, too
        # the device, data type or machine may have changed since the layer was made
        if self.compiled and compiled_rows.available(matrix):
            if self._multiply is None:
                self._multiply = compiled_rows.multiplier(*parts, self.bias)
            return self._multiply(matrix)
        return torch.addmm(self.bias, self._rows, matrix)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._rows = self._multiply = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None, "_multiply": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._rows = self._multiply = None
        super()._load_from_state_dict(*args, **kwargs)


class CompressedLinear(_Compressed):
    """A linear layer whose weight is held in compressed rows (torch's sparse CSR); for inference.

    The product is that of the weight with the transposed input, so the output lies in memory transposed. Where code
    that follows insists on another layout (``view``), ``contiguous=True`` copies it.

    Args:
        layer: The layer to take the place of; its zeros are left out.
        contiguous: Whether outputs are laid out as a dense layer's.
        compiled: Whether the product is Numba's where there is one.
    """

    def __init__(self, layer: nn.Linear, contiguous: bool = False, compiled: bool = False) -> None:
        super().__init__(layer.weight, layer.bias, compiled)
        self.in_features, self.out_features, self.contiguous = layer.in_features, layer.out_features, contiguous

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        flat = x.reshape(-1, self.in_features)
        out = self.product(flat.t()).t()
        out = out.contiguous() if self.contiguous else out
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and how many weights are left."""
        return f"{self.in_features}, {self.out_features}, {self.values.numel()} weights"


class CompressedConv2d(_Compressed):
    """A convolution (without groups) as a product of compressed rows with the patches of the image; for inference.

    Args:
        layer: The layer to take the place of; zero padding by numbers, ``groups=1``.
        compiled: Whether the product is Numba's where there is one.
    """

    def __init__(self, layer: nn.Conv2d, compiled: bool = False) -> None:
        super().__init__(layer.weight.flatten(1), layer.bias, compiled)
        self.out_channels, self.kernel_size, self.stride = layer.out_channels, layer.kernel_size, layer.stride
        self.padding: Any = layer.padding
        self.dilation = layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, height', width')."""
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            patches = x.flatten(2)
        else:
            patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        out = torch.stack([self.product(image) for image in patches])
        return out.view(len(x), self.out_channels, height, width)

    def extra_repr(self) -> str:
        """Sizes and how many weights are left."""
        return f"{self.out_channels}, {self.kernel_size}, {self.values.numel()} weights"


def semi_structured(layer: nn.Linear) -> nn.Linear:
    """A linear layer whose 2:4 weight runs on the GPU's sparse units.

    Raises:
        RuntimeError: Another pattern, shape, data type or device.
    """
    from torch.sparse import to_sparse_semi_structured

    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    made.bias = layer.bias
    return made


def candidates(layer: nn.Module, contiguous: bool = False) -> dict[str, nn.Module]:
    """The forms that a layer can run in beside the dense one, by name; empty where there is none."""
    found: dict[str, nn.Module] = {}
    if type(layer) is nn.Linear:
        found["compressed rows"] = CompressedLinear(layer, contiguous)
        if compiled_rows.available(layer.weight):
            found["compiled rows"] = CompressedLinear(layer, contiguous, compiled=True)
        if layer.weight.device.type == "cuda" and is_two_of_four(layer.weight):
            # a GPU, data type or shape without these kernels
            with contextlib.suppress(RuntimeError, NotImplementedError):
                found["2:4"] = semi_structured(layer)
    elif type(layer) is nn.Conv2d and layer.groups == 1 and _pads_with_zeros(layer):
        found["compressed rows"] = CompressedConv2d(layer)
        if compiled_rows.available(layer.weight):
            found["compiled rows"] = CompressedConv2d(layer, compiled=True)
    return found


def _pads_with_zeros(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of any four neighbours along the last axis are not 0."""
    if weight.shape[-1] % 4:
        return False
    return bool(((weight != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())
