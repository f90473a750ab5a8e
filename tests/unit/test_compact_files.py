"""Compact models on disk: they come back equal, and what does not fit is refused before anything changes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune import (
    Budget,
    ConfigError,
    FileFormatError,
    MaskMismatchError,
    compact,
    load_compact,
    plan_removal,
    save_compact,
    trace_channels,
)


def network(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model, inputs = network(), torch.randn(2, 3, 8, 8)
    model(inputs)  # so that running statistics are not those of construction
    compact(model, plan_removal(trace_channels(model, inputs), Budget(channels=0.5)), inputs)
    save_compact(model, tmp_path / "small.safetensors")
    return model.eval(), tmp_path / "small.safetensors"


def test_a_compact_model_comes_back_equal_and_trains(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    fresh = load_compact(network(), path).eval()
    inputs = torch.randn(4, 3, 8, 8)
    assert fresh[0].weight.shape[0] == fresh[0].out_channels == 4
    assert torch.equal(fresh(inputs), model(inputs))
    assert fresh.state_dict().keys() == network().state_dict().keys()
    fresh.train()(inputs).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in fresh.parameters())


def test_another_architecture_is_refused_and_left_alone(saved: tuple[nn.Module, Path]) -> None:
    other = network(width=10)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(MaskMismatchError):
        load_compact(other, saved[1])
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_a_damaged_file_is_refused(saved: tuple[nn.Module, Path]) -> None:
    path = saved[1]
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(FileFormatError, match=r"small\.safetensors"):
        load_compact(network(), path)
    with pytest.raises(FileFormatError, match="does not exist"):
        load_compact(network(), path.with_name("nowhere"))


def test_nothing_removed_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        save_compact(network(), tmp_path / "whole.safetensors")
    assert not list(tmp_path.iterdir())
