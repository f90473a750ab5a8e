"""timm's attention whose code takes the inner width from its input: replaced, and narrowed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.channels import Budget, compact, plan_removal, trace_channels
from lightning_prune.channels.attention import replaceable, replaced
from tests.channels.networks import Net, assert_close, check_half_equals_narrow, randomised

timm = pytest.importorskip("timm")

from timm.models.beit import Attention as Beit  # noqa: E402
from timm.models.eva import EvaAttention as Eva  # noqa: E402
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2  # noqa: E402

X = torch.rand(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WINDOWS = torch.rand(4, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
MASK = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
ROPE = torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

FULL: dict[str, tuple[Any, dict[str, Any]]] = {
    "beit": (lambda: Beit(8, 2, qkv_bias=True, window_size=(2, 2), attn_drop=0.3, proj_drop=0.3), {}),
    "beit, no bias": (lambda: Beit(8, 2), {}),
    "beit, separate bias, shared positions": (
        lambda: Beit(8, 2, qkv_bias=True, qkv_bias_separate=True), {"shared_rel_pos_bias": MASK[None, None]}),
    "beit, both positions": (lambda: Beit(8, 2, window_size=(2, 2)), {"shared_rel_pos_bias": MASK[None, None]}),
    "eva": (lambda: Eva(8, 2, norm_layer=nn.LayerNorm), {"rope": ROPE}),
    "eva, half": (lambda: Eva(8, 2, norm_layer=nn.LayerNorm, qk_norm=True, rotate_half=True, attn_drop=0.3),
                  {"rope": ROPE, "attn_mask": MASK}),
    "eva, apart": (lambda: Eva(8, 2, qkv_fused=False, scale_norm=False, gated=True), {"attn_mask": MASK > 0.3}),
    "eva, causal": (lambda: Eva(8, 2, qkv_bias_separate=True, scale_norm=False), {"is_causal": True}),
    "swin v2": (lambda: SwinV2(8, (2, 2), 2, attn_drop=0.3, proj_drop=0.3), {}),
    "swin v2, mask": (lambda: SwinV2(8, (2, 2), 2, qkv_bias_separate=True), {"mask": MASK[:4, :4].expand(2, 4, 4)}),
    "swin v2, no bias": (lambda: SwinV2(8, (2, 2), 2, qkv_bias=False), {}),
}  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FULL)
def test_at_full_width_it_is_the_original(name: str, training: bool, fused: bool) -> None:
    build, options = FULL[name]
    module = randomised(build()).train(training)
    module.fused_attn = fused
    x = WINDOWS if isinstance(module, SwinV2) else X
    results = []
    for kinds in ({}, replaceable(module)):
        with replaced(module, kinds):
            torch.manual_seed(5)
            out = module(x, **options)
            gradients = torch.autograd.grad(out.square().sum(), list(module.parameters()))
            results.append((out, *gradients))
    assert list(replaceable(module)) == [""]
    for one, two in zip(*results, strict=True):
        assert_close(one, two)


def _net(w: int, attention: nn.Module, **options: Any) -> nn.Module:
    if isinstance(attention, SwinV2):
        attention.cpb_mlp = nn.Sequential(nn.Linear(2, 4 * w), nn.ReLU(), nn.Linear(4 * w, w // 2, bias=False))
    return Net(lambda n, x: n.head(n.attention(n.stem(x), **options)), stem=nn.Linear(6, w), attention=attention,
               head=nn.Linear(w, 5))  # fmt: skip


ROPE_OF_HEAD = ROPE[:, :4]
NARROW: dict[str, tuple[Any, tuple[int, ...]]] = {
    "beit": (lambda w: _net(w, Beit(w, w // 2, qkv_bias=True, window_size=(2, 2))), (2, 5, 6)),
    "eva": (lambda w: _net(w, Eva(w, w // 2, scale_norm=False), rope=ROPE_OF_HEAD), (2, 5, 6)),
    "eva, apart": (lambda w: _net(w, Eva(w, w // 2, qkv_fused=False, gated=True, scale_norm=False)), (2, 5, 6)),
    "swin v2": (lambda w: _net(w, SwinV2(w, (2, 2), w // 2)), (4, 4, 6)),
}


@pytest.mark.parametrize("name", NARROW)
def test_narrowed_it_is_the_original_code_built_narrow(name: str) -> None:
    """Weights sliced by NumPy into the original class at half the width."""
    build, shape = NARROW[name]
    model, narrow = randomised(build(8)), build(4).double().eval()
    check_half_equals_narrow(model, narrow, shape)
    assert model.attention.num_heads == narrow.attention.num_heads == 2


@pytest.mark.parametrize("name", ["beit", "swin v2"])
def test_places_leave_from_every_head(name: str) -> None:
    build, shape = NARROW[name]
    model, x = build(8).double(), torch.rand(shape, dtype=torch.float64)
    plan = plan_removal(trace_channels(model, x, replace_attention="width"), Budget(channels=0.5))
    assert compact(model, plan, x).error < 1e-12
    assert model.attention.num_heads == 4
    assert model.attention.qkv.out_features == 3 * 4


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_whole_networks_lose_half_of_their_heads(name: str) -> None:
    options: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 4}
    if name.startswith("swin"):
        options = {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4)}
    model = timm.create_model(name, num_classes=5, img_size=112 if name.startswith("swin") else 64, **options).eval()
    x: Tensor = torch.rand(1, 3, *([112, 112] if name.startswith("swin") else [64, 64]))
    graph = trace_channels(model, x)
    plan = plan_removal(graph, Budget(channels=0.5))
    assert compact(model, plan, x).error < 1e-9
    heads = [m.num_heads for m in model.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")]
    assert heads == ([1, 1, 2, 2] if name.startswith("swin") else [2, 2])
