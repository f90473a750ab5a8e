"""Sparsity training in a fit equals a loop in plain torch whose loss holds the penalty; bad setups are refused."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from lightning_prune import ConfigError, LRRewind, SlimmingRegularizer
from tests._helpers.channels import Residual, images, pruner
from tests._helpers.models import ToyModule, loaders, toy_network, trainer


def module(network: nn.Module | None = None, configure: Any = None) -> ToyModule:
    return ToyModule(network, configure or (lambda m: SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)))


def scales_of(network: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_fit_equals_the_loss_with_the_penalty(tmp_path: Any, accumulate: int, clip: float | None) -> None:
    ours = module()
    theirs = copy.deepcopy(ours.network)
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer(tmp_path, [SlimmingRegularizer(0.05)], **options).fit(ours, *loaders())
    optimizer = SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    theirs.train()
    for _ in range(2):
        for index, (x, y) in enumerate(loaders()[0]):
            loss = F.cross_entropy(theirs(x), y) / accumulate
            if (index + 1) % accumulate == 0:  # once a step, whatever was accumulated
                loss = loss + 0.05 * sum(scale.abs().sum() for scale in scales_of(theirs))
            loss.backward()
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(theirs.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(ours.network.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    plain = module(toy_network())
    trainer(tmp_path / "plain", [], **options).fit(plain, *loaders())
    assert not torch.allclose(plain.network[1].weight, ours.network[1].weight, atol=1e-3)


def test_proximal_steps_equal_a_loop(tmp_path: Any) -> None:
    ours = module(configure=lambda m: Adam(m.parameters(), 0.01))
    theirs = copy.deepcopy(ours.network)
    trainer(tmp_path, [SlimmingRegularizer(2.0, update="proximal")], max_epochs=5).fit(ours, *loaders())
    optimizer = Adam(theirs.parameters(), 0.01)
    for _ in range(5):
        for x, y in loaders()[0]:
            optimizer.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                for scale in scales_of(theirs):
                    scale.copy_(scale.sign() * (scale.abs() - 0.01 * 2.0).clamp_min(0))
    for a, b in zip(ours.network.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert (ours.network[1].weight == 0).any()
    assert (ours.network[1].weight != 0).any()


@pytest.mark.parametrize("update", ["subgradient", "proximal"])
def test_scales_of_one_channel_fall_together(tmp_path: Any, update: Any) -> None:
    """Two BatchNorms on a residual stage: with the group penalty the small ones of both are the same channels."""

    def zeros(coupled: Any) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        network = Residual()
        fitted = module(network, lambda m: SGD(m.parameters(), 0.05))
        penalise = SlimmingRegularizer(0.2, update, coupled)
        trainer(tmp_path / coupled, [penalise], max_epochs=20).fit(fitted, *images())
        return network.bn.weight.detach().abs() < 0.03, network.bn_b.weight.detach().abs() < 0.03

    first, second = zeros("group")
    assert 0 < first.sum() < 8
    assert torch.equal(first, second)
    first, second = zeros("each")
    assert not torch.equal(first, second)


def test_channels_that_leave_take_their_scales_along_and_the_last_round_has_no_penalty(tmp_path: Any) -> None:
    class Seen(SlimmingRegularizer):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            before = [scale.grad.clone() for scale in scales_of(pl_module)]
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            moved = any(not torch.equal(a, s.grad) for a, s in zip(before, scales_of(pl_module), strict=True))
            seen.append((len(pl_module.network.bn.weight), moved))

    seen: list[tuple[int, bool]] = []
    fitted = module(Residual(), lambda m: SGD(m.parameters(), 0.01))
    callbacks = [Seen(1e-3, coupled="group"), pruner("bn_scale", at=["1ep", "2ep"]), LRRewind("0st")]
    trainer(tmp_path, callbacks, max_epochs=2).fit(fitted, *images())
    assert len(seen) == 6 * (1 + 2 + 2)
    assert sorted(set(seen), reverse=True) == [(8, True), (5, True), (4, False)]


def test_the_penalty_is_resumed_as_off(tmp_path: Any) -> None:
    penalise = SlimmingRegularizer(1e-3)
    penalise.load_state_dict({"round": 2})
    penalise._last_round = 2
    assert not penalise.active
    assert penalise.state_dict() == {"round": 2}
    fitted = module()
    runner = trainer(tmp_path, [penalise], max_epochs=1)
    runner.fit(fitted, *loaders())  # another fit begins anew
    assert penalise.state_dict() == {"round": 0}
    assert 0 <= runner.callback_metrics["prune/scales_near_zero"] <= 1


class Manual(ToyModule):
    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.wrapped = wrapped

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers() if self.wrapped else self.trainer.optimizers[0]
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimisation_works_and_is_refused_where_it_never_reaches_the_hook(tmp_path: Any) -> None:
    penalise = SlimmingRegularizer(1e-3)
    trainer(tmp_path, [penalise], max_epochs=1).fit(Manual(wrapped=True), *loaders())
    with pytest.raises(ConfigError, match="manual optimisation never reached on_before_optimizer_step"):
        trainer(tmp_path, [penalise], max_epochs=1).fit(Manual(wrapped=False), *loaders())


def fit_once(tmp_path: Any, penalise: SlimmingRegularizer, fitted: Any) -> None:
    trainer(tmp_path, [penalise], max_epochs=1).fit(fitted, *loaders())


def test_what_cannot_work_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="has no BatchNorm with a trainable scale"):
        fit_once(tmp_path, SlimmingRegularizer(), module(toy_network(norm=False)))
    with pytest.raises(ConfigError, match="leaves no BatchNorm"):
        fit_once(tmp_path, SlimmingRegularizer(exclude=["1"]), module())
    with pytest.raises(ConfigError, match="no optimizer steps the scales"):
        fit_once(tmp_path, SlimmingRegularizer(), module(configure=lambda m: SGD(m[4].parameters(), 0.1)))
    with pytest.raises(ConfigError, match="LBFGS evaluates gradients several times"):
        fit_once(tmp_path, SlimmingRegularizer(), module(configure=lambda m: LBFGS(m.parameters())))
    with pytest.warns(UserWarning, match="update='proximal'"):
        fit_once(tmp_path, SlimmingRegularizer(), module(configure=lambda m: Adam(m.parameters())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, "strength=0: expected a number above 0"),
        ({"strength": -1e-4}, "expected a number above 0"),
        ({"strength": float("nan")}, "expected a number above 0"),
        ({"update": "lasso"}, "update='lasso' is unknown"),
        ({"coupled": "sum"}, "coupled='sum' is unknown"),
        ({"exclude": "bn"}, "write exclude=\\['bn'\\]"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlimmingRegularizer(**options)
