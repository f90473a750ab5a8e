"""SupermaskScorer in fits: what it measures, that nobody notices, and that a resumed fit goes on measuring."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lightning_prune import IterativeMagnitudePruner, LRRewind, PruneEvent, SupermaskScorer, WeightRewind
from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.scores import CRITERIA
from tests._helpers.models import ToyModule, loaders, toy_data, toy_network, trainer

WEIGHTS = ("network.0.weight", "network.4.weight")


class Spy(pl.Callback):
    """Keeps the trained weights of each round, before anybody else acts."""

    prune_order = -2

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        self.trained.append({n: t.clone() for n, t in pl_module.state_dict().items()})


class Save(Checkpoint):
    """Writes a checkpoint after every epoch, named by its number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def pruners(rounds: int = 2) -> list[Any]:
    pruner = IterativeMagnitudePruner(fraction=0.4, rounds=rounds, scope="layer", verbose=False)
    return [pruner, WeightRewind("0st"), LRRewind("0st")]


def fit(folder: Path, callbacks: list[Any], seed: int = 0, **options: Any) -> tuple[pl.Trainer, ToyModule]:
    torch.manual_seed(seed)
    module = ToyModule(toy_network(seed, dropout=0.2))
    ckpt_path = options.pop("ckpt_path", None)
    fitted = trainer(folder, callbacks, max_epochs=2, **options)
    fitted.fit(module, *loaders(shuffle=True), ckpt_path=ckpt_path)
    return fitted, module


def top(values: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` largest entries among some, by NumPy."""
    order = np.argsort(np.where(among, values, -np.inf).ravel(), kind="stable")[::-1][:count]
    mask = np.zeros(values.size, dtype=bool)
    mask[order] = True
    return mask.reshape(values.shape)


@pytest.mark.parametrize("criterion", ["large_final", "magnitude_increase", "small_final", "large_init"])
def test_the_accuracy_is_that_of_the_untrained_network_under_the_mask(tmp_path: Path, criterion: str) -> None:
    spy = Spy()
    scorer = SupermaskScorer([criterion], mask1="signed_constant", monitor="val_acc")
    first = toy_network(0, dropout=0.2)
    fit(tmp_path, [*pruners(), scorer, spy])

    x, y = toy_data(32, seed=1).tensors
    own = {"network.0.weight": first[0].weight.detach().numpy(), "network.4.weight": first[4].weight.detach().numpy()}
    among = {name: np.ones(w.shape, dtype=bool) for name, w in own.items()}
    assert len(scorer.rows) == 2
    for number, row in enumerate(scorer.rows):
        network = toy_network(0).eval()
        for name, wi in own.items():
            wf = spy.trained[number][name].numpy()
            values = {
                "large_final": np.abs(wf),
                "magnitude_increase": np.abs(wf) - np.abs(wi),
                "small_final": -np.abs(wf),
                "large_init": np.abs(wi),
            }[criterion]
            count = among[name].sum() - round(0.4 * among[name].sum())
            mask = top(values, among[name], count)
            constant = torch.from_numpy(np.sign(wi) * np.std(wi) * mask)
            with torch.no_grad():
                network[0 if ".0." in name else 4].weight.copy_(constant)
            among[name] = top(np.abs(wf), among[name], count)  # the pruner's own
        accuracy = (network(x).argmax(1) == y).float().mean().item()
        assert row["metrics"]["val_acc"] == pytest.approx(accuracy, abs=1e-6)
        assert row["round"] == number + 1


def test_nobody_notices(tmp_path: Path) -> None:
    plain, one = fit(tmp_path / "a", pruners()[:1])  # no rewinder hides a change
    scorer = SupermaskScorer(list(CRITERIA), mask0="freeze_init_zero_all", mask1="signed_reshuffle", monitor="val_acc")
    scored, other = fit(tmp_path / "b", [*pruners()[:1], scorer])
    assert len(scorer.rows) == 2 * len(CRITERIA)
    for (name, expected), found in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    assert plain.callback_metrics == scored.callback_metrics
    digests = {row["criterion"]: row["digest"] for row in scorer.rows if row["round"] == 1}
    assert len(set(digests.values())) >= 12  # the criteria differ


def test_logged_and_recorded(tmp_path: Path) -> None:
    scorers = [
        SupermaskScorer(["large_final", "random"], monitor="val_acc"),
        SupermaskScorer(["large_final"], mask1="signed_constant", monitor="val_acc"),
    ]
    fitted, _ = fit(tmp_path, [*pruners(), *scorers])
    folder = Path(fitted.log_dir)
    head = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"prune/supermask/large_final", "prune/supermask/random"} <= set(head)
    assert "prune/supermask/large_final/signed_constant/zero" in head
    written = json.loads((folder / "supermasks.json").read_text())
    assert written["rows"] == [*scorers[0].rows, *scorers[1].rows]
    assert [row["round"] for row in scorers[0].rows] == [1, 1, 2, 2]


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [*pruners(), SupermaskScorer(["movement", "random", "snip"], monitor="val_acc", mask1="random_reinit")]

    whole = callbacks()
    _, expected = fit(tmp_path / "whole", [*whole, Save(tmp_path)], enable_checkpointing=True)
    for epoch in (0, 3):  # before the first cut; between the two
        resumed = callbacks()
        path = tmp_path / f"{epoch}.ckpt"
        _, module = fit(tmp_path / f"resumed{epoch}", resumed, seed=9, ckpt_path=path)
        assert resumed[-1].rows == whole[-1].rows
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), module.parameters(), strict=True))


def test_a_checkpoint_without_initial_weights_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "a", [*pruners(1), Save(tmp_path)], enable_checkpointing=True)
    with pytest.raises(ResumeError, match="initial weights are not in it"):
        fit(tmp_path / "b", [*pruners(1), SupermaskScorer(monitor="val_acc")], ckpt_path=tmp_path / "0.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criteria": ["large_finale"]}, "criterion 'large_finale' is unknown; did you mean 'large_final'"),
        ({"criteria": "large_final"}, "expected a list"),
        ({"criteria": []}, "expected a list"),
        ({"mask1": "reshuffle"}, "mask1='reshuffle' is no action"),
        ({"mask0": "one"}, "mask0='one' is no action"),
        ({"gated": "first"}, "gated='first'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SupermaskScorer(**options)


def test_bad_company(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SupermaskScorer"):
        fit(tmp_path / "a", [SupermaskScorer(monitor="val_acc")])
    with pytest.raises(ConfigError, match="monitor='val_acc'"):
        fit(tmp_path / "b", [*pruners(), SupermaskScorer()])
    with pytest.raises(ConfigError, match="'val_accuracy' was not logged in validation; did you mean 'val_acc'"):
        fit(tmp_path / "c", [*pruners(), SupermaskScorer(monitor="val_accuracy")])
    with pytest.raises(ConfigError, match="no validation data"):
        fit(tmp_path / "d", [*pruners(), SupermaskScorer(monitor="val_acc")], limit_val_batches=0)
