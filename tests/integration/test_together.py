"""Copies trained together end where they end one after the other: weights, masks, tickets, metrics."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_prune import (
    Budget,
    ChannelPruner,
    ConfigError,
    EqualityError,
    IterativeMagnitudePruner,
    LRRewind,
    RunRecord,
    TicketWriter,
    WeightRewind,
    load_ticket,
    save_ticket,
)
from lightning_prune.errors import FileFormatError
from lightning_prune.experiments import (
    Copies,
    Cosine,
    ImageClassifier,
    TogetherClassifier,
    join_tickets,
    split_ticket,
)
from tests._helpers.models import toy_data, trainer

COPIES = 3


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


def convolutional() -> nn.Module:
    layers = [nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))


def networks(build: Callable[[], nn.Module] = dense) -> list[nn.Module]:
    torch.manual_seed(0)
    return [build() for _ in range(COPIES)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-3)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.01)


def loader(shuffle: bool = True) -> DataLoader:
    return DataLoader(toy_data(44), 8, shuffle=shuffle)  # the last batch has 4


def callbacks() -> list[Any]:
    prune = IterativeMagnitudePruner(0.3, 2, scope="layer", verbose=False)
    return [prune, WeightRewind("3st"), LRRewind("3st"), TicketWriter()]


def fit(
    folder: Path, module: ImageClassifier, train: Any = None, extra: list[Any] | None = None, **options: Any
) -> Any:
    run = trainer(
        folder, callbacks() if extra is None else extra, **({"max_epochs": 2, "precision": "64-true"} | options)
    )
    torch.manual_seed(5)  # of the order of the data
    run.fit(module, loader() if train is None else train, DataLoader(toy_data(20, seed=1), 8))
    return run


def settings(optimizer: Any) -> dict[str, Any]:
    return {"num_classes": 3, "optimizer": optimizer, "scheduler": Cosine(), "interval": "step", "label_smoothing": 0.1}


@pytest.mark.parametrize(("build", "optimizer"), [(dense, adam), (convolutional, sgd)])
def test_a_fit_of_copies_equals_fits_of_each(tmp_path: Path, build: Any, optimizer: Any) -> None:
    """Every round: masks exactly, weights and metrics up to the order of sums in float64, tickets."""
    together = TogetherClassifier(network=Copies(networks(build)), **settings(optimizer))
    fit(tmp_path / "together", together)
    whole = RunRecord.read(tmp_path / "together" / "run" / "version_0").rounds
    tickets = [split_ticket(load_ticket(tmp_path / "together/run/version_0" / row.ticket)) for row in whole[1:]]
    for number, network in enumerate(networks(build)):
        start = deepcopy(network.state_dict())
        fit(tmp_path / str(number), ImageClassifier(network, **settings(optimizer)))
        alone = RunRecord.read(tmp_path / str(number) / "run" / "version_0").rounds
        for row, ours in zip(alone, whole, strict=True):
            assert ours.steps == row.steps
            assert ours.metrics[f"val_acc_{number}"] == pytest.approx(row.metrics["val_acc"], abs=1e-6)
            assert ours.metrics[f"val_loss_{number}"] == pytest.approx(row.metrics["val_loss"], rel=1e-6)
        for name, tensor in network.state_dict().items():
            mine = together.network.copies[number].state_dict()[name]
            assert not torch.equal(mine, start[name].double()), f"{name} did not move"
            torch.testing.assert_close(mine, tensor, rtol=1e-9, atol=1e-11)
        for row, of_round in zip(alone[1:], tickets, strict=True):
            own = load_ticket(tmp_path / str(number) / "run/version_0" / row.ticket)
            assert of_round[number].masks == own.masks
            assert own.masks.sparsity > 0.15
            assert of_round[number].info["density"] == own.masks.density == row.density
            for name, tensor in own.weights.items():
                torch.testing.assert_close(of_round[number].weights[name], tensor, rtol=1e-9, atol=1e-11)


def test_each_copy_with_an_order_of_its_own(tmp_path: Path) -> None:
    """Against plain torch, one after the other."""
    run = trainer(tmp_path, [], max_epochs=2)
    module = TogetherClassifier(network=Copies(networks()), num_classes=3, optimizer=adam)
    generators = [torch.Generator().manual_seed(i) for i in range(COPIES)]
    loaders = [DataLoader(toy_data(44), 8, shuffle=True, generator=generator) for generator in generators]
    run.fit(module, CombinedLoader(loaders, mode="min_size"), DataLoader(toy_data(20, seed=1), 8))
    for number, network in enumerate(networks()):
        optimizer = adam(network.parameters())
        order = DataLoader(toy_data(44), 8, shuffle=True, generator=torch.Generator().manual_seed(number))
        for _ in range(2):
            for x, y in order:
                optimizer.zero_grad()
                F.cross_entropy(network(x), y).backward()
                optimizer.step()
        for own, plain in zip(module.network.copies[number].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_the_control_of_several_tickets_together(tmp_path: Path) -> None:
    """Tickets of separate runs, joined: their masks, new weights for each copy."""
    singles = []
    for number, network in enumerate(networks()):
        fit(tmp_path / str(number), ImageClassifier(network, **settings(adam)))
        singles.append([load_ticket(path) for path in sorted((tmp_path / str(number)).rglob("round-*.safetensors"))])
    folder = tmp_path / "joined"
    folder.mkdir()
    for number, of_round in enumerate(zip(*singles, strict=True), 1):
        joined = join_tickets(of_round)
        save_ticket(folder / f"round-{number:02d}.safetensors", joined)
        assert [ticket.masks for ticket in split_ticket(joined)] == [ticket.masks for ticket in of_round]
    control = IterativeMagnitudePruner(0.3, 2, scope="layer", masks_from=folder, verbose=False)
    module = TogetherClassifier(network=Copies(networks()), **settings(adam))
    fit(
        tmp_path / "control", module, extra=[control, WeightRewind("0st", reinit=True), LRRewind("0st"), TicketWriter()]
    )
    last = split_ticket(load_ticket(next((tmp_path / "control").rglob("round-02.safetensors"))))
    for number, ticket in enumerate(last):
        assert ticket.masks == singles[number][1].masks
        for other in (singles[number][1], last[number - 1]):
            assert not torch.equal(ticket.weights["network.0.bias"], other.weights["network.0.bias"].double())


class Draws(nn.Module):
    """Noise that no module of torch's draws."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + torch.rand(12))


