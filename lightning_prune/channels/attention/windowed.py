"""torchvision's windowed attention (Swin, SwinV2, MaxViT) with a free inner width."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from lightning_prune.channels.attention.base import FreeWidth, Size


def _cut(x: Tensor, window: Sequence[int]) -> Tensor:
    """(N, H, W, ...) -> (N, rows, columns, window height, window width, ...)."""
    return x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)


def _regions(extent: int, window: int, shift: int, device: torch.device) -> Tensor:
    """After a cyclic shift, which of the pieces that lay apart before each position belongs to."""
    place = torch.arange(extent, device=device)
    return (place >= extent - window).long() + (place >= extent - shift) if shift else torch.zeros_like(place)


def _shift_mask(x: Tensor, window: Sequence[int], shifts: Sequence[int]) -> Tensor:
    """-100 where two tokens of a window lay apart before the shift, else 0: (windows, 1, tokens, tokens)."""
    rows, columns = (_regions(n, w, s, x.device) for n, w, s in zip(x.shape[1:3], window, shifts, strict=True))
    region = _cut((3 * rows[:, None] + columns)[None], window).flatten(3).flatten(0, 2)
    apart = region[:, None, :] != region[:, :, None]
    return x.new_zeros(apart.shape).masked_fill(apart, -100.0).unsqueeze(1)


class FreeShiftedWindowAttention(FreeWidth, ShiftedWindowAttention):
    """torchvision's Swin attention whose heads can leave; at full width it computes what the original does.

    Shape:
        Input and output: (N, H, W, C).
    """

    weights = ("qkv.weight", "proj.weight")

    def true_sizes(self, size: Size, thinned: bool) -> dict[str, Any]:
        """Heads, or the width of a head, from the rows of the projection."""
        width = self.qkv.weight.shape[0] // (3 * self.num_heads)
        if thinned:
            return {"score_scale": self.score_scale or width**-0.5}
        return {"num_heads": size(self.qkv.weight, 0) // (3 * width)}

    def forward(self, x: Tensor) -> Tensor:
        """Attend as the original does, at whatever inner width the weights have."""
        bias = self.get_relative_position_bias()
        batch, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        # A window that covers everything is not shifted.
        shifts = [0 if w >= n else s for n, w, s in zip(x.shape[1:3], self.window_size, self.shift_size, strict=True)]
        shifted = any(shifts)
        if shifted:
            x = torch.roll(x, [-s for s in shifts], (1, 2))
        windows = _cut(x, self.window_size)
        mask = _shift_mask(x, self.window_size, shifts) if shifted else None
        x = self._attend(windows.flatten(3, 4).flatten(0, 2), bias, mask, batch)
        x = x.unflatten(1, self.window_size).unflatten(0, windows.shape[:3]).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        if shifted:
            x = torch.roll(x, shifts, (1, 2))
        return x[:, :height, :width].contiguous()

    def _attend(self, x: Tensor, bias: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """Attention within each window: (N * windows, tokens, C)."""
        qkv = F.linear(x, self.qkv.weight, self._bias()).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = self._scores(q, k) + bias
        if mask is not None:
            scores = (scores.unflatten(0, (batch, -1)) + mask).flatten(0, 1)
        weights = F.dropout(scores.softmax(dim=-1), self.attention_dropout, self.training)
        out = F.linear((weights @ v).transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
        return F.dropout(out, self.dropout, self.training)

    def _bias(self) -> Tensor | None:
        return self.qkv.bias

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * (self.score_scale or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)


class FreeShiftedWindowAttentionV2(FreeShiftedWindowAttention, ShiftedWindowAttentionV2):
    """torchvision's SwinV2 attention whose heads can leave: cosines with a learned scale for each head.

    Shape:
        Input and output: (N, H, W, C).
    """

    def _bias(self) -> Tensor | None:
        """Keys have no bias, whatever the parameter holds there."""
        if self.qkv.bias is None:
            return None
        q, k, v = self.qkv.bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale


class FreeRelativePositionalMultiHeadAttention(FreeWidth, RelativePositionalMultiHeadAttention):
    """torchvision's MaxViT attention whose heads can leave; at full width it computes what the original does.

    Shape:
        Input and output: (N, windows, tokens, C).
    """

    weights = ("to_qkv.weight", "merge.weight")

    def true_sizes(self, size: Size, thinned: bool) -> dict[str, Any]:
        """Heads, or the width of a head, from the rows of the projection."""
        inner = size(self.to_qkv.weight, 0) // 3
        return {"head_dim": inner // self.n_heads} if thinned else {"n_heads": inner // self.head_dim}

    def forward(self, x: Tensor) -> Tensor:
        """Attend as the original does, at whatever inner width the weights have."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((scores.softmax(dim=-1) @ v).transpose(2, 3).flatten(3))
