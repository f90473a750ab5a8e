"""A training's multiply-adds, counted by hand beside it, and fits that end when a given number is spent."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Budget,
    ChannelPruner,
    ConfigError,
    HRankPruner,
    IterativeMagnitudePruner,
    LRRewind,
    TrainingCost,
)
from tests._helpers.channels import Residual
from tests._helpers.models import ToyModule, trainer

SIDE = 6


def by_hand(network: Residual) -> int:
    """Forward multiply-adds of one image, by the formula of each layer."""
    total, places = 0, SIDE * SIDE
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            side = places // (layer.stride[0] * layer.stride[1])
            total += layer.weight.numel() * side
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel()
    return total


def data(examples: int = 44, batch: int = 8) -> list[DataLoader[Any]]:
    torch.manual_seed(3)
    whole = TensorDataset(torch.randn(examples, 1, SIDE, SIDE), torch.randint(3, (examples,)))
    return [DataLoader(whole, batch), DataLoader(whole, 50)]


def module(length: int | None = None, scheduler: Any = None) -> ToyModule:
    torch.manual_seed(4)

    def configure(network: nn.Module) -> Any:
        optimizer = SGD(network.parameters(), 0.1)
        if scheduler is not None:
            return [optimizer], [scheduler(optimizer)]
        if length is None:
            return optimizer
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, length), "interval": "step"}]

    return ToyModule(Residual(8), configure)


class Watch(Callback):
    """What a plain counter sees: after each batch the network's multiply-adds, the batch's length and the rate."""

    def __init__(self) -> None:
        self.macs = 0
        self.rates: list[float] = []
        self.validations = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.macs += 3 * len(batch[0]) * by_hand(pl_module.network)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations += not trainer.sanity_checking


def test_every_batch_counts_by_the_network_as_it_is(tmp_path: Path) -> None:
    cost, watch = TrainingCost(), Watch()
    prune = ChannelPruner("l1", Budget(macs=0.5), at="9st", verbose=False)
    run = trainer(tmp_path, [prune, cost, watch], max_epochs=3)
    run.fit(module(), *data())
    assert cost.macs == watch.macs
    assert cost.steps == 18
    assert [step for step, _ in cost.rows] == [0, 9]
    assert cost.rows[0][1] == by_hand(module().network)
    written = json.loads((tmp_path / "run" / "version_0" / "training_cost.json").read_text())
    assert (written["macs"], written["limit"], written["steps"]) == (watch.macs, None, 18)


def test_images_that_are_ranked_count_once_forward(tmp_path: Path) -> None:
    cost, watch = TrainingCost(), Watch()
    prune = HRankPruner(Budget(macs=0.5), at="9st", images=20, verbose=False)
    trainer(tmp_path, [prune, cost, watch], max_epochs=3).fit(module(), *data())
    assert cost.macs == watch.macs + 20 * by_hand(module().network)


@pytest.mark.parametrize("at", ["0st", "7st"])
@pytest.mark.parametrize("steps", [11, 14.4])
def test_a_limit_is_spent_by_the_smaller_network(tmp_path: Path, at: str, steps: float) -> None:
    limit = steps * 3 * 8 * by_hand(module().network)
    cost, watch = TrainingCost(limit), Watch()
    prune = ChannelPruner("l1", Budget(macs=0.4), at=at, verbose=False)
    run = trainer(tmp_path, [watch, cost, prune], max_epochs=50)
    model = module(length=500)
    run.fit(model, *data(48))
    assert cost.macs == watch.macs
    assert abs(cost.macs - limit) <= 0.5 * 3 * 8 * by_hand(model.network)
    assert cost.steps > steps
    assert run.current_epoch < 50
    assert watch.validations == math.ceil(cost.steps / 6)  # also where the fit has ended inside an epoch
    # the cosine ends with the fit, and nothing jumps where its length has changed
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert scheduler.T_max == cost.steps
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    steps_down = -torch.tensor(watch.rates).diff()
    assert (steps_down >= 0).all()
    assert steps_down.max() < 0.1 * math.pi / 2 / min(steps, cost.steps) * 1.6
    if at == "0st":
        expected = [0.05 * (1 + math.cos(math.pi * i / cost.steps)) for i in range(cost.steps)]
        assert watch.rates == pytest.approx(expected)


def test_accumulated_batches_end_with_a_whole_step(tmp_path: Path) -> None:
    limit = 7 * 3 * 8 * by_hand(module().network)
    cost = TrainingCost(limit)
    run = trainer(tmp_path, [cost], max_epochs=20, accumulate_grad_batches=2)
    run.fit(module(length=500), *data(48))
    assert cost.steps == 4  # 8 batches: 3 steps would be 6
    assert cost.macs == 8 / 7 * limit


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    limit = 14 * 3 * 8 * by_hand(module().network)

    def callbacks() -> list[Any]:
        save = ModelCheckpoint(tmp_path / "files", filename="{step}", every_n_train_steps=9, save_top_k=-1)
        prune = ChannelPruner("l1", Budget(macs=0.4), at="7st", verbose=False)
        return [TrainingCost(limit), prune, save]

    whole, again = callbacks(), callbacks()
    first = module(length=500)
    trainer(tmp_path / "a", whole, max_epochs=50, enable_checkpointing=True).fit(first, *data(48))
    kept = (tmp_path / "files" / "step=9-round01.ckpt").rename(tmp_path / "kept.ckpt")
    shutil.rmtree(tmp_path / "files")
    second = module(length=500)
    run = trainer(tmp_path / "b", again, max_epochs=50, enable_checkpointing=True)
    run.fit(second, *data(48), ckpt_path=kept, weights_only=True)
    assert again[0].to_json() | {"seconds": 0} == whole[0].to_json() | {"seconds": 0}
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan])
def test_a_limit_out_of_range_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match="expected a number of multiply-adds, more than 0"):
        TrainingCost(limit)


def test_rounds_with_lengths_of_their_own_are_refused(tmp_path: Path) -> None:
    callbacks = [IterativeMagnitudePruner(rounds=2, fraction=0.5, verbose=False), LRRewind("0st"), TrainingCost(1e9)]
    with pytest.raises(ConfigError, match="beside IterativeMagnitudePruner, which runs rounds of a length"):
        trainer(tmp_path, callbacks, max_epochs=2).fit(module(), *data())


def test_a_schedule_that_cannot_be_stretched_is_refused(tmp_path: Path) -> None:
    model = module(scheduler=lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=20))
    with pytest.raises(ConfigError, match=r"cannot give OneCycleLR .* that length"):
        trainer(tmp_path, [TrainingCost(1e9)], max_epochs=2).fit(model, *data())


def test_a_limit_that_the_trainer_does_not_reach_is_told(tmp_path: Path) -> None:
    limit = 100 * 3 * 8 * by_hand(module().network)
    with pytest.warns(UserWarning, match=r"before its limit of .* raise the Trainer's max_epochs"):
        trainer(tmp_path, [TrainingCost(limit)], max_epochs=2).fit(module(), *data())
