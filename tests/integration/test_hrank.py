"""HRank inside a fit: what leaves is what has the lowest ranks, by rates or budget, at once or layer by layer."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_prune import Budget, BudgetError, ConfigError, HRankPruner, LRRewind, trace_channels
from lightning_prune.channels.budget import CostModel
from tests._helpers.channels import Residual, Watch, images
from tests._helpers.models import ToyModule, trainer

HALF = Budget(channels=0.5)


def still(network: nn.Module) -> ToyModule:
    return ToyModule(network, lambda m: SGD(m.parameters(), 0.0))


def cut(tmp_path: Path, network: nn.Module, data: Any = None, **options: Any) -> HRankPruner:
    prune = HRankPruner(**({"at": "1ep", "images": 40, "verbose": False} | options))
    trainer(tmp_path, [prune], max_epochs=2).fit(still(network), *(data or images()))
    return prune


def ranks_by_hand(network: Residual, chosen: Tensor) -> dict[str, np.ndarray]:
    """Mean ranks in NumPy, the forward pass written out."""
    with torch.no_grad():
        network.eval()
        stem = F.relu(network.bn(network.stem(chosen)))
        inner = F.relu(network.bn_a(network.a(stem)))
        out = F.relu(stem + network.bn_b(network.b(inner)))
        network.train()
    found = {"stem": stem, "a": inner, "b": out}
    return {name: np.linalg.matrix_rank(maps.numpy()).mean(0) for name, maps in found.items()}


def lowest(scores: np.ndarray, count: int) -> list[int]:
    """Kept positions; of equals the later leaves first."""
    return sorted(np.argsort(-scores, kind="stable")[: len(scores) - count].tolist())


def loaded() -> Residual:
    torch.manual_seed(4)
    network = Residual(10)
    with torch.no_grad():
        for bn in (network.bn, network.bn_a, network.bn_b):  # some channels are mostly dead
            bn.bias.copy_(torch.linspace(-1.5, 1, 10)[torch.randperm(10)])
    return network


@pytest.mark.parametrize(("counting", "rate", "gone"), [("hrank", 0.45, 4), ("hrankplus", 0.45, 5), ("hrank", 0.5, 5)])
def test_the_lowest_mean_ranks_leave(tmp_path: Path, counting: Any, rate: float, gone: int) -> None:
    network = loaded()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    for bn in (network.bn, network.bn_a, network.bn_b):
        bn.momentum = 0.0  # the epoch before the cut leaves statistics alone
    order = torch.randperm(48, generator=torch.Generator().manual_seed(7))[:40]
    chosen = images()[0].dataset.tensors[0][order]
    by_hand = ranks_by_hand(network, chosen)
    prune = cut(tmp_path, network, rates={"a": rate, "stem": rate, "b": rate}, counting=counting, seed=7)
    inner = lowest(by_hand["a"], gone)
    stage = lowest(by_hand["stem"] + by_hand["b"], gone)
    assert torch.equal(network.a.weight, before["a.weight"][inner][:, stage])
    assert torch.equal(network.stem.weight, before["stem.weight"][stage])
    assert torch.equal(network.head.weight, before["head.weight"][:, stage])
    assert prune.folder is not None
    (written,) = json.loads((prune.folder / "ranks.json").read_text())["cuts"]
    assert (written["round"], written["images"]) == (1, 40)
    for name, kept in (("stem", stage), ("a", inner), ("b", stage)):
        layer = written["layers"][name]
        np.testing.assert_allclose(layer["ranks"], by_hand[name], rtol=1e-12)
        assert (layer["kept"], layer["limit"]) == (kept, 6)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("budget", [HALF, Budget(macs=0.4)])
def test_a_budget_is_met_from_below(tmp_path: Path, scope: Any, budget: Budget) -> None:
    network = loaded()
    prune = cut(tmp_path, network, budget=budget, scope=scope)
    now, whole = prune.counts()["costs"][budget.what]
    assert now <= budget.fraction * whole
    widths = np.array([len(network.stem.weight), len(network.a.weight)])
    costs = CostModel(trace_channels(Residual(10), torch.zeros(2, 1, 6, 6)))
    assert any(
        costs.cost(budget.what, widths + more) > budget.fraction * whole
        for more in (np.array([1, 0]), np.array([0, 1]))
    )
    if scope == "layer":
        assert abs(widths[0] - widths[1]) <= 1


def test_layer_by_layer_measures_once_and_takes_the_layers_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_prune.callbacks import hrank

    measured: list[int] = []
    measure = hrank.sum_ranks
    monkeypatch.setattr(hrank, "sum_ranks", lambda *a: measured.append(1) or measure(*a))
    network = loaded()
    seen: list[tuple[int, int]] = []

    class Seen(Watch):
        def on_prune(self, trainer: Any, pl_module: Any, event: Any) -> None:
            seen.append((len(network.stem.weight), len(network.a.weight)))

    prune = HRankPruner(rates="[0.4]*3", at=["1ep", "2ep"], layerwise=True, images=30, verbose=False)
    trainer(tmp_path, [prune, LRRewind("0st"), Seen(moving=False)], max_epochs=2).fit(still(network), *images())
    assert seen == [(6, 10), (6, 6)]
    assert measured == [1]
    state = prune.own_state()
    assert state["scores"]["a"].shape == (10,)
    (written,) = state["ranks"]
    kept = {name: len(layer["kept"] or []) for name, layer in written["layers"].items()}
    assert kept == {"stem": 6, "a": 6, "b": 6}


class Noisy(Dataset):
    """Augments with all three global generators."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + float(np.random.rand()) + torch.rand(1, 6, 6)  # noqa: NPY002
        return noise + index / 48, torch.tensor(index % 3)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([Noisy()[i] for i in range(48)])


