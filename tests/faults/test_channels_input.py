"""Wrong input to the pruner of channels: one clear error, before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import LBFGS, SGD
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import (
    Budget,
    BudgetError,
    ChannelPruner,
    ConfigError,
    EqualityError,
    IterativeMagnitudePruner,
    LRRewind,
    PruneError,
    ResumeError,
    TraceError,
)
from tests._helpers.channels import pruner, wide_network, widths
from tests._helpers.models import ToyModule, loaders, sgd, trainer

HALF = Budget(channels=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "l3"}, r"criterion='l3' is unknown; did you mean"),
        ({"criterion": 2}, r"criterion=2 is unknown"),
        ({"reduction": "sum"}, r"reduction='sum' is unknown; choose 'mean' or 'max'"),
        ({"budget": 0.5}, r"budget=0.5: expected a Budget"),
        ({"budget": [HALF, HALF]}, r"2 budgets for 1 cuts"),
        ({"at": []}, r"at=\[\]: give the moment"),
        ({"at": "half"}, r"at='half' is not a time"),
        ({"at": ["1ep", 3]}, r"at=3 is not a time"),
        ({"at": "101%"}, r"at='101%' lies beyond the end"),
        ({"scope": "all"}, r"scope='all' is unknown; choose 'layer' or 'global'"),
        ({"exclude": "head"}, r"exclude='head': expected a list"),
        ({"min_channels": 0}, r"min_channels=0: expected an integer of at least 1"),
        ({"taylor_steps": True}, r"taylor_steps=True"),
        ({"round_length": "10%"}, r"a length is in epochs"),
        ({"mode": "best"}, r"mode='best' is unknown"),
        ({"round_to": 0}, r"round_to=0: expected"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChannelPruner(**({"criterion": "l2", "budget": HALF, "at": "50%"} | options))


@pytest.mark.parametrize("fraction", [0, 1.5, -0.1])
def test_a_budget_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"must lie in \(0, 1\]"):
        Budget(macs=fraction)


def check_refused(
    tmp_path: Path, error: Any, message: str, callbacks: list[Any], module: Any = None, **options: Any
) -> None:
    """The fit is refused, and nothing was trained or written."""
    module = module or ToyModule(wide_network())
    before = [p.detach().clone() for p in module.parameters()]
    data, val = loaders()
    data = options.pop("data", data)
    run = trainer(tmp_path, callbacks, **({"max_epochs": 2} | options))
    with pytest.raises(error, match=message):
        run.fit(module, data, val)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert not list(tmp_path.rglob("record.json"))
    assert not {"on_save_checkpoint", "on_load_checkpoint"} & vars(module).keys()
    assert run.fit_loop.max_epochs == 2


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("3ep", r"at=3ep: training ends after 2 epochs, 24 steps, so nothing would be trained after this cut"),
        ("2ep", r"at=2ep: training ends after 2 epochs.*put LRRewind beside"),
        ("100%", r"at=100%: training ends"),
        ("24st", r"at=24st: training ends"),
        (["1ep", "1ep"], r"at=1ep does not lie after the cut before it, at 1ep"),
        (["15st", "1ep"], r"at=1ep does not lie after the cut before it, at 15st"),
        (["50%", "40%"], r"at=40% does not lie after"),
    ],
)
def test_times_that_do_not_fit(tmp_path: Path, at: Any, message: str) -> None:
    check_refused(tmp_path, ConfigError, message, [pruner(at=at)])


def test_times_and_rewinding(tmp_path: Path) -> None:
    check_refused(tmp_path, ConfigError, r"at=3st does not lie after the rewinding point, 1ep",
            [pruner(at="3st"), LRRewind("1ep")])  # fmt: skip
    check_refused(tmp_path, ConfigError, r"at=3ep: training ends", [pruner(at="3ep"), LRRewind("0st")])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.randn(12), 0)] * 16)


def test_a_percentage_of_what_has_no_length(tmp_path: Path) -> None:
    message = r"at=50%: the length of this training in steps is not known.*Give the time in steps"
    check_refused(tmp_path, ConfigError, message, [pruner()], data=DataLoader(Stream(), 4))


def test_what_stands_beside(tmp_path: Path) -> None:
    check_refused(tmp_path, ConfigError, "two pruners in one trainer", [pruner(), IterativeMagnitudePruner(0.2, 1)])
    check_refused(tmp_path, ConfigError, "StochasticWeightAveraging changes the Trainer's length",
            [pruner(), StochasticWeightAveraging(0.1)])  # fmt: skip
    with pytest.raises(ConfigError, match=r"FSDPStrategy holds parameters in a form of its own"):
        pruner().make_schedule(type("Trainer", (), {"strategy": FSDPStrategy.__new__(FSDPStrategy)})())


def test_optimizers_that_cannot_be_sliced(tmp_path: Path) -> None:
    lbfgs = ToyModule(wide_network(), lambda net: LBFGS(net.parameters()))
    check_refused(tmp_path, ConfigError, "LBFGS keeps state that is not one tensor a parameter", [pruner()], lbfgs)

    class Factored(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["row"] = torch.ones(p.shape[0], 2)
            return loss

    module = ToyModule(wide_network(), lambda net: Factored(net.parameters(), 0.1))
    with pytest.raises(PruneError, match=r"Factored keeps state 'row' of shape \(16, 2\) for 0.weight"):
        trainer(tmp_path, [pruner()], max_epochs=2).fit(module, *loaders())
    assert widths(module) == [16, 16, 3]


class Two(ToyModule):
    def __init__(self) -> None:
        super().__init__(wide_network())
        self.other = nn.Linear(2, 2)


class Averaged(ToyModule):
    def __init__(self) -> None:
        super().__init__(wide_network())
        self.average = AveragedModel(self.network)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Teacher(ToyModule):
    def __init__(self) -> None:
        super().__init__(wide_network())
        self.teacher = wide_network(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Asks(ToyModule):
    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        return self.network(x * mask)


def test_modules_that_do_not_say_what_to_prune(tmp_path: Path) -> None:
    several = r"Two defines no forward\(\), and its weights lie in several places \(network, other"
    check_refused(tmp_path, ConfigError, several, [pruner()], Two())
    check_refused(tmp_path, ConfigError, r"module='net': this ToyModule has no such module; its children: network",
            [pruner(module="net")])  # fmt: skip
    check_refused(tmp_path, ConfigError, r"exclude: 'hed' matches no parameter", [pruner(exclude=["hed"])])
    untold = r"the training batch does not tell what Asks.forward\(x, lengths, mask\) takes"
    check_refused(tmp_path, ConfigError, untold, [pruner()], Asks(wide_network()))


def test_copies_that_would_keep_their_width(tmp_path: Path) -> None:
    check_refused(tmp_path, ConfigError, r"average is an AveragedModel inside the module.*EMAWeightAveraging callback",
            [pruner()], Averaged())  # fmt: skip
    with pytest.warns(UserWarning, match=r"teacher looks like a copy of network that the forward pass does not use"):
        trainer(tmp_path, [pruner()], max_epochs=2).fit(Teacher(), *loaders())


def test_networks_that_cannot_be_cut(tmp_path: Path) -> None:
    one = ToyModule(nn.Sequential(nn.Linear(12, 3)))
    check_refused(tmp_path, ConfigError, r"no channel of Sequential can leave", [pruner()], one)
    check_refused(
        tmp_path, TraceError, r"cannot be run with these example inputs", [pruner(example_inputs=torch.rand(2, 5))]
    )
    check_refused(tmp_path, BudgetError, r"cannot be met", [pruner(budget=Budget(params=0.01))])
    check_refused(tmp_path, BudgetError, r"cannot be met", [pruner(budget=Budget(params=0.2), min_channels=12)])
    plain = ToyModule(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))
    check_refused(tmp_path, ConfigError, r"no group of this Sequential passes a BatchNorm", [pruner("bn_scale")], plain)


def test_a_function_that_gives_no_scores(tmp_path: Path) -> None:
    module = ToyModule(wide_network())
    with pytest.raises(ConfigError, match=r"scores of group '0' have shape \(3,\), expected \(16,\)"):
        trainer(tmp_path, [pruner(lambda group, model: torch.zeros(3))], max_epochs=2).fit(module, *loaders())
    assert widths(module) == [16, 16, 3]


class Blind(nn.Module):
    """A branch that no output depends on: the check cannot see whether its removal is right."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        return self.head(hidden + 0 * self.b(hidden))


