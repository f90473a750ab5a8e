"""The command profile: its tables, and that bad input is one clear line."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune import Budget, compact, plan_removal, save_compact, trace_channels
from lightning_prune.cli import main

HERE = "tests.unit.test_profile"


def net(width: int = 8) -> nn.Module:
    """What --model names: 3 x 3 convolutions over 6 x 6 and 4 x 4 places."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))


def profile(*arguments: str) -> None:
    main(["profile", "--model", f"{HERE}:net", "--shape", "1x3x8x8", "--seconds", "0.01", *arguments])


def test_counts_and_latency_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    profile()
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("(all)"))
    assert row.split()[-2:] == [f"{36 * 8 * 27 + 16 * 4 * 72:,}"] * 2
    assert "a forward pass takes" in text
    assert "measured with batch 1, float32, eager" in text


def test_counts_alone_of_a_larger_batch(capsys: pytest.CaptureFixture[str]) -> None:
    profile("--no-latency", "--batch-size", "3", "--depth", "1")
    text = capsys.readouterr().out
    assert f"{3 * (36 * 8 * 27 + 16 * 4 * 72):,}" in text
    assert "measured" not in text


def test_two_side_by_side_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = net()
    x = torch.rand(1, 3, 8, 8)
    compact(small, plan_removal(trace_channels(small, x), Budget(channels=0.5)), x)
    save_compact(small, tmp_path / "small.safetensors")
    profile("--weights", str(tmp_path / "small.safetensors"), "--against", f"{HERE}:net")
    text = capsys.readouterr().out
    assert "2.00 x" in text.splitlines()[-3]
    assert text.splitlines()[-2].startswith("measured: ")
    assert "95 % interval" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against-weights", "a.ckpt"], "give both"),
        (["--depth", "0"], "--depth 0"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--device", "cuda:77"], "device='cuda:77' is not there"),
        (["--shape", "1x5x8x8"], "cannot be run with these example inputs"),
        (["--shape", "1x3x-1x8"], "expected positive sizes"),  # a dynamic shape is no shape to measure at
        (["--against", "resnet19"], "no network of torchvision"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile(*arguments)
    assert message in capsys.readouterr().err
