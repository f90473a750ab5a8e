"""IterativeMagnitudePruner by every criterion: the cut against NumPy, resumed, and errors where something lacks."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from lightning_prune import (
    CollapseWarning,
    ConfigError,
    IterativeMagnitudePruner,
    LRRewind,
    PruneEvent,
    ResumeError,
    WeightRewind,
)
from lightning_prune.scores import CRITERIA
from tests._helpers.models import ToyModule, loaders, toy_network, trainer

NAMES = ("network.0.weight", "network.4.weight")
Arrays = dict[str, np.ndarray]


class Watch(Callback):
    """Initial weights, the first gradients, and each round's trained weights and masks."""

    prune_order = -2

    def __init__(self) -> None:
        self.initial: Arrays = {}
        self.grads: Arrays = {}
        self.trained: list[Arrays] = []
        self.masks: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.initial = {name: pl_module.get_parameter(name).detach().numpy().copy() for name in NAMES}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 0:
            self.grads = {name: pl_module.get_parameter(name).grad.numpy().copy() for name in NAMES}

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        self.trained.append({name: pl_module.get_parameter(name).detach().numpy().copy() for name in NAMES})
        self.masks.append(dict(event.masks))


class Save(Checkpoint):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def fit(folder: Path, criterion: str, extra: list[Any] | None = None, ckpt_path: Any = None, **options: Any) -> Any:
    torch.manual_seed(0 if ckpt_path is None else 9)
    prune = IterativeMagnitudePruner(0.4, 2, criterion=criterion, verbose=False, **({"scope": "layer"} | options))
    callbacks = [prune, WeightRewind("0st"), LRRewind("0st"), *(extra or [])]
    module = ToyModule(toy_network(0))
    options = {"enable_checkpointing": any(isinstance(c, Save) for c in callbacks)}
    trainer(folder, callbacks, max_epochs=1, **options).fit(module, *loaders(shuffle=True), ckpt_path=ckpt_path)
    return prune, module


def both(first: np.ndarray, second: np.ndarray, among: np.ndarray) -> np.ndarray:
    def ranks(values: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.sort(values[among]), values)

    return np.minimum(ranks(first), ranks(second))


def scores(criterion: str, wi: np.ndarray, wf: np.ndarray, grad: np.ndarray, among: np.ndarray) -> np.ndarray:
    same = np.sign(wi) == np.sign(wf)
    increase = np.abs(wf) - np.abs(wi)
    return {
        "large_final": lambda: np.abs(wf),
        "small_final": lambda: -np.abs(wf),
        "large_init": lambda: np.abs(wi),
        "small_init": lambda: -np.abs(wi),
        "large_init_large_final": lambda: both(np.abs(wi), np.abs(wf), among),
        "small_init_small_final": lambda: both(-np.abs(wi), -np.abs(wf), among),
        "magnitude_increase": lambda: increase,
        "movement": lambda: np.abs(wf - wi),
        "large_final_same_sign": lambda: np.where(same, np.abs(wf), -np.inf),
        "large_final_diff_sign": lambda: np.where(~same, np.abs(wf), -np.inf),
        "magnitude_increase_same_sign": lambda: np.where(same, increase, -np.inf),
        "magnitude_increase_diff_sign": lambda: np.where(~same, increase, -np.inf),
        "snip": lambda: np.abs(grad * wi),
        "grad": lambda: np.abs(grad),
    }[criterion]().astype(np.float64)


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random"}))
def test_each_cut_keeps_the_highest_scores(criterion: str, tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, criterion, [watch])
    assert len(watch.masks) == 2
    among = {name: np.ones(w.shape, dtype=bool) for name, w in watch.initial.items()}
    for trained, masks in zip(watch.trained, watch.masks, strict=True):
        for name, wi in watch.initial.items():
            kept = among[name].sum() - round(0.4 * among[name].sum())
            values = scores(criterion, wi, trained[name], watch.grads[name], among[name])
            order = np.argsort(np.where(among[name], -values, np.inf).ravel(), kind="stable")
            expected = np.zeros(wi.size, dtype=bool)
            expected[order[:kept]] = True
            assert np.array_equal(masks[name].numpy().ravel(), expected & among[name].ravel()), name
            among[name] = masks[name].numpy()


def test_random_follows_the_seed_and_is_global_too(tmp_path: Path) -> None:
    first, _ = fit(tmp_path / "a", "random", scope="global", seed=1)
    again, _ = fit(tmp_path / "b", "random", scope="global", seed=1)
    other, _ = fit(tmp_path / "c", "random", scope="global", seed=2)
    assert first.masks == again.masks
    assert first.masks != other.masks
    assert first.masks.kept == 240 - 96 - round(0.4 * 144)


@pytest.mark.parametrize("criterion", ["movement", "snip", "random"])
def test_resumed_equals_uninterrupted(criterion: str, tmp_path: Path) -> None:
    whole, expected = fit(tmp_path / "whole", criterion, [Save(tmp_path)])
    for epoch in (0, 1):
        resumed, found = fit(tmp_path / f"resumed{epoch}", criterion, ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert resumed.masks == whole.masks
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_a_checkpoint_without_what_the_criterion_needs(tmp_path: Path) -> None:
    fit(tmp_path / "a", "large_final", [Save(tmp_path)])
    with pytest.raises(ResumeError, match="written with criterion='large_final', this run has criterion='movement'"):
        fit(tmp_path / "b", "movement", ckpt_path=tmp_path / "0.ckpt")
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)
    for state in saved["callbacks"].values():  # as an earlier version wrote it
        if isinstance(state, dict) and "hyper_parameters" in state:
            del state["hyper_parameters"]["criterion"]
            del state["origins"]
    torch.save(saved, tmp_path / "old.ckpt")
    fit(tmp_path / "c", "large_final", ckpt_path=tmp_path / "old.ckpt")
    with pytest.raises(ResumeError, match="so the network's initial weights are not in it"):
        fit(tmp_path / "d", "magnitude_increase", ckpt_path=tmp_path / "old.ckpt")
    with pytest.raises(ResumeError, match="the first step's gradients are not in it"):
        fit(tmp_path / "e", "grad", ckpt_path=tmp_path / "old.ckpt")


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="criterion='largefinal' is unknown; did you mean 'large_final'"):
        IterativeMagnitudePruner(criterion="largefinal")
    with pytest.raises(ConfigError, match="criterion='movement' selects masks, masks_from takes"):
        IterativeMagnitudePruner(criterion="movement", masks_from=tmp_path)


def test_a_layer_that_loses_its_last_weights_is_told_once(tmp_path: Path) -> None:
    """A head that begins at zero, as a vision transformer's does, is the first to go under one threshold for all."""
    module = ToyModule(toy_network(0))
    torch.nn.init.zeros_(module.network[4].weight)
    prune = IterativeMagnitudePruner(0.5, 2, verbose=False)
    module.configure = lambda network: torch.optim.SGD(network.parameters(), lr=1e-4)
    with pytest.warns(CollapseWarning, match=r"cut 1 removes the last weights of network\.4\.weight: nothing") as told:
        trainer(tmp_path, [prune], max_epochs=1).fit(module, *loaders())
    assert len([one for one in told if issubclass(one.category, CollapseWarning)]) == 1
    assert prune.masks is not None
    assert prune.masks.kept_per_tensor()["network.4.weight"] == (0, 48)
