"""Whole networks: half of the channels leave; equal, trains a step, saved and loaded equal."""

import pytest
import torch

from lightning_prune.channels import Budget
from lightning_prune.coverage import check_model, input_size, torchvision_builder, torchvision_models

SPREAD = {"resnet18": 0.3, "mobilenet_v3_small": 0.33, "squeezenet1_1": 0.4, "shufflenet_v2_x1_0": 0.4, "swin_t": 0.6}
TOO_LARGE = {"vit_h_14", "regnet_y_128gf"}  # float64 with momentum takes more memory than 24 GiB


def _check(name: str, most: float) -> None:
    size = input_size(name)
    row = check_model(name, torchvision_builder(name), torch.rand(2, 3, size, size), Budget(channels=0.5))
    assert row.failure == ""
    assert row.error < 1e-9
    assert row.channels <= 0.5
    assert row.macs <= most


@pytest.mark.parametrize("name", SPREAD)
def test_a_spread_of_networks(name: str) -> None:
    _check(name, SPREAD[name])


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [n for n in torchvision_models() if n not in TOO_LARGE])
def test_every_classification_network(name: str) -> None:
    _check(name, 0.6 if name.startswith(("vit", "swin", "maxvit", "convnext")) else 0.4)
