"""``nn.MultiheadAttention`` with a free inner width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.channels.attention.base import FreeWidth, Size
from lightning_prune.errors import PruneError


class FreeMultiheadAttention(FreeWidth, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads can leave; at full width it computes what the original does.

    Args, shapes and results are those of the original. ``embed_dim`` is the width of queries and outputs, and
    ``num_heads`` times the width of a head is the rows of each projection, whatever ``embed_dim`` is.

    Raises:
        PruneError: Nested tensors, which only the original's fused fast path takes.
    """

    weights = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")

    # The fused fast paths of this module's owners read the weights themselves and take the inner width from the
    # input. They ask here whether they may; a data descriptor of the class hides the instance's own value.
    _qkv_same_embed_dim = property(lambda self: False)

    def true_sizes(self, size: Size, thinned: bool) -> dict[str, Any]:
        """Heads from the rows of the query projection; widths of the three inputs from the projections' columns."""
        if self.in_proj_weight is not None:
            inner, width = size(self.in_proj_weight, 0) // 3, size(self.in_proj_weight, 1)
            widths = (width, width, width)
        else:
            projections = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            inner = size(self.q_proj_weight, 0)
            widths = tuple(size(p, 1) for p in projections)
        if thinned:
            sizes = {"head_dim": inner // self.num_heads, "score_scale": self.score_scale or self.head_dim**-0.5}
        else:
            sizes = {"num_heads": inner // self.head_dim}
        return {**sizes, **dict(zip(("embed_dim", "kdim", "vdim"), widths, strict=True))}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the original does, at whatever inner width the weights have."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise PruneError(
                "attention whose heads left takes no nested tensors, got one; expected padded tensors with a "
                "key_padding_mask. Build nn.TransformerEncoder with enable_nested_tensor=False."
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, which is None; give the causal mask as well.")
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        alone = query is key and key is value
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        q, k, v = self._project(query, query, query) if alone else self._project(query, key, value)
        mask, is_causal = self._mask(q, k, key_padding_mask, attn_mask, is_causal, need_weights)
        k, v, mask = self._longer(k, v, mask)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * (self.score_scale or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout, dropout > 0)
            heads = weights @ v
            if average_attn_weights:
                weights = weights.mean(dim=1)
            weights = weights if batched else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.score_scale)
        out = F.linear(heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (N, tokens, heads * width)."""
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        projections: tuple[Tensor | None, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            projections = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), projections, biases, strict=True))

    def _mask(
        self,
        q: Tensor,
        k: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor | None, bool]:
        """One additive mask that broadcasts against (N, heads, L, S), or None; whether the kernel makes it itself."""
        batch, length, source = q.shape[0], q.shape[1], k.shape[1]
        padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", q.dtype)
        if is_causal and padding is None and not need_weights:
            return None, True
        mask = F._canonical_mask(mask, "attn_mask", None, "", q.dtype, False)
        if mask is not None:
            expected = (length, source) if mask.dim() == 2 else (batch * self.num_heads, length, source)
            if tuple(mask.shape) != expected:
                raise RuntimeError(
                    f"attn_mask has shape {tuple(mask.shape)}, expected ({length}, {source}) or "
                    f"({batch * self.num_heads}, {length}, {source}): batch times the {self.num_heads} heads that this "
                    "attention has now."
                )
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads))
        if padding is not None:
            padding = (padding if padding.dim() == 2 else padding.unsqueeze(0))[:, None, None]
            if tuple(padding.shape) != (batch, 1, 1, source):
                raise RuntimeError(f"key_padding_mask of shape {tuple(padding.shape)}: expected ({batch}, {source}).")
            mask = padding if mask is None else mask + padding
        return mask, False

    def _longer(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned key and value, and the key and value that are 0, where the module has them."""
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
            added += 1
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros(k.shape[0], 1, k.shape[2])], dim=1)
            v = torch.cat([v, v.new_zeros(v.shape[0], 1, v.shape[2])], dim=1)
            added += 1
        return k, v, mask if mask is None or not added else F.pad(mask, (0, added))
