"""Residual blocks that leave whole during a fit: the same as in plain torch, with everything that goes along."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from lightning_prune import (
    Budget,
    ConfigError,
    LRRewind,
    NoEffectWarning,
    RunRecord,
    TicketWriter,
    WeightRewind,
    load_compact,
)
from lightning_prune.errors import BudgetError
from tests._helpers.channels import Chain, pruner, wide_network
from tests._helpers.models import ToyModule, loaders, trainer
from tests._helpers.resuming import Case, KillAfter, check_moved, check_resumed
from tests._helpers.resuming import Net as ResumedNet
from tests._helpers.resuming import fit as fit_saved
from tests.integration.test_resume_fits import per_step

ORDER = {"first": 2.0, "second": 0.0, "third": 1.0}


def by_name(block: Any, model: nn.Module) -> float:
    return ORDER[block.name]


def cutter(criterion: Any = by_name, keep: float = 0.67, at: Any = "5st", **options: Any) -> Any:
    return pruner(criterion, options.pop("budget", Budget(channels=keep)), at, granularity="block", **options)


class Look(pl.Callback):
    """Notes the events and, right after each, weights and what the optimizer holds."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.names: list[list[str]] = []
        self.states: list[dict[str, Tensor]] = []

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
        self.events.append(event)
        names = {id(p): n for n, p in pl_module.network.named_parameters()}
        held = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
        assert all(id(p) in names for o in trainer.optimizers for p in o.state)
        self.names.append(sorted(names[id(p)] for p in held))
        self.states.append({n: t.detach().clone() for n, t in pl_module.network.state_dict().items()})


def fit(folder: Path, module: pl.LightningModule, callbacks: list[Any], **options: Any) -> Look:
    look = Look()
    run = trainer(folder, [*callbacks, look], **({"max_epochs": 2} | options))
    run.fit(module, *loaders())
    assert run.fit_loop.max_epochs == options.get("max_epochs", 2)
    return look


# ------------------------------------------------------------------ the same as by hand

