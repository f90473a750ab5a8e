"""Networks around attention that is replaced where heads leave."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention as MaxAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from tests.channels.networks import Net


def _multihead(w: int, width: int | None = None, **options: Any) -> nn.Module:
    """Without normalisation the widths around attention leave too: what is left has the shape of the original code."""

    def run(n: nn.Module, x: Tensor) -> Tensor:
        h = n.stem(x)
        other = n.other(x) if "other" in n._modules else h
        return n.head(n.attention(h, other, other, need_weights=False)[0])

    more = {"other": nn.Linear(6, width)} if width else {}
    if width:
        options |= {"kdim": width, "vdim": width}
    attention = nn.MultiheadAttention(w, w // 2, **options)
    return Net(run, stem=nn.Linear(6, w), attention=attention, head=nn.Linear(w, 5), **more)


def _swin(w: int, cls: type, hidden: int = 512) -> nn.Module:
    attention = cls(w, [2, 2], [1, 1], w // 2)
    if cls is ShiftedWindowAttentionV2:
        attention.cpb_mlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, w // 2, bias=False))
    return Net(lambda n, x: n.head(n.attention(n.stem(x))), stem=nn.Linear(6, w), attention=attention,
               head=nn.Linear(w, 5))  # fmt: skip


def _grid(w: int) -> nn.Module:
    net = Net(lambda n, x: n.head(n.attention(n.stem(x))), stem=nn.Linear(6, w), attention=MaxAttention(w, 2, 4),
              head=nn.Linear(w, 5))  # fmt: skip
    net.attention.scale_factor = 8**-0.5  # removal does not rescale
    return net


NARROW: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "multihead": (lambda: _multihead(8), lambda: _multihead(4), (3, 4, 6)),
    "multihead, batch first": (lambda: _multihead(8, batch_first=True), lambda: _multihead(4, batch_first=True),
                               (3, 4, 6)),
    "multihead, all keys": (lambda: _multihead(8, add_bias_kv=True, add_zero_attn=True),
                            lambda: _multihead(4, add_bias_kv=True, add_zero_attn=True), (3, 4, 6)),
    "multihead, no bias": (lambda: _multihead(8, bias=False), lambda: _multihead(4, bias=False), (3, 4, 6)),
    "multihead, other widths": (lambda: _multihead(8, 6), lambda: _multihead(4, 3), (3, 4, 6)),
    "swin": (lambda: _swin(8, ShiftedWindowAttention), lambda: _swin(4, ShiftedWindowAttention), (2, 4, 4, 6)),
    "swin v2": (lambda: _swin(8, ShiftedWindowAttentionV2), lambda: _swin(4, ShiftedWindowAttentionV2, 256),
                (2, 4, 4, 6)),
    "maxvit": (lambda: _grid(8), lambda: _grid(4), (2, 3, 4, 6)),
}  # fmt: skip


class Block(nn.Module):
    """A transformer block; its residual stream is normalised and stays."""

    def __init__(self, width: int = 12, heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, 5)
        self.options = options

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        out, weights = self.attention(h, h, h, **self.options)
        y = self.head(x + out)
        return (y, weights) if self.options.get("average_attn_weights") else y


X = torch.rand(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