def test_a_cut_that_cannot_be_checked_changes_nothing(tmp_path: Path) -> None:
    module = ToyModule(Blind())
    with pytest.raises(EqualityError, match=r"no output depends on b\.bias"):
        trainer(tmp_path, [pruner()], max_epochs=2).fit(module, *loaders())
    assert widths(module) == [8, 8, 3]


def test_taylor_that_sees_no_gradient(tmp_path: Path) -> None:
    class Raw(ToyModule):
        """Manual optimisation around Lightning: its optimizer's hooks are never reached."""

        def __init__(self) -> None:
            super().__init__(wide_network())
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            super().training_step(batch, batch_idx).backward()
            optimizer.step()

    with pytest.raises(ConfigError, match=r"no gradient of 1.weight was seen before the cut.*Manual optimisation"):
        trainer(tmp_path, [pruner("taylor", at="1ep")], max_epochs=2).fit(Raw(), *loaders())

    def frozen(net: nn.Module) -> Any:
        net[1].requires_grad_(False)
        return sgd(net[0])

    with pytest.raises(ConfigError, match=r"no gradient of 1.weight was seen.*Frozen layers"):
        trainer(tmp_path, [pruner("taylor")], max_epochs=2).fit(ToyModule(wide_network(), frozen), *loaders())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_epochs=1, save_top_k=-1)
    run = trainer(tmp_path / "first", [pruner(at="1ep"), saver], max_epochs=3, enable_checkpointing=True)
    run.fit(ToyModule(wide_network()), *loaders())
    return sorted((tmp_path / "ckpt").iterdir())[1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "l1"}, r"written with criterion='l2', this run has criterion='l1'"),
        ({"budget": Budget(channels=0.25)}, r"written with budgets=\[\{'channels': 0.5\}\], this run has"),
        ({"at": "2ep"}, r"written with at=\['1ep'\], this run has at=\['2ep'\]"),
    ],
)
def test_resuming_with_other_settings(tmp_path: Path, checkpoint: Path, options: Any, message: str) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_epochs=1, save_top_k=-1)
    run = trainer(tmp_path, [pruner(**({"at": "1ep"} | options)), saver], max_epochs=3, enable_checkpointing=True)
    with pytest.raises(ResumeError, match=message):
        run.fit(ToyModule(wide_network()), *loaders(), ckpt_path=checkpoint)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The checkpoint holds no resume state")
