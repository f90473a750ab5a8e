"""How the networks fill their parameters: every draw happens in ``reset_parameters``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError


@contextmanager
def no_draws() -> Iterator[None]:
    """Build layers without moving the global random generator.

    Layers fill themselves when they are built. A network that then calls its own ``reset_parameters`` would draw twice,
    and a later ``reset_parameters`` under the same seed would differ from building anew.
    """
    with torch.random.fork_rng(devices=[]):
        yield


def conv_normal(weight: Tensor) -> Tensor:
    """Fill with N(0, 2 / (k k out)): He's initialisation by outputs."""
    return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def linear_normal(weight: Tensor) -> Tensor:
    """Fill with N(0, 0.01^2)."""
    return nn.init.normal_(weight, std=0.01)


def initialize(
    network: nn.Module,
    *,
    conv: Callable[[Tensor], object],
    linear: Callable[[Tensor], object],
    norm_scale: float = 1.0,
) -> None:
    """Fill every convolution, linear and BatchNorm layer of ``network``, in the order of its modules.

    Args:
        network: Changed in place.
        conv: Fills the weight of a convolution in place; biases become 0.
        linear: Fills the weight of a linear layer in place; biases become 0.
        norm_scale: Initial scale of BatchNorm; shifts become 0, running statistics start anew.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            (conv if isinstance(module, nn.Conv2d) else linear)(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.reset_running_stats()
            nn.init.constant_(module.weight, norm_scale)
            nn.init.zeros_(module.bias)


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded, at least 1.

    Raises:
        ConfigError: ``width`` is not a positive number.
    """
    if not width > 0:
        raise ConfigError(f"width={width!r} is no multiplier of channel counts; give a number above 0, such as 0.5.")
    return max(1, round(channels * width))


def check_classes(num_classes: int) -> int:
    """``num_classes`` if it is a whole number of at least 2.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ConfigError(f"num_classes={num_classes!r}: a classifier needs a whole number of classes, at least 2.")
    return num_classes
