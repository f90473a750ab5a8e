"""What weights are frozen at: as they are, or drawn in one of the ways that supermasks were studied with."""

import math

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError
from lightning_prune.prunable import close_names

INITS = ("keep", "signed_constant", "kaiming_constant", "kaiming_normal")
"""Every initialisation of :func:`frozen_weight`."""


def frozen_weight(
    weight: Tensor,
    init: str = "keep",
    *,
    density: float | None = None,
    gain: float = math.sqrt(2),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Values to freeze a weight tensor at.

    ====================  =============================================================================================
    ``keep``              ``weight`` itself
    ``signed_constant``   ``sign(weight) * s``, ``s`` the (population) standard deviation of ``weight``
    ``kaiming_constant``  ``sign(weight) * gain / sqrt(fan_in)``
    ``kaiming_normal``    new, normal: mean 0, standard deviation ``gain / sqrt(fan_in)``
    ====================  =============================================================================================

    Papers: Zhou et al. 2019, arXiv:1905.01067, section 3 (``signed_constant``); Ramanujan et al. 2020,
    arXiv:1911.13299, section 4 (the other two; it calls ``kaiming_constant`` signed Kaiming constant).

    Args:
        weight: Initial weights, two dimensions or more.
        init: A name in :data:`INITS`.
        density: Where given, ``fan_in`` is multiplied by it: only that part of the inputs will pass ("scaled").
        gain: Of the non-linearity; the square root of 2 for ReLU.
        generator: Source of ``kaiming_normal``, on the CPU. Default: torch's own.

    Returns:
        A new tensor of the same shape, dtype and device.

    Raises:
        ConfigError: An unknown ``init``; a weight of fewer than two dimensions, which has no fan.

    Example:
        >>> frozen_weight(torch.tensor([[3.0, -1.0]]), "kaiming_constant")
        tensor([[ 1., -1.]])
    """
    if init not in INITS:
        raise ConfigError(f"init={init!r} is unknown{close_names(str(init), INITS)}")
    weight = weight.detach()
    if init == "keep":
        return weight.clone()
    if init == "signed_constant":
        return torch.sign(weight) * weight.std(correction=0)
    std = gain / math.sqrt(fan_in(weight) * (1.0 if density is None else density))
    if init == "kaiming_constant":
        return torch.sign(weight) * std
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
    return drawn.mul_(std).to(weight)


def popup_scores(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """First scores of edge-popup: uniform between ``-1 / sqrt(fan_in)`` and ``1 / sqrt(fan_in)``."""
    bound = 1 / math.sqrt(fan_in(weight))
    drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
    return drawn.to(weight)


def fan_in(weight: Tensor) -> int:
    """Inputs of one output of a layer.

    Raises:
        ConfigError: Fewer than two dimensions.
    """
    if weight.dim() < 2:
        raise ConfigError(
            f"a weight of shape {tuple(weight.shape)} has no fan: masks are learned of two dimensions up."
        )
    return nn.init._calculate_fan_in_and_fan_out(weight)[0]
