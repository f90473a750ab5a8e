"""Slimming, gates and HRank where a fit can go wrong: resumed anywhere, with every precision, between accumulations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_prune import Budget, HRankPruner, LRRewind, SlimmingPruner, SlimmingRegularizer
from tests._helpers.channels import Residual, Watch, images, widths
from tests._helpers.models import ToyModule, trainer
from tests._helpers.resuming import Case, Net, check_moved, check_resumed, fit
from tests.integration.test_resume_fits import per_epoch, per_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:the scales have not separated"),
    pytest.mark.filterwarnings("ignore:feature ranks carry no order"),
]
HALF = Budget(channels=0.5)


class Products(nn.Module):
    """(N, 5) -> (N, 1, 5, 5): an image for a network on vectors' data."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, None] * x.flip(1)[:, None, :] + x[:, :, None].cos())[:, None]


class ConvNet(Net):
    """Two convolutions, BatchNorm, dropout."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)]
        second = [nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(5), nn.Flatten()]
        self.network = nn.Sequential(Products(), *first, *second, nn.Linear(6, 1))


class Gated(Net):
    """Hidden units that no BatchNorm scales."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 6), nn.ReLU(),
                                     nn.Linear(6, 1))  # fmt: skip


def one_shot() -> list[Any]:
    return [HRankPruner(HALF, "8st", images=20, module="network", verbose=False)]


def layer_by_layer() -> list[Any]:
    prune = HRankPruner(rates="[0.5]*2", at=["1ep", "2ep"], layerwise=True, images=20, module="network", verbose=False)
    return [prune, LRRewind("2st")]


def gated() -> list[Any]:
    penalise = SlimmingRegularizer(0.5, "proximal", gates=True, module="network")
    return [SlimmingPruner(HALF, ["7st", "100%"], module="network", verbose=False), penalise, LRRewind("2st")]


@pytest.mark.parametrize(
    ("owners", "case"),
    [
        (one_shot, Case("one shot", per_step, module=ConvNet)),
        (layer_by_layer, Case("layer by layer", per_epoch, module=ConvNet)),
        (gated, Case("gates", per_step, module=Gated)),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_every_checkpoint_resumes(tmp_path: Path, owners: Callable[[], list[Any]], case: Case) -> None:
    cutters = owners()
    full = fit(case, tmp_path, owners=cutters)
    record = cutters[0]._recorder.record.comparable()
    moved, sizes = [], set()
    for saved in full.saved[:-1:5]:
        again = owners()
        resumed = fit(case, tmp_path / "resumed", seeded=99, checkpoint=saved.path, hooks=(), owners=again)
        check_resumed(full, resumed, saved)
        assert again[0]._recorder.record.comparable() == record
        moved.append(check_moved(full, saved))
        sizes.add(saved.weights.numel())
    assert any(moved)
    assert len(sizes) == cutters[0].rounds + 1  # resumed before, between and after the cuts
    assert min(sizes) == full.weights.numel()


def slimming() -> list[Any]:
    return [SlimmingPruner(HALF, "3st", verbose=False), SlimmingRegularizer(1e-3, coupled="group")]


def hrank() -> list[Any]:
    return [HRankPruner(HALF, "3st", images=24, verbose=False)]


@pytest.mark.parametrize("build", [slimming, hrank])
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ],
    ids=str,
)
def test_precision_and_accumulation_across_the_change_of_shape(
    tmp_path: Path, build: Callable[[], list[Any]], options: dict[str, Any]
) -> None:
    network, watch = Residual(), Watch(moving=False)
    module = ToyModule(network, lambda m: SGD(m.parameters(), 0.05, momentum=0.9))
    run = trainer(tmp_path, [*build(), watch], max_epochs=2, **options)
    run.fit(module, *images())
    every = options.get("accumulate_grad_batches", 1)
    assert [event.step for event in watch.events] == [3]
    assert run.global_step == 12 // every
    before, after = watch.steps[: 3 * every], watch.steps[3 * every :]
    assert {tuple(found) for found in before} == {(8, 8, 8, 3)}
    assert len({tuple(found) for found in after}) == 1
    stage, inner = after[0][0], after[0][1]
    assert stage + inner == 8  # half of 8 + 8, the stage counted once
    assert widths(network) == [stage, inner, stage, 3]
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(options.get("precision", ""), torch.float32)
    for parameter in network.parameters():
        assert parameter.dtype == dtype
        assert torch.isfinite(parameter).all()
        momentum = run.optimizers[0].state[parameter]["momentum_buffer"]
        assert momentum.shape == parameter.shape
        assert momentum.dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_the_penalty_under_a_loss_scaler(tmp_path: Path, fused: bool) -> None:
    """The gradient that the penalty adds is the same whatever the loss was multiplied with."""

    def scale(precision: str) -> Tensor:
        module = ToyModule(Residual(), lambda m: SGD(m.parameters(), 0.05, fused=fused))
        penalise = SlimmingRegularizer(0.1)
        options: dict[str, Any] = {"precision": precision, "accelerator": "gpu", "devices": 1, "max_epochs": 3}
        trainer(tmp_path / precision, [penalise], **options).fit(module, *images())
        return module.network.bn.weight.detach().cpu()

    assert torch.allclose(scale("16-mixed"), scale("32-true"), atol=5e-3)
