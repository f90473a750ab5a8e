"""Networks whose channels leave during a fit, and a callback that looks on."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget, ChannelPruner


def wide_network(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """Two hidden layers of 16, with BatchNorm and noise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = [nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout)]
        return nn.Sequential(*first, nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


class Residual(nn.Module):
    """A stem, a residual block and a head on small images: the stem's channels are the block's too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.bn_b = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.stem(x)))
        h = F.relu(h + self.bn_b(self.b(F.relu(self.bn_a(self.a(h))))))
        return self.head(h.mean((2, 3)))


def images(n: int = 48, batch_size: int = 8, shuffle: bool = False) -> tuple[DataLoader, DataLoader]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    data = TensorDataset(x + y[:, None, None, None], y)
    return DataLoader(data, batch_size, shuffle=shuffle), DataLoader(data, 16)


def pruner(criterion: Any = "l2", budget: Any = None, at: Any = "50%", **options: Any) -> ChannelPruner:
    return ChannelPruner(criterion, budget or Budget(channels=0.5), at, **({"verbose": False} | options))


def widths(module: nn.Module) -> list[int]:
    """Rows of every weight matrix or kernel."""
    return [len(p) for p in module.parameters() if p.dim() > 1]


class Watch(pl.Callback):
    """Notes the widths of every step and the cuts; sees that the optimizer holds every live parameter.

    Args:
        moving: See too that every weight moves in every step (shifts before a BatchNorm have no gradient to speak of).
    """

    def __init__(self, moving: bool = True) -> None:
        self.moving = moving
        self.steps: list[list[int]] = []
        self.events: list[Any] = []
        self.values: list[Tensor] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps.append(widths(pl_module))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        assert all(id(p) in held for p in pl_module.parameters())
        for optimizer in trainer.optimizers:
            for p, state in optimizer.state.items():
                for value in state.values():
                    assert not isinstance(value, Tensor) or value.dim() == 0 or value.shape == p.shape
        values = [p.detach().clone() for p in pl_module.parameters() if p.dim() > 1]
        if self.moving and self.values and [v.shape for v in values] == [v.shape for v in self.values]:
            assert all(not torch.equal(a, b) for a, b in zip(values, self.values, strict=True))
        self.values = values

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
        self.events.append(event)


class Step(nn.Module):
    """A residual block: what it computes is added to its input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(width, inner), nn.BatchNorm1d(inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.bn(self.a(x))))


class Chain(nn.Module):
    """A stem, residual blocks by name and a head; without some of the blocks it is the same class with fewer names."""

    def __init__(self, names: Sequence[str] = ("first", "second", "third"), width: int = 10) -> None:
        super().__init__()
        self.names = tuple(names)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Linear(12, width)
            for name in names:
                setattr(self, name, Step(width, 7))
            self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(x)
