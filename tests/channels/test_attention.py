"""Replaced attention modules compute what the originals do, as long as no head has left."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention as MaxAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from lightning_prune.channels.attention import replaceable, replaced
from lightning_prune.errors import PruneError
from tests.channels.networks import assert_close, randomised

MULTIHEAD: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "other widths": {"kdim": 6, "vdim": 10},
    "other widths, both keys": {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "dropout": {"dropout": 0.5, "batch_first": True},
}
BATCH, QUERIES, KEYS, HEADS = 2, 4, 5, 2


def _calls(same: bool, batched: bool) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    keys = QUERIES if same else KEYS
    n = BATCH if batched else 1
    bools = torch.rand(QUERIES, keys, generator=generator) > 0.7
    bools[:, 0] = False
    floats = torch.rand(n * HEADS, QUERIES, keys, generator=generator, dtype=torch.float64)
    padding = torch.rand((n, keys) if batched else (keys,), generator=generator) > 0.7
    padding[..., 0] = False
    causal = torch.ones(QUERIES, keys, dtype=torch.bool).triu(1)
    masks: list[dict[str, Any]] = [
        {}, {"attn_mask": bools}, {"attn_mask": floats[0]}, {"attn_mask": floats}, {"key_padding_mask": padding},
        {"key_padding_mask": padding, "attn_mask": bools}, {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    ]  # fmt: skip
    weights: list[dict[str, Any]] = [{}, {"average_attn_weights": False}, {"need_weights": False}]
    for mask, want in itertools.product(masks, weights):
        yield {**mask, **want}


SOURCES = [
    (kind, source) for kind, options in MULTIHEAD.items()
    for source in (["cross"] if "kdim" in options else ["self", "cross", "key is value"])
]  # fmt: skip


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("kind", "source"), SOURCES)
def test_multihead_attention_at_full_width_is_the_original(kind: str, source: str, batched: bool) -> None:
    """Outputs, weights and gradients over every combination of masks and requested weights, also with dropout."""
    module = randomised(nn.MultiheadAttention(8, HEADS, **MULTIHEAD[kind])).train()
    torch.manual_seed(0)

    def tokens(count: int, width: int) -> Tensor:
        shape = (count, BATCH, width) if not module.batch_first else (BATCH, count, width)
        return torch.rand(shape if batched else (count, width), dtype=torch.float64, requires_grad=True)

    query = tokens(QUERIES, 8)
    key = query if source == "self" else tokens(KEYS, module.kdim)
    value = key if source != "cross" else tokens(KEYS, module.vdim)
    for call in _calls(source == "self", batched):
        results = []
        for kinds in ({}, replaceable(module)):
            with replaced(module, kinds):
                torch.manual_seed(5)
                out, weights = module(query, key, value, **call)
                total = out.square().sum() + (0 if weights is None else weights.square().sum())
                inputs = [query, *module.parameters()]
                gradients = torch.autograd.grad(total, inputs, allow_unused=True)
                results.append((out, weights, gradients))
        (out, weights, gradients), (other, other_weights, other_gradients) = results
        assert_close(out, other)
        assert (weights is None) == (other_weights is None) == (call.get("need_weights") is False)
        if weights is not None:
            assert_close(weights, other_weights)
        for one, two in zip(gradients, other_gradients, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                assert_close(one, two)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_multihead_attention_refuses_what_it_cannot_take() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.rand(2, 4, 8)
    nested = torch.nested.nested_tensor([torch.rand(3, 8), torch.rand(2, 8)])
    with replaced(module, replaceable(module)):
        with pytest.raises(PruneError, match="takes no nested tensors"):
            module(nested, nested, nested)
        with pytest.raises(RuntimeError, match=r"attn_mask has shape \(2, 4\), expected \(4, 4\) or \(4, 4, 4\)"):
            module(x, x, x, attn_mask=torch.zeros(2, 4))
        with pytest.raises(RuntimeError, match=r"key_padding_mask of shape .* expected \(2, 4\)"):
            module(x, x, x, key_padding_mask=torch.zeros(2, 3))
        with pytest.raises(RuntimeError, match="is_causal=True is a hint"):
            module(x, x, x, is_causal=True)


SWIN = list(itertools.product(
    [ShiftedWindowAttention, ShiftedWindowAttentionV2], [True, False],
    [([4, 4], [0, 0], (8, 8)), ([4, 4], [2, 2], (8, 8)), ([4, 4], [2, 2], (7, 9)), ([4, 4], [2, 2], (4, 8)),
     ([2, 4], [1, 2], (5, 6)), ([4, 4], [2, 2], (3, 3)), ([3, 5], [0, 2], (7, 7))],
))  # fmt: skip


@pytest.mark.parametrize(("cls", "bias", "case"), SWIN)
def test_windowed_attention_at_full_width_is_the_original(cls: type, bias: bool, case: Any) -> None:
    window, shift, size = case
    module = randomised(cls(8, window, shift, 2, bias, bias, attention_dropout=0.3, dropout=0.3))
    x = torch.rand(2, *size, 8, dtype=torch.float64, requires_grad=True)
    for training in (False, True):
        module.train(training)
        check_same_as_original(module, x)


def test_grid_attention_at_full_width_is_the_original() -> None:
    module = randomised(MaxAttention(8, 4, 9))
    check_same_as_original(module, torch.rand(2, 3, 9, 8, dtype=torch.float64, requires_grad=True))


def check_same_as_original(module: nn.Module, x: Tensor) -> None:
    results = []
    kinds = replaceable(module)
    assert list(kinds) == [""]
    for chosen in ({}, kinds):
        with replaced(module, chosen):
            torch.manual_seed(5)
            out = module(x)
            gradients = torch.autograd.grad(out.square().sum(), [x, *module.parameters()], allow_unused=True)
            results.append((out, *gradients))
    for one, two in zip(*results, strict=True):
        if one is None:
            assert two is None
        else:
            assert_close(one, two)