@pytest.mark.parametrize("kind", [Noisy, Stream])
def test_measuring_is_repeatable_and_disturbs_nothing(tmp_path: Path, kind: Any) -> None:
    def run(folder: str, seed: int, measure: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        network = loaded()
        scores: dict[str, Tensor] = {}

        class Keeping(HRankPruner):
            def plan(self, graph: Any, found: Any, budget: Any) -> Any:
                scores.update(found)
                order = {group.name: torch.arange(group.size).double() for group in graph.groups}
                return super().plan(graph, order, budget)  # the same channels leave, whatever was measured

        prune = Keeping(HALF, "1ep", images=measure, seed=seed, verbose=False)
        data = DataLoader(kind(), 8, shuffle=kind is Noisy)
        options = {"max_epochs": 2, "limit_train_batches": 6}
        trainer(tmp_path / folder, [prune], **options).fit(ToyModule(network), data, images()[1])
        return scores, network.head.weight.detach().clone()

    first, weights = run("first", 1, 40)
    again, same = run("again", 1, 40)
    other, still_same = run("other", 2, 24)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(weights, same)
    assert torch.equal(weights, still_same)


def test_layers_whose_ranks_say_nothing_are_named(tmp_path: Path) -> None:
    class Smooth(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.bn(self.stem(x)))
            h = F.relu(h + self.bn_b(self.b(F.silu(self.bn_a(self.a(h))))))
            return self.head(h.mean((2, 3)))

    network = Smooth(10)
    norms = network.a.weight.detach().double().flatten(1).norm(dim=1).numpy()
    weight = network.a.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"carry no order.*a: its mean ranks lie between"):
        prune = cut(tmp_path, network, rates={"a": 0.3})
    assert "a" in prune.weak
    assert torch.equal(network.a.weight, weight[lowest(norms, 3)])


def test_more_images_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images=49 asks for more than the 48 training images"):
        cut(tmp_path, Residual(), budget=HALF, images=49)
    stream = (DataLoader(Stream(), 8), images()[1])
    with pytest.raises(ConfigError, match="images=49 asks for more than the 48 images"):
        cut(tmp_path, Residual(), stream, budget=HALF, images=49)


def test_rates_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    watch = Watch(moving=False)
    for options, message in (
        ({"rates": "[0.5]*4"}, "rates has 4 entries; expected 3"),
        ({"rates": {"nowhere": 0.5}}, "matches no"),
        ({"rates": "[0.99]*3", "counting": "hrankplus"}, "would be emptied"),
        ({"rates": "[0.5]*3", "layerwise": True, "at": ["1st", "2st", "3st"]}, "only 2 groups"),
    ):
        prune = HRankPruner(**({"at": "1ep", "images": 40} | options))
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, [prune, watch], max_epochs=2).fit(still(Residual()), *images())
    with pytest.raises(BudgetError):
        cut(tmp_path, Residual(), budget=Budget(channels=0.1), min_channels=4)
    assert watch.steps == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a budget or rates; got neither"),
        ({"budget": HALF, "rates": "[0.5]"}, "got both"),
        ({"budget": HALF, "images": 0}, "images=0: expected an integer of at least 1"),
        ({"budget": HALF, "counting": "round"}, "counting='round' is unknown"),
        ({"budget": HALF, "scope": "all"}, "scope='all' is unknown"),
        ({"budget": HALF, "layerwise": True}, "needs rates"),
        ({"rates": "[0.5]", "at": ["1ep", "2ep"]}, "at has 2: give one time, or layerwise=True"),
        ({"rates": "[0.5]", "round_to": 8}, "leave out round_to"),
        ({"rates": "half"}, "is not like"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HRankPruner(**options)
