"""Blocks that leave whole, and residual streams that shrink on request, on networks of many families."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from lightning_prune import load_compact, save_compact
from lightning_prune.channels import Budget, compact, find_blocks, plan_removal, trace_channels

# Residual blocks whose shortcut is the identity, by the networks' definitions; transformer layers have two.
BLOCKS = {
    "resnet18": 5, "resnet50": 12, "resnext50_32x4d": 12, "wide_resnet50_2": 12, "regnet_y_400mf": 12,
    "mobilenet_v2": 10, "mobilenet_v3_small": 6, "mnasnet1_0": 10, "efficientnet_b0": 9, "efficientnet_v2_s": 35,
    "convnext_tiny": 18, "vit_b_32": 24, "swin_t": 24, "swin_v2_t": 24, "maxvit_t": 51,
    "densenet121": 0, "googlenet": 0, "shufflenet_v2_x1_0": 0, "vgg11_bn": 0, "squeezenet1_1": 0,
}  # fmt: skip
SIZES = {"vit_b_32": 224, "maxvit_t": 224}
SPREAD = ["resnet18", "mobilenet_v3_small", "swin_t", "shufflenet_v2_x1_0"]
STREAMS = ["convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t"]
TIMM = ["resnetv2_50", "nfnet_f0", "mixer_s32_224", "beit_base_patch16_224", "hrnet_w18_small", "edgenext_xx_small",
        "cait_xxs24_224", "res2net50_26w_4s", "vit_tiny_patch16_224", "convnext_atto"]  # fmt: skip


def _build(name: str, timm: bool = False) -> nn.Module:
    if timm:
        return pytest.importorskip("timm").create_model(name, num_classes=10)
    options: dict[str, Any] = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def _inputs(name: str) -> torch.Tensor:
    size = SIZES.get(name, 224 if "224" in name else 64)
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _blocks_leave(name: str, path: Path, timm: bool = False) -> int:
    """Half of the blocks leave; the rest runs, trains a step, is saved and loaded."""
    model, inputs = _build(name, timm).eval(), _inputs(name)
    graph = trace_channels(model, inputs)
    found = find_blocks(graph).removable
    if not found:
        return 0
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    plan = plan_removal(graph, Budget(channels=0.5), granularity="block")
    report = compact(model, plan, inputs, optimizer)
    assert report.error < 1e-9
    assert report.costs["blocks"] == (len(found), len(found) // 2)
    assert report.costs["params"][1] == sum(p.numel() for p in model.parameters())
    assert report.kept("params") < 1
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    out = model.train()(inputs)
    out.square().mean().backward()
    optimizer.step()
    save_compact(model.eval(), path / "small.safetensors")
    loaded = load_compact(_build(name, timm), path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model(inputs))
    return len(found)


@pytest.mark.parametrize("name", SPREAD)
def test_blocks_of_a_few_networks(name: str, tmp_path: Path) -> None:
    assert _blocks_leave(name, tmp_path) == BLOCKS[name]


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(set(BLOCKS) - set(SPREAD)))
def test_blocks_of_many_networks(name: str, tmp_path: Path) -> None:
    assert _blocks_leave(name, tmp_path) == BLOCKS[name]


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TIMM)
def test_blocks_of_timm(name: str, tmp_path: Path) -> None:
    assert _blocks_leave(name, tmp_path, timm=True) > 0


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", STREAMS)
def test_streams_shrink_where_approximation_is_asked_for(name: str) -> None:
    """Half of all channels, heads and the stream itself: about a quarter of the multiply-adds stays."""
    model, inputs = _build(name).eval(), _inputs(name)
    report = compact(model, plan_removal(trace_channels(model, inputs, approximate=True), Budget(channels=0.5)), inputs)
    assert report.error < 1e-9
    assert report.kept("macs") < 0.28
    assert report.moved is not None
    assert len(report.moved.normalisations) > 10
    assert model(inputs).shape == (2, 10)
