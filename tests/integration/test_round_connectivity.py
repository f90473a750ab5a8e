"""Barriers between successive rounds against networks kept by hand; a fit is not changed by measuring."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Budget,
    ChannelPruner,
    ConfigError,
    ErrorRate,
    IterativeMagnitudePruner,
    LRRewind,
    RoundConnectivity,
    WeightRewind,
    linear_mode_connectivity,
)
from tests._helpers.keeping import Keeper
from tests._helpers.resuming import KillAfter

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


class Module(pl.LightningModule):
    """Dropout, so that a disturbed random number would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5, momentum=0.9)


def fit(
    *more: Callback, logger: Any = False, validate: bool = True, start: Path | None = None, rounds: int = 3
) -> tuple[Module, pl.Trainer]:
    module = Module()
    pruner = IterativeMagnitudePruner(fraction=0.4, rounds=rounds, verbose=False)
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[pruner, WeightRewind("1ep"), LRRewind("1ep"), *more], logger=logger, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    torch.manual_seed(1)
    train, val = (DataLoader(TensorDataset(X, Y), 16, shuffle=shuffle) for shuffle in (True, False))
    trainer.fit(module, train, val if validate else None, ckpt_path=start)
    return module, trainer


def test_rows_are_the_lines_between_trained_networks(tmp_path: Path) -> None:
    keeper, measured = Keeper(), RoundConnectivity(points=5)
    fit(keeper, measured, logger=CSVLogger(str(tmp_path), name="run"))
    assert len(keeper.kept) == 4
    assert [row["rounds"] for row in measured.rows] == [[0, 1], [1, 2], [2, 3]]
    assert measured.rows[0]["density"] == pytest.approx([1.0, 77 / 128])  # 40 % of 128 weights are 51
    rate = ErrorRate({"val": [(X, Y)]})
    for row, earlier, later in zip(measured.rows, keeper.kept, keeper.kept[1:], strict=False):
        by_hand = linear_mode_connectivity(Module(), earlier, later, rate, points=5)
        assert row["errors"]["val"] == pytest.approx(by_hand.errors["val"])
        assert row["barriers"]["val"] == pytest.approx(by_hand.barrier)
    assert len({tuple(row["errors"]["val"]) for row in measured.rows}) > 1
    (file,) = tmp_path.rglob("connectivity.json")
    assert json.loads(file.read_text())["lines"] == measured.rows
    assert "prune/barrier" in next(tmp_path.rglob("metrics.csv")).read_text()


@pytest.mark.parametrize("batch_norm", ["interpolate", "recalibrate"])
def test_measuring_changes_nothing(batch_norm: str) -> None:
    plain, _ = fit()
    measured = RoundConnectivity(3, batch_norm, calibration_batches=2)
    other, _ = fit(measured)
    assert len(measured.rows) == 3
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_an_interrupted_run_measures_the_same(tmp_path: Path) -> None:
    whole, resumed = RoundConnectivity(points=3), RoundConnectivity(points=3)
    fit(whole)
    with pytest.raises(RuntimeError, match="killed"):
        fit(RoundConnectivity(points=3), KillAfter(tmp_path / "a.ckpt", 2))
    fit(resumed, start=tmp_path / "a.ckpt")
    assert resumed.rows == whole.rows


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")
def test_ones_own_error_is_measured() -> None:
    measured = RoundConnectivity(points=2, error=lambda module: float(module.net[0].weight.count_nonzero()))
    fit(measured, validate=False, rounds=1)
    (row,) = measured.rows
    later, earlier = row["errors"]["error"]
    assert earlier == 96
    assert later < 96


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")
def test_what_cannot_be_measured_is_refused() -> None:
    for given, message in (
        ({"points": 1}, "points=1"),
        ({"calibration_batches": 0}, "calibration_batches=0"),
        ({"batch_norm": "reset"}, "batch_norm='reset'"),
    ):
        with pytest.raises(ConfigError, match=message):
            RoundConnectivity(**given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is none: give error="):
        fit(RoundConnectivity(), validate=False, rounds=1)
    loader = DataLoader(TensorDataset(X, Y), 16)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 2}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    with pytest.raises(ConfigError, match="RoundConnectivity acts at prune events"):
        pl.Trainer(callbacks=[RoundConnectivity()], **options).fit(Module(), loader, loader)
    silent = type("Silent", (Module,), {"forward": pl.LightningModule.forward})
    rounds: list[Callback] = [IterativeMagnitudePruner(verbose=False), WeightRewind(), RoundConnectivity()]
    with pytest.raises(ConfigError, match=r"Silent has no forward\(\): define it, or give error="):
        pl.Trainer(callbacks=rounds, **options).fit(silent(), loader, loader)
    pruner = ChannelPruner("l2", Budget(channels=0.5), at="50%")
    with pytest.raises(ConfigError, match="removes channels"):
        pl.Trainer(callbacks=[pruner, RoundConnectivity()], **options).fit(Module(), loader, loader)
