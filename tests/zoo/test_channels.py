"""Whole networks: half of the channels leave; equal, trains a step, saved and loaded equal."""

import pytest

from lightning_prune.channels import Budget
from lightning_prune.reports.coverage import NOTHING, ZooModel, check_model
from lightning_prune.reports.zoo import zoo

ENTRIES = {entry.name: entry for entry in zoo()}
SPREAD = [
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/swin_t",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/raft_small",
    "timm/mixnet_s",
    "timm/skresnet18",
    "timm/rexnet_100",
]


def check_entry(entry: ZooModel) -> None:
    row = check_model(entry, Budget(channels=0.5))
    assert row.failure == ""
    if row.note == NOTHING:
        assert (entry.most_macs, row.channels) == (1, 1)
        return
    assert row.dtype == "float64"
    assert row.error < 1e-9
    assert row.channels <= 0.5
    assert row.macs <= entry.most_macs, row.shares


@pytest.mark.filterwarnings("ignore")  # the networks' own
@pytest.mark.parametrize("name", SPREAD)
def test_a_spread_of_networks(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    check_entry(ENTRIES[name])


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in ENTRIES if n not in SPREAD])
def test_every_network(name: str) -> None:
    check_entry(ENTRIES[name])