def test_resuming_into_what_does_not_fit(tmp_path: Path, checkpoint: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_epochs=1, save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    run = trainer(tmp_path, [pruner(at="1ep"), saver], **options)
    other = ToyModule(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)))
    with pytest.raises(PruneError, match=r"expects \(16, 12\)|does not have"):
        run.fit(other, *loaders(), ckpt_path=checkpoint)
    plain = trainer(tmp_path / "plain", [saver], **options)
    plain.fit(ToyModule(wide_network()), *loaders())
    dense = plain.checkpoint_callback.best_model_path
    run = trainer(tmp_path, [pruner(at="2ep"), saver], **(options | {"max_epochs": 5}))
    with pytest.raises(ResumeError, match="written without ChannelPruner"):
        run.fit(ToyModule(wide_network()), *loaders(), ckpt_path=dense)


def test_an_error_in_training_gives_everything_back(tmp_path: Path) -> None:
    class Breaks(ToyModule):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.global_step == 20:
                raise ValueError("the data is broken")
            return super().training_step(batch, batch_idx)

    module = Breaks(wide_network())
    run = trainer(tmp_path, [pruner(at="1ep"), EMAWeightAveraging()], max_epochs=2)
    with pytest.raises(ValueError, match="the data is broken"):
        run.fit(module, *loaders())
    assert widths(module) == [8, 8, 3]
    assert "on_load_checkpoint" not in vars(module)
    assert run.fit_loop.max_epochs == 2