OPTIMIZERS = {
    "momentum": lambda groups: SGD(groups, 0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda groups: AdamW(groups, 1e-2, amsgrad=True),
    "adagrad": lambda groups: Adagrad(groups, 1e-1),
}


def in_groups(net: nn.Module, kind: str) -> Optimizer:
    """The block that will leave has a group of its own, before the others."""
    own = [p for n, p in net.named_parameters() if n.startswith("second.")]
    return OPTIMIZERS[kind](
        [{"params": own}, {"params": [p for p in net.parameters() if all(p is not q for q in own)]}]
    )


def named_memory(net: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {n: copy.deepcopy(optimizer.state[p]) for n, p in net.named_parameters() if p in optimizer.state}


def fill(net: nn.Module, optimizer: Optimizer, weights: dict[str, Tensor], memory: dict[str, Any]) -> None:
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    for name, parameter in net.named_parameters():
        optimizer.state.pop(parameter, None)
        if name in memory:
            optimizer.state[parameter] = copy.deepcopy(memory[name])


@pytest.mark.parametrize("rewind", ["none", "restore", "reset", "keep"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_fit_equals_a_loop_in_plain_torch(tmp_path: Path, kind: str, rewind: str) -> None:
    """Two cuts. After each a network built without the blocks goes on, with a new optimizer filled by name."""
    batches = list(loaders()[0]) * 2
    names = ["first", "second", "third"]
    net = Chain(names)
    optimizer = in_groups(net, kind)
    fresh = named_memory(net, optimizer)  # Adagrad has sums from the start
    early: tuple[Any, Any] = ({}, {})
    rounds = [batches[:5], batches[:9], batches] if rewind == "none" else [batches[:5], batches[2:9], batches[2:]]
    done = 0
    for number, own in enumerate(rounds):
        if number:
            names.remove("second" if number == 1 else "third")
            weights, memory = net.state_dict(), named_memory(net, optimizer)
            net = Chain(names)
            optimizer = in_groups(net, kind)
            if rewind != "none":
                weights = early[0]
                memory = {"restore": early[1], "reset": fresh, "keep": memory}[rewind]
            fill(net, optimizer, weights, memory)
            own = own[done:] if rewind == "none" else own
        for x, y in own:
            if done == 2:
                early = copy.deepcopy(net.state_dict()), named_memory(net, optimizer)
            optimizer.zero_grad()
            F.cross_entropy(net.train()(x), y).backward()
            optimizer.step()
            done += 1
    module = ToyModule(Chain(), lambda net: in_groups(net, kind))
    rewinders = [] if rewind == "none" else [WeightRewind("2st", optimizer_state=rewind), LRRewind("2st")]
    budgets = [Budget(channels=0.67), Budget(channels=0.34)]
    look = fit(tmp_path, module, [cutter(budget=budgets, at=["5st", "9st"]), *rewinders])
    assert [[e["block"] for e in event.plan.left] for event in look.events] == [["second"], ["third"]]
    assert look.names == [
        sorted(n for n, _ in Chain(kept).named_parameters()) for kept in (["first", "third"], ["first"])
    ]
    found = module.network.state_dict()
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())
    module.network.eval()
    assert torch.equal(module.network(batches[0][0]), net.eval()(batches[0][0]))
    held = module.trainer.optimizers[0]
    assert [len(group["params"]) for group in held.param_groups] == [0, len(list(net.parameters()))]
    for one, other in zip(module.network.parameters(), net.parameters(), strict=True):
        memory, own_memory = held.state[one], optimizer.state[other]
        assert memory.keys() == own_memory.keys()
        assert all(torch.equal(torch.as_tensor(memory[k]), torch.as_tensor(own_memory[k])) for k in memory)


def test_a_tensor_whose_first_holder_leaves_is_rewound_under_its_new_name(tmp_path: Path) -> None:
    net = Chain()
    net.third.a = net.first.a
    first = copy.deepcopy(net.state_dict())
    scores = {"first": 0.0, "second": 1.0, "third": 2.0}
    module = ToyModule(net, lambda n: AdamW(n.parameters(), 1e-2))
    look = fit(tmp_path, module, [cutter(lambda b, _: scores[b.name], at="100%"), WeightRewind("0st"), LRRewind("0st")])
    assert "third.a.weight" in look.names[0]
    assert dict(look.events[0].renamed) == {
        f"network.third.a.{leaf}": f"network.first.a.{leaf}" for leaf in ("weight", "bias")
    }
    assert all(torch.equal(value, first[name]) for name, value in look.states[0].items())
    assert not torch.equal(module.network.third.a.weight, first["first.a.weight"])  # trained again since


# ---------------------------------------------------------------------- what is chosen


class Watched(pl.Callback):
    """Judges blocks from outside: gradients of every step, and weights, and the first block that leaves."""

    def __init__(self) -> None:
        self.effects: dict[str, list[float]] = {name: [] for name in ORDER}
        self.left: list[str] = []
        self.weights: dict[str, np.ndarray] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if not self.left:
            for name in ORDER:
                own = getattr(pl_module.network, name).parameters()
                self.effects[name].append(sum(float((p.detach().double() * p.grad.double()).sum()) for p in own) ** 2)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not self.left:
            state = pl_module.network.state_dict()
            self.weights = {n: t.detach().double().numpy().copy() for n, t in state.items() if t.is_floating_point()}

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
        self.left += [entry["block"] for entry in event.plan.left]


def expected_scores(criterion: str, seen: Watched, window: int) -> dict[str, float]:
    if criterion == "taylor":
        return {name: float(np.mean(values[-window:])) for name, values in seen.effects.items()}
    if criterion == "bn_scale":
        return {name: float(np.abs(seen.weights[f"{name}.bn.weight"]).mean()) for name in ORDER}
    found = {}
    for name in ORDER:
        norms = []
        for layer in ("a", "b"):
            weight = seen.weights[f"{name}.{layer}.weight"]
            if criterion == "l1":
                norms += list(np.abs(weight).sum(1) / np.sqrt(weight.shape[1]))
            else:
                norms += list(np.linalg.norm(weight, axis=1))
        found[name] = float(np.mean(norms))
    return found


@pytest.mark.parametrize(("criterion", "at", "window"), [
    ("l1", "5st", 0), ("l2", "5st", 0), ("bn_scale", "5st", 0), ("taylor", "7st", 3), ("taylor", "1ep", 12)
])  # fmt: skip
def test_what_a_criterion_scores(tmp_path: Path, criterion: str, at: str, window: int) -> None:
    scored: dict[str, Any] = {}

    class Noting(type(cutter())):  # type: ignore[misc]
        def score(self, *args: Any) -> Any:
            scored.update(found := super().score(*args))
            return found

    prune = Noting(criterion, Budget(channels=0.4), at, granularity="block", verbose=False,
                   taylor_steps=min(window, 3) if window == 3 else 100)  # fmt: skip
    seen = Watched()
    fit(tmp_path, ToyModule(Chain()), [prune, seen])
    expected = expected_scores(criterion, seen, window)
    assert {name: float(value) for name, value in scored.items()} == pytest.approx(expected, rel=1e-6)
    assert sorted(seen.left) == sorted(sorted(expected, key=lambda name: expected[name])[:2])
    spread = sorted(expected.values())
    assert all(low * 1.001 < high for low, high in pairwise(spread))


def test_the_effect_of_a_block_is_that_of_a_factor_on_its_branch() -> None:
    """Where a BatchNorm follows every layer: against autograd, with a factor that the network has no name for."""
    from lightning_prune.channels import find_blocks, trace_channels
    from lightning_prune.channels.block_scores import BlockTaylor

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(6, 9, bias=False), nn.BatchNorm1d(9, 1e-12), nn.ReLU(), nn.Linear(9, 6, bias=False)]
            self.branch = nn.Sequential(*layers, nn.BatchNorm1d(6, 1e-12))

        def forward(self, x: Tensor, factor: Any = 1.0) -> Tensor:
            return x + factor * self.branch(x)

    torch.manual_seed(1)
    block, head = Normed().double(), nn.Linear(6, 3).double()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randint(0, 3, (16,))
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    F.cross_entropy(head(block(x, factor)), y).backward()
    model = nn.Sequential(block, head)
    average = BlockTaylor(model, find_blocks(trace_channels(model, x)).removable)
    average.add(model.parameters())
    (score,) = average.scores().values()
    assert float(score) == pytest.approx(float(factor.grad) ** 2, rel=1e-6)


def test_chance_is_drawn_by_the_seed(tmp_path: Path) -> None:
    left = []
    for seed in (0, 0, 1, 2, 3):
        look = fit(tmp_path, ToyModule(Chain()), [cutter("random", seed=seed)], max_epochs=1)
        left.append([entry["block"] for entry in look.events[0].plan.left])
    assert left[0] == left[1]
    assert len({name for names in left for name in names}) > 1


def test_the_branch_that_changes_least_leaves(tmp_path: Path) -> None:
    net = Chain()
    with torch.no_grad():
        net.third.b.weight.mul_(1e-4)
        net.third.b.bias.zero_()
    look = fit(tmp_path, ToyModule(net, lambda n: SGD(n.parameters(), 1e-6)), [cutter("branch")])
    assert [entry["block"] for entry in look.events[0].plan.left] == ["third"]


# ------------------------------------------------------------------------ what goes along


def test_passes_meet_their_budgets_by_less_than_a_block(tmp_path: Path) -> None:
    whole, block = (sum(p.numel() for p in part.parameters()) for part in (Chain(), Chain().first))
    budgets = [Budget(params=0.8), Budget(params=0.5)]
    module = ToyModule(Chain())
    prune = cutter(budget=budgets, at=["25%", "1ep"], monitor="val_acc")
    look = fit(tmp_path, module, [prune, TicketWriter()])
    for event, budget in zip(look.events, budgets, strict=True):
        now, dense = event.costs["params"]
        assert dense == whole
        assert budget.fraction * whole - block < now <= budget.fraction * whole
    assert [(e.unit, e.kept, e.total, e.removed) for e in look.events] == [("blocks", 2, 3, 1), ("blocks", 1, 3, 1)]
    record = RunRecord.read(prune.folder)
    assert [(row.unit, row.kept, row.total) for row in record.rounds] == [("blocks", n, 3) for n in (3, 2, 1)]
    assert dict(record.rounds[-1].per_layer) == {"first": (1, 1), "second": (0, 1), "third": (0, 1)}
    assert record.rounds[-1].costs["params"] == (sum(p.numel() for p in module.network.parameters()), whole)
    assert record.rounds[-1].costs["macs"] == (2 * (12 * 10 + 2 * 70 + 30), 2 * (12 * 10 + 6 * 70 + 30))
    for name, state in [("tickets/round-01", look.states[0]), ("tickets/round-02", look.states[1]),
                        ("compact", module.network.state_dict())]:  # fmt: skip
        loaded = load_compact(Chain(), prune.folder / f"{name}.safetensors").state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_the_table_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, ToyModule(Chain()), [cutter(monitor="val_acc", verbose=True)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split() == ["round", "blocks", "params", "MACs", "val_acc", "against", "dense"]
    assert lines[2].split()[:3] == ["1", "66.67", "%"]


def test_an_average_loses_its_block_too(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    average = EMAWeightAveraging(decay=0.5)

    class Peek(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 6:
                seen.update(average._average_model.module.network.state_dict())

    module = ToyModule(Chain())
    fit(tmp_path, module, [cutter(), average, Peek()])
    assert seen.keys() == module.network.state_dict().keys() == Chain(["first", "third"]).state_dict().keys()


class BlockNet(ResumedNet):
    """The resumed network, with three blocks in its middle."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        middle = Chain().first.__class__
        names = ("first", "second", "third")
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), *(middle(8, 6) for _ in names), nn.Linear(8, 1))


@pytest.mark.parametrize("rewound", [False, True])
def test_every_checkpoint_resumes_to_the_same_end(tmp_path: Path, rewound: bool) -> None:
    """Taylor sums, two cuts, the optimizer's memory: resumed before, between and after the cuts."""
    case = Case("blocks", per_step, module=BlockNet, options={"val_check_interval": 3})

    def owners() -> list[Any]:
        options = {"taylor_steps": 4, "module": "network", "budget": [Budget(params=0.75), Budget(params=0.45)]}
        prune = cutter("taylor", at=["4st", "9st"], **options)
        return [prune, *([WeightRewind("2st"), LRRewind("2st")] if rewound else [])]

    cutters = owners()
    full = fit_saved(case, tmp_path, owners=cutters)
    rows = cutters[0]._recorder.record.comparable()
    kept = [row["kept"] for row in rows["rounds"]]
    assert kept[0] == 3 > kept[1] > kept[2] >= 1
    sizes, moved = set(), []
    for saved in full.saved[:-1:2] + full.saved[-1:]:
        again = owners()
        resumed = fit_saved(case, tmp_path / "resumed", seeded=99, checkpoint=saved.path, hooks=(), owners=again)
        check_resumed(full, resumed, saved)
        assert again[0]._recorder.record.comparable() == rows, saved.path.name
        moved.append(check_moved(full, saved))
        sizes.add(saved.weights.numel())
    assert len(sizes) == 3
    assert any(moved)


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "layer"}, "granularity='layer': expected 'channel' or 'block'"),
        ({"scope": "global"}, "scope, reduction, round_to, min_channels and approximate are for channels"),
        ({"round_to": 8}, "are for channels; leave them out with granularity='block'"),
        ({"min_channels": 2}, "are for channels"),
        ({"approximate": True}, "are for channels"),
        ({"reduction": "max"}, "are for channels"),
        ({"criterion": "fpgm"}, "criterion 'fpgm' compares the filters of one layer, and says nothing of blocks"),
        ({"criterion": "l3"}, "criterion='l3' is unknown"),
    ],
)
def test_arguments_that_blocks_do_not_know(options: dict[str, Any], message: str) -> None:
    options = {"granularity": "block", "criterion": "l2"} | options
    with pytest.raises(ConfigError, match=message):
        pruner(options.pop("criterion"), **options)


@pytest.mark.parametrize(
    ("net", "options", "error", "message"),
    [
        (wide_network, {}, ConfigError, "no residual block of Sequential can leave"),
        (Chain, {"exclude": ["first", "second", "third"]}, ConfigError, "(?s)no residual block of Chain .*excluded by"),
        (Chain, {"budget": Budget(params=0.1)}, BudgetError, "without all of its 3 removable blocks .* stay"),
        (Chain, {"criterion": lambda b, _: float("nan")}, ConfigError, "scores of blocks are not all numbers"),
    ],
)  # fmt: skip
def test_networks_and_budgets_that_cannot_work(
    tmp_path: Path, net: Any, options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(tmp_path, ToyModule(net()), [cutter(**options)])


def test_frozen_blocks_have_no_effect_to_judge(tmp_path: Path) -> None:
    net = Chain()
    net.second.requires_grad_(False)
    with pytest.raises(ConfigError, match="no gradient of block second was seen before the cut"):
        fit(tmp_path, ToyModule(net), [cutter("taylor")])
    look = fit(tmp_path, ToyModule(net), [cutter("taylor", 0.5, exclude=["second"])])
    assert look.events[0].total == 2
    assert look.events[0].plan.left[0]["block"] != "second"


def test_what_stays_is_recorded_with_the_reason(tmp_path: Path) -> None:
    prune = cutter(keep=0.5, exclude=["network.third"])
    net = Chain()
    net.first.bn = nn.Identity()
    fit(tmp_path, ToyModule(net), [prune])
    why = {axis["name"]: axis["reason"] for axis in RunRecord.read(prune.folder).frozen}
    assert why == {"third": "excluded by 'network.third'"}
    scaled = cutter("bn_scale", 0.5)
    fit(tmp_path / "scaled", ToyModule(copy.deepcopy(net)), [scaled])
    why = {axis["name"]: axis["reason"] for axis in RunRecord.read(scaled.folder).frozen}
    assert why == {"first": "no BatchNorm scale judges it"}


def test_a_budget_that_is_met_already_says_so(tmp_path: Path) -> None:
    with pytest.warns(NoEffectWarning, match="the cut before round 1 removes nothing"):
        look = fit(tmp_path, ToyModule(Chain()), [cutter(keep=1.0)])
    assert look.events[0].kept == 3


def test_a_checkpoint_of_channels_is_not_resumed_with_blocks(tmp_path: Path) -> None:
    path = tmp_path / "at.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, ToyModule(Chain()), [pruner("l2", at="5st"), KillAfter(path, 0)])
    module, run = ToyModule(Chain()), trainer(tmp_path / "again", [cutter("l2", 0.5)], max_epochs=2)
    with pytest.raises(Exception, match="granularity='channel', this run has granularity='block'"):
        run.fit(module, *loaders(), ckpt_path=path)
