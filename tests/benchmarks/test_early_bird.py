"""What one check of EarlyBird costs: a selection, and four comparisons. One run, side by side."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_prune import prunable_parameters, select
from lightning_prune.experiments import LeNet300100
from lightning_prune.scores import MagnitudeScores
from lightning_prune.settling import MaskWindow

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.bench


@pytest.mark.parametrize("build", [LeNet300100, torchvision.models.resnet50], ids=["LeNet-300-100", "ResNet-50"])
def test_one_check(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    parameters = prunable_parameters(build())
    within = select(MagnitudeScores(parameters), density=0.8)
    window = MaskWindow(5)
    selected, compared = [], []
    for number in range(12):
        with torch.no_grad():  # a few steps of training move weights by a little
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        start = time.perf_counter()
        masks = select(MagnitudeScores(parameters), fraction=0.2, within=within)
        middle = time.perf_counter()
        distance = window.push(masks)
        if number > 4:
            selected.append(middle - start)
            compared.append(time.perf_counter() - middle)
            assert distance is not None
            assert 0 < distance < 0.2
    print(
        f"\n{sum(p.numel() for p in parameters.values()):,} weights, {torch.get_num_threads()} thread(s): "
        f"select {1e3 * min(selected):.1f} ms, compare with four {1e3 * min(compared):.1f} ms"
    )
