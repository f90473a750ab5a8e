"""timm's attention whose code takes the inner width from its input (BEiT, EVA, SwinV2), with a free inner width.

timm's other common attention (ViT, Swin and what builds on them) reads attributes that surgery keeps true.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor

from lightning_prune.channels.attention.base import FreeWidth, Size


def _heads(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (N, heads, tokens, width), from one projection; keys' bias is a buffer."""
    if module.q_bias is None:
        qkv = module.qkv(x)
    else:
        bias = torch.cat([module.q_bias, module.k_bias, module.v_bias])
        qkv = module.qkv(x) + bias if module.qkv_bias_separate else F.linear(x, module.qkv.weight, bias)
    return qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Heads' outputs side by side: (N, tokens, heads * width). The mask is additive or boolean."""
    if module.fused_attn:
        dropout = module.attn_drop.p if module.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=module.scale)
        return out.transpose(1, 2).flatten(2)
    scores = (q * module.scale) @ k.transpose(-2, -1)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    elif mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return (module.attn_drop(scores.softmax(dim=-1)) @ v).transpose(1, 2).flatten(2)


def _fused_heads(module: Any, size: Size) -> dict[str, Any]:
    return {"num_heads": size(module.qkv.weight, 0) * module.num_heads // module.qkv.weight.shape[0]}


class FreeBeitAttention(FreeWidth, BeitAttention):
    """BEiT's attention whose heads can leave; at full width it computes what the original does."""

    weights = ("qkv.weight", "proj.weight")

    def true_sizes(self, size: Size, thinned: bool) -> dict[str, Any]:
        """Heads from the rows of the projection; the width of a head stays."""
        return {} if thinned else _fused_heads(self, size)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attend as the original does, at whatever inner width the weights have."""
        q, k, v = _heads(self, x)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.proj_drop(self.proj(_attend(self, q, k, v, bias)))


class FreeEvaAttention(FreeWidth, EvaAttention):
    """EVA's and DINOv3's attention whose heads can leave; at full width it computes what the original does."""

    weights = ("qkv.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "proj.weight")
    can_thin = False  # rotary embeddings pair the places of a head

    def true_sizes(self, size: Size, thinned: bool) -> dict[str, Any]:
        """Heads from the rows of the projection; the width of a head stays."""
        return {"num_heads": size(self.proj.weight, 1) // self.head_dim}

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend as the original does, at whatever inner width the weights have."""
        if self.qkv is not None:
            q, k, v = _heads(self, x)
        else:
            projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in projections)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        out = self.norm(_attend(self, q, k, v, attn_mask, is_causal))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotary embedding of all tokens but the prefix."""
        prefix, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=self.rotate_half)], dim=2)


class FreeWindowAttentionV2(FreeWidth, WindowAttention):
    """timm's SwinV2 attention whose heads can leave; at full width it computes what the original does."""

    weights = ("qkv.weight", "proj.weight")

    def true_sizes(self, size: Size, thinned: bool) -> dict[str, Any]:
        """Heads from the rows of the projection; the width of a head stays."""
        return {} if thinned else _fused_heads(self, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend as the original does, at whatever inner width the weights have."""
        q, k, v = _heads(self, x)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        tokens = scores.shape[-1]
        table: Tensor = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        places = cast(Tensor, self.relative_position_index)
        bias = table[places.flatten()].unflatten(0, (tokens, tokens))
        scores = scores + 16 * torch.sigmoid(bias.permute(2, 0, 1).contiguous())
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
        out = (self.attn_drop(self.softmax(scores)) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))