class Numbered(nn.Module):
    """Depends on what is no parameter."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.number = nn.Linear(12, 3), Numbered.made
        Numbered.made += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.number


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [dense()], r"expected at least two"),
        (lambda: [dense(), nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))], r"network 1 is another"),
        (lambda: [dense()] * 2, r"share parameters"),
        (
            lambda: [nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3)) for _ in range(2)],
            r"buffers \('1.running_mean', ",
        ),
        (
            lambda: [nn.Sequential(nn.Linear(12, 3), nn.Dropout(0.1)) for _ in range(2)],
            r"1 drops activations at random",
        ),
    ],
)
def test_networks_that_cannot_be_copies(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Copies(make())


def test_forward_passes_that_cannot_be_batched_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Draws cannot be computed for several copies at once: vmap"):
        Copies([Draws(), Draws()])(torch.zeros(4, 12))
    module = TogetherClassifier(network=Copies([Numbered() for _ in range(3)]), num_classes=3)
    with pytest.raises(EqualityError, match=r"copy 1 of Numbered gives other outputs"):
        fit(tmp_path, module)
    with pytest.raises(ConfigError, match=r"2 batches for 3 copies"):
        Copies(networks())([torch.zeros(4, 12)] * 2)
    with pytest.raises(ConfigError, match=r"outputs of shape \(3, 4, 3\); expected \(copies, N, 10\)"):
        TogetherClassifier(network=Copies(networks()))(torch.zeros(4, 12))
    with pytest.raises(ConfigError, match=r"network is a Sequential: expected Copies"):
        TogetherClassifier(network=dense())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, r"gradient_clip_val=1.0 would clip all copies"),
        ({"optimizer": torch.optim.LBFGS}, r"LBFGS may look at several parameters"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, r"reduce-on-plateau"),
        (
            {"extra": [IterativeMagnitudePruner(verbose=False)]},
            r"scope='global'\) would select over the weights of all",
        ),
        ({"extra": [ChannelPruner("l2", Budget(channels=0.5), at="1ep")]}, r"ChannelPruner prunes networks one"),
    ],
)
def test_what_would_couple_the_copies_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    own = {name: options.pop(name) for name in ("optimizer", "scheduler") if name in options}
    module = TogetherClassifier(network=Copies(networks()), num_classes=3, **own)
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, module, extra=options.pop("extra", []), **options)


def test_tickets_of_other_fits_are_not_split(tmp_path: Path) -> None:
    fit(tmp_path, ImageClassifier(dense(), **settings(adam)))
    ticket = load_ticket(next(tmp_path.rglob("round-02.safetensors")))
    with pytest.raises(FileFormatError, match=r"'network.0.weight' belongs to no copy"):
        split_ticket(ticket)
    with pytest.raises(ConfigError, match=r"no tickets"):
        join_tickets([])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_fit_of_copies_resumes_bit_for_bit(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, every_n_train_steps=7)
    full = TogetherClassifier(network=Copies(networks()), **settings(sgd))
    fit(tmp_path / "full", full, extra=[*callbacks(), saver], enable_checkpointing=True)
    path = sorted((tmp_path / "ckpt").glob("*round01.ckpt"))[0]
    resumed = TogetherClassifier(network=Copies(networks()), **settings(sgd))
    extra = [*callbacks(), ModelCheckpoint(tmp_path / "again", save_top_k=-1, every_n_train_steps=7)]
    run = trainer(tmp_path / "resumed", extra, max_epochs=2, precision="64-true", enable_checkpointing=True)
    run.fit(resumed, loader(), DataLoader(toy_data(20, seed=1), 8), ckpt_path=path)
    before = torch.load(path, weights_only=True)["state_dict"]
    for name, tensor in full.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
        assert not torch.equal(before[name], tensor), name
