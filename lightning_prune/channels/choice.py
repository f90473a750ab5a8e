"""A layer that says which channels go on, so that one reader of shared channels can do without some of them."""

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError


class ChannelSelection(nn.Module):
    """Pass on the channels whose numbers are in ``indexes``: all of them, until some leave.

    Put before the BatchNorm that opens a branch of a pre-activation network. The channels between blocks are shared by
    the whole stage and stay; the selection, its BatchNorm and the convolution after it lose channels of their own.

    Paper: Liu et al. 2017, arXiv:1708.06519, section 3.5 ("channel selection layer"). Deviations: it stands before the
    BatchNorm, which so becomes narrow too and computes the same; ``indexes`` is a buffer, not a parameter.

    Args:
        channels: How many channels come in.

    Shape:
        input: (N, channels, ...). Output: (N, len(indexes), ...).

    Raises:
        ConfigError: ``channels`` is no whole number of at least 1.

    Example:
        >>> ChannelSelection(4)(torch.ones(1, 4, 2, 2)).shape
        torch.Size([1, 4, 2, 2])
    """

    indexes: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ConfigError(f"channels={channels!r}: expected a whole number of at least 1.")
        self.register_buffer("indexes", torch.arange(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The chosen channels."""
        return x.index_select(1, self.indexes)
