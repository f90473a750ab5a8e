"""Iterative magnitude pruning against a plain-torch loop: every weight, buffer and learning rate, bit for bit."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from lightning_prune import IterativeMagnitudePruner, LRRewind, WeightRewind
from tests._helpers.models import ToyModule, loaders, toy_network, trainer

EPOCHS, BATCHES, ROUNDS, FRACTION = 4, 12, 3, 0.3
TOTAL = EPOCHS * BATCHES


def multistep(module: nn.Module) -> dict[str, Any]:
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": MultiStepLR(optimizer, [2, 3]), "interval": "epoch"}}


def one_cycle(module: nn.Module) -> dict[str, Any]:
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=TOTAL)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def cosine_adam(module: nn.Module) -> dict[str, Any]:
    optimizer = Adam(module.parameters(), lr=1e-2)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, EPOCHS), "interval": "epoch"},
    }


def plain_loop(configure: Any, weights: bool, schedule: bool, k: int) -> tuple[nn.Module, list[float]]:
    """The method written down once more, with nothing of the library."""
    network = toy_network()
    configured = configure(network)
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    per_step = configured["lr_scheduler"]["interval"] == "step"
    batches = list(loaders()[0])
    pruned = {n: p for n, p in network.named_parameters() if n in ("0.weight", "4.weight")}
    masks = {n: np.ones(p.shape, bool) for n, p in pruned.items()}
    snapshot: dict[str, Any] = {}
    rates = []
    start, frozen = 0, False
    for round_ in range(ROUNDS + 1):
        for i in range(start, TOTAL):
            if round_ == 0 and i == k:
                groups = [{a: b for a, b in g.items() if a != "params"} for g in optimizer.param_groups]
                state = (network.state_dict(), optimizer.state_dict(), scheduler.state_dict(), groups)
                snapshot = dict(zip(("net", "opt", "sched", "groups"), deepcopy(state), strict=True))
            x, y = batches[i % BATCHES]
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            for n, p in pruned.items():
                p.grad[torch.from_numpy(~masks[n])] = 0
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            if not frozen and (per_step or (i + 1) % BATCHES == 0):
                scheduler.step()
        if round_ == ROUNDS:
            break
        magnitude = np.concatenate([np.abs(p.detach().numpy()).ravel() for p in pruned.values()])
        alive = np.concatenate([m.ravel() for m in masks.values()])
        order = np.argsort(np.where(alive, magnitude, np.inf), kind="stable")
        alive[order[: round(FRACTION * int(alive.sum()))]] = False
        at = 0
        for n in masks:
            masks[n] = alive[at : at + masks[n].size].reshape(masks[n].shape)
            at += masks[n].size
        if weights:
            network.load_state_dict(snapshot["net"])
            current = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(deepcopy({"state": snapshot["opt"]["state"], "param_groups": current}))
        if schedule:
            scheduler.load_state_dict(deepcopy(snapshot["sched"]))
            for group, saved in zip(optimizer.param_groups, snapshot["groups"], strict=True):
                group.update(deepcopy(saved))
        else:
            frozen = True
        with torch.no_grad():
            for n, p in pruned.items():
                p[torch.from_numpy(~masks[n])] = 0
                for value in optimizer.state[p].values() if optimizer.state[p] else ():
                    if torch.is_tensor(value) and value.shape == p.shape:
                        value[torch.from_numpy(~masks[n])] = 0
        start = k if weights or schedule else 0
    return network, rates


@pytest.mark.parametrize("configure", [multistep, one_cycle, cosine_adam])
@pytest.mark.parametrize("to", ["0st", "1ep", "17st", "25%"])
@pytest.mark.parametrize("mode", ["weights+lr", "lr"])
def test_rounds_equal_a_plain_loop(tmp_path: Any, configure: Any, to: str, mode: str) -> None:
    k = {"0st": 0, "1ep": BATCHES, "17st": 17, "25%": TOTAL // 4}[to]
    callbacks: list[Any] = [IterativeMagnitudePruner(FRACTION, ROUNDS, verbose=False), LRRewind(to)]
    if mode == "weights+lr":
        callbacks.append(WeightRewind(to))
    seen: list[float] = []
    module = ToyModule(configure=configure)
    module.on_before_zero_grad = lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])  # type: ignore[method-assign]
    fit = trainer(tmp_path, callbacks, max_epochs=EPOCHS)
    fit.fit(module, *loaders())
    network, rates = plain_loop(configure, mode == "weights+lr", True, k)
    assert fit.global_step == TOTAL + ROUNDS * (TOTAL - k)
    assert seen == rates
    for (name, ours), theirs in zip(module.network.state_dict().items(), network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    zeros = sum(int((p == 0).sum()) for n, p in network.named_parameters() if n.endswith("weight") and p.ndim == 2)
    assert zeros == 240 - round(0.7 * round(0.7 * round(0.7 * 240)))


def test_without_rewinders_rounds_go_on_at_the_final_learning_rate(tmp_path: Any) -> None:
    seen: list[float] = []
    module = ToyModule(configure=one_cycle)
    module.on_before_zero_grad = lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])  # type: ignore[method-assign]
    fit = trainer(tmp_path, [IterativeMagnitudePruner(FRACTION, ROUNDS, verbose=False)], max_epochs=EPOCHS)
    fit.fit(module, *loaders())
    network, rates = plain_loop(one_cycle, False, False, 0)
    assert seen == rates
    assert len(set(rates[TOTAL:])) == 1
    for (name, ours), theirs in zip(module.network.state_dict().items(), network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
