"""Ranks of a CIFAR ResNet-56's feature maps: one pass with certificates beside the reference's way, in one run."""

import os
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import feature_ranks
from lightning_prune.experiments import CIFAR10, ResNet56

IMAGES = int(os.environ.get("RANK_IMAGES", "64"))  # the reference takes 640
BATCH = 64

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]


def network(images: Tensor) -> nn.Module:
    """He-initialised, with BatchNorm statistics of the images: maps are neither dead nor exploding."""
    torch.manual_seed(0)
    model = ResNet56()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def layer_by_layer(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, which: int) -> Tensor:
    """The reference's way for one layer: a forward pass, then one ``matrix_rank`` for each map."""
    relu, calls, found = F.relu, [], []

    def tapped(x: Tensor, *args: Any) -> Tensor:
        out = relu(x, *args)
        calls.append(None)
        if len(calls) - 1 == which:
            found.append(out)
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "relu", tapped)
        model(images)
    maps = found[0]
    ranks = [float(torch.linalg.matrix_rank(maps[i, j])) for i in range(maps.shape[0]) for j in range(maps.shape[1])]
    return torch.tensor(ranks).view(maps.shape[:2]).mean(0)


def test_one_pass_beside_a_pass_for_each_layer(data_root: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CIFAR10(data_root, batch_size=max(256, IMAGES), augment=False)
    data.prepare_data()
    data.setup("fit")
    images = next(iter(data.train_dataloader()))[0]
    model = network(images[:256])
    images = images[:IMAGES]
    ours, theirs = 0.0, 0.0
    start = time.process_time()
    feature_ranks(model, images.split(BATCH), IMAGES)  # first call: warm-up
    warm = time.process_time() - start
    expected: list[Tensor] = []
    for which in range(55):
        start = time.process_time()
        expected.append(layer_by_layer(model, images, monkeypatch, which))
        theirs += time.process_time() - start
        if which % 11 == 0:  # by turns: five times ours among fifty-five layers
            start = time.process_time()
            ranks = feature_ranks(model, images.split(BATCH), IMAGES)
            ours += (time.process_time() - start) / 5
    assert len(ranks) == 55
    for found, means in zip(ranks.values(), expected, strict=True):
        assert torch.allclose(found.float(), means, atol=1e-4)
    print(
        f"\n{IMAGES} images, one thread, CPU time: {theirs:.2f} s a layer and a map at a time, {ours:.3f} s in one "
        f"pass (first call {warm:.3f} s): {theirs / ours:.1f} times faster, the same ranks"
    )
    assert theirs / ours > 20
