"""Small networks and data that train in milliseconds."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset


def toy_data(n: int = 96, features: int = 12, classes: int = 3, seed: int = 0) -> TensorDataset:
    """A set that a small network learns in a few epochs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator)
    w = torch.randn(features, classes, generator=generator)
    return TensorDataset(x, (x @ w + 0.1 * torch.randn(n, classes, generator=generator)).argmax(1))


def toy_network(seed: int = 0, norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, dropout, linear: buffers and noise included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(12, 16)]
        layers += [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


Configure = Callable[[nn.Module], Any]


def sgd(module: nn.Module) -> Optimizer:
    return SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class ToyModule(pl.LightningModule):
    """A user's own LightningModule: it knows nothing of pruning."""

    def __init__(self, network: nn.Module | None = None, configure: Configure = sgd) -> None:
        super().__init__()
        self.network = network if network is not None else toy_network()
        self.configure = configure

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self.network(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test_acc", (self.network(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        return self.configure(self.network)


def loaders(batch_size: int = 8, shuffle: bool = False, workers: int = 0) -> tuple[DataLoader, DataLoader]:
    """Train (12 batches of 8 by default) and validation data."""
    data = toy_data()
    train = DataLoader(data, batch_size, shuffle=shuffle, num_workers=workers, persistent_workers=False)
    return train, DataLoader(toy_data(32, seed=1), 16)


def trainer(tmp_path: Any, callbacks: list[Any], **options: Any) -> pl.Trainer:
    """A quiet trainer on one CPU that logs to ``tmp_path``."""
    from lightning.pytorch.loggers import CSVLogger

    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": CSVLogger(tmp_path, name="run"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(callbacks=callbacks, **(defaults | options))
