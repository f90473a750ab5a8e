"""Which widths suit a device: a number of channels by device type and data type, from a stated rule."""

from collections.abc import Mapping

import torch
from torch import nn

from lightning_prune.errors import ConfigError

AUTO = "auto"

# Bytes of one vector register, by the instruction set that torch's CPU kernels use here.
_VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}
_NARROWEST_VECTOR_BYTES = 16  # SSE, NEON, VSX, and what is not known
_GPU_BYTES = 16
_MPS_TILE = 8

RoundTo = int | str | torch.device | Mapping[str, int]


def alignment(device: str | torch.device, dtype: torch.dtype) -> int:
    """The multiple that widths should have on a device: a rule of alignment, not a measured speed.

    ========== ========================================= ===============================================================
    device     rule                                      why
    ========== ========================================= ===============================================================
    ``cuda``   16 bytes: 8 for float16 and bfloat16,     kernels of matrix units load 16 bytes at a time; rows that are
               4 for float32 (TF32), 2 for float64       no multiple of it are padded or take another kernel
    ``cpu``    one vector register: 64 bytes with        kernels run over channels in whole vectors; the last, partly
               AVX-512, 32 with AVX2, else 16            filled one costs as much as a full one
    ``mps``    8, whatever the type                      matrix products of a SIMD group work on tiles of 8 x 8
    ========== ========================================= ===============================================================

    Whether a narrower network is faster must be measured; a width off the rule may be as fast, or faster.

    Args:
        device: Device, or its type.
        dtype: Data type in which the network will run there, which under autocast is not that of its parameters.

    Returns:
        Channels, at least 1.

    Raises:
        ConfigError: No rule for this type of device, or a data type that is not floating point.

    Example:
        >>> alignment("cuda", torch.float16)
        8
    """
    kind = torch.device(device).type
    if not dtype.is_floating_point:
        raise ConfigError(f"alignment for {dtype}: expected a floating-point type; give round_to as a number.")
    if kind == "mps":
        return _MPS_TILE
    if kind == "cuda":
        unit = _GPU_BYTES
    elif kind == "cpu":
        unit = _VECTOR_BYTES.get(torch.backends.cpu.get_cpu_capability(), _NARROWEST_VECTOR_BYTES)
    else:
        raise ConfigError(
            f"round_to has no rule for device type {kind!r}, only for cpu, cuda and mps; give a number, such as 8."
        )
    return max(1, unit // dtype.itemsize)


def resolve_round_to(round_to: RoundTo, model: nn.Module) -> int:
    """The number that ``round_to`` stands for on this model.

    Args:
        round_to: A number; ``"auto"``: :func:`alignment` for the device and type that hold most of the model's
            parameters; another string or a device: the same for the device on which the network will run; a mapping
            from device type to number: the entry of the model's device.
        model: The model.

    Raises:
        ConfigError: Below 1, no number, a device without a rule, or a mapping without the model's device.
    """
    if isinstance(round_to, int) and not isinstance(round_to, bool):
        number = round_to
    elif isinstance(round_to, Mapping):
        kind = _home(model)[0]
        if kind not in round_to:
            raise ConfigError(f"round_to={dict(round_to)} has no entry for {kind!r}, the device of the model.")
        number = round_to[kind]
    elif isinstance(round_to, (str, torch.device)):
        kind, dtype = _home(model)
        try:
            number = alignment(kind if round_to == AUTO else round_to, dtype)
        except RuntimeError as error:
            raise ConfigError(f"round_to={round_to!r}: expected a number, 'auto' or a device ({error}).") from error
    else:
        raise ConfigError(f"round_to={round_to!r}: expected a number, 'auto', a device, or numbers by device type.")
    if number < 1:
        raise ConfigError(f"round_to={number} must be at least 1.")
    return number


def _home(model: nn.Module) -> tuple[str, torch.dtype]:
    """Device type and data type of most of the model's floating-point parameters."""
    held: dict[tuple[str, torch.dtype], int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            key = (parameter.device.type, parameter.dtype)
            held[key] = held.get(key, 0) + parameter.numel()
    return max(held, key=lambda key: held[key]) if held else ("cpu", torch.get_default_dtype())
