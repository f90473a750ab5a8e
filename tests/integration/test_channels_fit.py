"""Channels that leave during a fit: the same as by hand, at the right moment, with everything that goes along."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop
from torch.optim import lr_scheduler as lrs

from lightning_prune import (
    Budget,
    LRRewind,
    NoEffectWarning,
    RunRecord,
    TicketWriter,
    WeightRewind,
    load_compact,
)
from tests._helpers.channels import Residual, Watch, images, pruner, wide_network, widths
from tests._helpers.models import ToyModule, loaders, sgd, toy_network, trainer


def fit(
    tmp_path: Path,
    module: pl.LightningModule,
    callbacks: list[Any],
    data: Any = None,
    moving: bool = True,
    **options: Any,
) -> Watch:
    watch = Watch(moving)
    run = trainer(tmp_path, [*callbacks, watch], **({"max_epochs": 2} | options))
    run.fit(module, *(data or loaders()))
    watch.trainer = run
    return watch


# ------------------------------------------------------------------ the same as by hand


def slice_by_hand(net: nn.Sequential, optimizer: SGD, keep: np.ndarray) -> tuple[nn.Sequential, SGD]:
    """A narrow network with a new optimizer, both filled entry by entry."""
    narrow = nn.Sequential(nn.Linear(12, len(keep)), nn.BatchNorm1d(len(keep)), nn.ReLU(), nn.Dropout(0.0),
                           nn.Linear(len(keep), 3))  # fmt: skip
    fresh = sgd(narrow)
    with torch.no_grad():
        for name, tensor in narrow.state_dict().items():
            old = net.state_dict()[name]
            tensor.copy_(old if old.shape == tensor.shape else old[:, keep] if name == "4.weight" else old[keep])
        for (name, old), new in zip(net.named_parameters(), narrow.parameters(), strict=True):
            momentum = optimizer.state[old]["momentum_buffer"]
            shape = new.shape
            cut = momentum if old.shape == shape else momentum[:, keep] if name == "4.weight" else momentum[keep]
            fresh.state[new] = {"momentum_buffer": cut.clone()}
    return narrow, fresh


@pytest.mark.parametrize("cut_after", [7, 12])
def test_a_fit_equals_a_loop_in_plain_torch(tmp_path: Path, cut_after: int) -> None:
    net = toy_network(3)
    optimizer = sgd(net)
    data = list(loaders()[0]) * 2
    for number, (x, y) in enumerate(data):
        if number == cut_after:
            norms = np.sqrt((net[0].weight.detach().numpy().astype(np.float64) ** 2).sum(1))
            keep = np.sort(np.argsort(-norms)[:8])
            net, optimizer = slice_by_hand(net, optimizer, keep)
        optimizer.zero_grad()
        F.cross_entropy(net.train()(x), y).backward()
        optimizer.step()
    module = ToyModule(toy_network(3))
    watch = fit(tmp_path, module, [pruner(at=f"{cut_after}st")])
    assert [event.step for event in watch.events] == [cut_after]
    for (name, one), other in zip(module.network.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam amsgrad": lambda p: Adam(p, 1e-2, amsgrad=True),
    "adamw foreach": lambda p: AdamW(p, 1e-2, foreach=True),
    "adamw fused": lambda p: AdamW(p, 1e-2, fused=True),
    "rmsprop": lambda p: RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: Adagrad(p, 1e-1),
    "nadam": lambda p: NAdam(p),
    "radam": lambda p: RAdam(p),
}


@pytest.mark.parametrize("rewinders", [[], ["lr"], ["lr", "weights"], ["reset"]], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_live_parameter_goes_on_moving(tmp_path: Path, kind: str, rewinders: list[str]) -> None:
    """The watch looks after every step: state of the parameter's shape, no parameter lost, all of them move."""
    module = ToyModule(wide_network(), lambda net: OPTIMIZERS[kind](net.parameters()))
    beside: dict[str, Any] = {
        "lr": LRRewind("3st"), "weights": WeightRewind("3st"), "reset": LRRewind("0st", optimizer_state="reset")
    }  # fmt: skip
    watch = fit(tmp_path, module, [pruner(at=["50%", "75%"]), *[beside[name] for name in rewinders]])
    assert widths(module) == [8, 8, 3]
    assert watch.steps[0] == [16, 16, 3]
    assert len(watch.events) == 2


# ------------------------------------------------------------------------ when and how


@pytest.mark.parametrize(
    ("at", "rewind", "cuts", "total"),
    [
        ("50%", None, [12], 24),
        ("1ep", None, [12], 24),
        ("5st", None, [5], 24),
        ("0st", None, [0], 24),
        (["3st", "1ep", "75%"], None, [3, 12, 18], 24),
        ("100%", "0st", [24], 48),
        ("100%", "3st", [24], 24 + 21),
        ("50%", "0st", [12], 12 + 24),
        (["50%", "100%"], "1ep", [], None),
        (["5st", "18st"], "3st", [5, 5 + 15], 5 + 15 + 21),
    ],
)
def test_cuts_come_when_asked_for(tmp_path: Path, at: Any, rewind: str | None, cuts: list[int], total: Any) -> None:
    if total is None:  # the cut would come where the round begins
        with pytest.raises(Exception, match=r"at=50% does not lie after the rewinding point, 1ep"):
            fit(tmp_path, ToyModule(wide_network()), [pruner(at=at), LRRewind(rewind)])
        return
    watch = fit(tmp_path, ToyModule(wide_network()), [pruner(at=at), *([LRRewind(rewind)] if rewind else [])])
    assert [event.step for event in watch.events] == cuts
    assert len(watch.steps) == total
    narrow = [step for step, found in enumerate(watch.steps) if found != [16, 16, 3]]
    assert narrow[0] == cuts[0]
    assert watch.trainer.fit_loop.max_epochs == 2  # the trainer has its own limit back


def per_step(net: nn.Module) -> Any:
    optimizer = sgd(net)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": lrs.OneCycleLR(optimizer, 0.1, 24), "interval": "step"},
    }


def test_the_schedule_goes_on_or_begins_again(tmp_path: Path) -> None:
    def rates(*callbacks: Any) -> list[float]:
        return fit(tmp_path, ToyModule(wide_network(), per_step), list(callbacks), moving=False).rates

    plain = rates()
    assert rates(pruner(at="7st")) == plain
    again = rates(pruner(at="7st"), LRRewind("2st"))
    assert again == plain[:7] + plain[2:]


def test_passes_reach_their_budgets_from_below(tmp_path: Path) -> None:
    module = ToyModule(wide_network())
    budgets = [Budget(params=0.8), Budget(params=0.55), Budget(params=0.3)]
    watch = fit(tmp_path, module, [pruner(budget=budgets, at=["25%", "50%", "75%"])])
    total = sum(p.numel() for p in wide_network().parameters())
    for event, budget in zip(watch.events, budgets, strict=True):
        now, dense = event.costs["params"]
        assert dense == total
        assert budget.fraction * total - 16 - 16 - 4 < now <= budget.fraction * total
    assert sum(p.numel() for p in module.parameters()) == watch.events[-1].costs["params"][0]
    halves = fit(tmp_path, ToyModule(wide_network()), [pruner(budget=Budget(channels=0.25), at=["25%", "50%"])])
    assert [event.costs["channels"] for event in halves.events] == [(16, 32), (8, 32)]
    assert [event.removed for event in halves.events] == [16, 8]


def test_the_record_holds_what_every_pass_kept(tmp_path: Path) -> None:
    prune = pruner(budget=Budget(macs=0.5), at=["1ep", "2ep"], monitor="val_acc")
    module = ToyModule(wide_network())
    fit(tmp_path, module, [prune], max_epochs=3)
    record = RunRecord.read(prune.folder)
    assert record.task == {"module": "ToyModule", "data": "TensorDataset"}
    assert [row.round for row in record.rounds] == [0, 1, 2]
    assert [row.unit for row in record.rounds] == ["channels"] * 3
    assert record.rounds[0].costs["macs"] == (2 * (12 * 16 + 16 * 16 + 16 * 3),) * 2
    last = record.rounds[-1].costs
    w = widths(module)
    assert last["macs"][0] == 2 * (12 * w[0] + w[0] * w[1] + w[1] * 3) <= 0.5 * last["macs"][1]
    assert last["params"][0] == sum(p.numel() for p in module.parameters())
    assert {kept for kept, _ in record.rounds[-1].per_layer.values()} == set(w[:2])
    assert [set(row.metrics) for row in record.rounds] == [{"val_loss", "val_acc"}] * 3
    text = (prune.folder / "rounds.csv").read_text()
    assert "macs" in text.splitlines()[0].split(",")


def test_the_table_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, ToyModule(wide_network()), [pruner(at="1ep", monitor="val_acc", verbose=True)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split() == ["round", "channels", "params", "MACs", "val_acc", "against", "dense"]
    assert lines[2].split()[:7] == ["1", "50.00", "%", "39.50", "%", "37.10", "%"]
    assert max(map(len, lines)) < 80


def test_early_stopping_brings_the_cut_forward(tmp_path: Path) -> None:
    class Stop(EarlyStopping):
        def __init__(self) -> None:
            super().__init__("val_loss", patience=1, mode="max", min_delta=100.0)

    watch = fit(tmp_path, ToyModule(wide_network()), [pruner(at="5ep"), Stop()], max_epochs=8)
    assert [event.step for event in watch.events] == [24]  # two epochs without the improvement asked for
    assert len(watch.steps) == 48  # and two more until the second round is stopped
    assert watch.steps[-1] == [8, 8, 3]


def test_a_cut_comes_between_accumulations(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 4, "moving": False}
    watch = fit(tmp_path, ToyModule(wide_network()), [pruner(at="2st")], **options)
    assert [event.step for event in watch.events] == [2]
    assert [found[0] for found in watch.steps] == [16] * 8 + [8] * 4


def test_a_budget_that_is_met_already_says_so(tmp_path: Path) -> None:
    with pytest.warns(NoEffectWarning, match=r"the cut before round 1 removes nothing"):
        watch = fit(tmp_path, ToyModule(wide_network()), [pruner(budget=Budget(channels=1.0))])
    assert watch.steps[-1] == [16, 16, 3]


def test_fast_dev_run_tries_every_cut(tmp_path: Path) -> None:
    module = ToyModule(wide_network(), per_step)
    callbacks = [pruner("taylor", at=["30%", "60%"])]
    trainer(tmp_path, callbacks, fast_dev_run=True).fit(module, *loaders())
    assert widths(module) == [8, 8, 3]


# ---------------------------------------------------------------------- what is chosen


class Chosen(pl.Callback):
    """Notes gradients and weights as an independent callback sees them, and the plan."""

    def __init__(self) -> None:
        self.effects: list[Tensor] = []
        self.kept: list[int] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        bn = pl_module.network[1]
        if len(bn.weight) == 16:
            self.effects.append((bn.weight * bn.weight.grad + bn.bias * bn.bias.grad).detach().double() ** 2)

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
        self.kept = event.plan.keep["0.weight"][0]


@pytest.mark.parametrize(("at", "steps", "window"), [("7st", 3, 3), ("1ep", 100, 12), ("15st", 4, 4)])
def test_taylor_averages_over_the_last_steps(tmp_path: Path, at: str, steps: int, window: int) -> None:
    chosen = Chosen()
    fit(tmp_path, ToyModule(toy_network()), [pruner("taylor", at=at, taylor_steps=steps), chosen])
    scores = torch.stack(chosen.effects[-window:]).mean(0)
    assert chosen.kept == sorted(scores.argsort(descending=True)[:8].tolist())
    whole = torch.stack(chosen.effects).mean(0).argsort(descending=True)[:8]
    assert window in (12, len(chosen.effects)) or chosen.kept != sorted(whole.tolist())


def test_taylor_with_early_stopping_takes_the_epoch_that_ends(tmp_path: Path) -> None:
    chosen = Chosen()
    stop = EarlyStopping("val_loss", patience=1, mode="max", min_delta=100.0)
    fit(tmp_path, ToyModule(toy_network()), [pruner("taylor", at="5ep", taylor_steps=2), stop, chosen], max_epochs=8)
    assert len(chosen.effects) == 24
    scores = torch.stack(chosen.effects[-12:]).mean(0)
    assert chosen.kept == sorted(scores.argsort(descending=True)[:8].tolist())


def test_random_is_random_by_its_seed(tmp_path: Path) -> None:
    kept = []
    for seed in (0, 0, 1):
        chosen = Chosen()
        fit(tmp_path, ToyModule(toy_network()), [pruner("random", seed=seed), chosen])
        kept.append(chosen.kept)
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "bn_scale", "fpgm", "random"])
def test_every_criterion_cuts_a_residual_network(tmp_path: Path, criterion: str, scope: str) -> None:
    class Images(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Residual()
            self.example_input_array = torch.zeros(3, 1, 6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return Adam(self.parameters(), 1e-2)

    module = Images()
    watch = fit(tmp_path, module, [pruner(criterion, scope=scope, reduction="max")], images()[:1])
    net, (event,) = module.net, watch.events
    assert len(net.stem.weight) == len(net.b.weight) == len(net.bn_b.weight) == net.head.in_features
    assert len(net.stem.weight) + len(net.a.weight) == 8
    assert scope == "global" or len(net.a.weight) == 4
    assert event.module == ""
    assert event.costs["macs"][1] == 3 * (36 * 9 * 8 + 2 * 36 * 9 * 64 + 8 * 3)  # at the module's own example


def test_what_is_excluded_or_has_no_scale_stays(tmp_path: Path) -> None:
    module = ToyModule(wide_network())
    prune = pruner(exclude=["network.4"], module="network")
    fit(tmp_path, module, [prune])
    assert widths(module) == [8, 16, 3]
    why = {(axis["name"], axis["size"]): axis["reason"] for axis in RunRecord.read(prune.folder).frozen}
    assert why["4.weight", 16] == "excluded by 'network.4'"
    assert any("output" in reason for (name, _), reason in why.items() if name == "7.weight")
    norm = ToyModule(wide_network())
    fit(tmp_path, norm, [pruner(exclude=["1"])])  # a BatchNorm's channels are those of the layer before it
    assert widths(norm) == [16, 8, 3]
    net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    scaled = ToyModule(net)
    fit(tmp_path, scaled, [pruner("bn_scale")])
    assert widths(scaled) == [4, 8, 3]


def test_a_function_scores(tmp_path: Path) -> None:
    def last(group: Any, model: nn.Module) -> Tensor:
        return torch.arange(group.size).double()

    chosen = Chosen()
    fit(tmp_path, ToyModule(toy_network()), [pruner(last), chosen])
    assert chosen.kept == list(range(8, 16))


# ------------------------------------------------------------------------ what goes along


def test_surviving_channels_get_their_early_weights_back(tmp_path: Path) -> None:
    module = ToyModule(toy_network(5))
    kept: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
            kept.update({n: t.detach().clone() for n, t in pl_module.network.state_dict().items()})
            kept["rows"] = event.plan.keep["0.weight"][0]
            kept["state"] = dict(trainer.optimizers[0].state)

    fit(tmp_path, module, [pruner(at="100%"), WeightRewind("0st"), LRRewind("0st"), Look()])
    first = toy_network(5).state_dict()
    rows = kept["rows"]
    assert len(rows) == 8
    assert torch.equal(kept["0.weight"], first["0.weight"][rows])
    assert torch.equal(kept["4.weight"], first["4.weight"][:, rows])
    assert torch.equal(kept["1.running_var"], first["1.running_var"][rows])
    assert not kept["state"]


def test_new_weights_for_the_compact_network(tmp_path: Path) -> None:
    """The control that trains the same compact network from scratch."""
    module = ToyModule(toy_network())
    watch = fit(tmp_path, module, [pruner(at="100%"), WeightRewind(reinit=True), LRRewind("0st")])
    assert widths(module) == [8, 3]
    assert len(watch.steps) == 48


def test_a_file_of_every_pass_holds_where_its_round_began(tmp_path: Path) -> None:
    begun: list[dict[str, Tensor]] = []

    class Look(pl.Callback):
        def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
            begun.append({n: t.detach().clone() for n, t in pl_module.network.state_dict().items()})

    prune = pruner(at=["1ep", "2ep"])
    module = ToyModule(wide_network())
    fit(tmp_path, module, [prune, LRRewind("0st"), TicketWriter(), Look()], max_epochs=3)
    files = sorted((prune.folder / "tickets").glob("*.safetensors"))
    assert len(files) == 2
    for path, state in zip(files, begun, strict=True):
        loaded = load_compact(wide_network(), path).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert RunRecord.read(prune.folder).rounds[1].ticket == "tickets/round-01.safetensors"
    last = load_compact(wide_network(), prune.folder / "compact.safetensors").state_dict()
    assert all(torch.equal(last[name], value) for name, value in module.network.state_dict().items())


@pytest.mark.parametrize("kind", [EMAWeightAveraging, WeightAveraging])
@pytest.mark.parametrize("rewound", [False, True])
def test_averages_shrink_along(tmp_path: Path, kind: Any, rewound: bool) -> None:
    average = kind()
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if widths(pl_module) == [16, 3]:
                seen["before"] = {n: p.detach().clone() for n, p in average._average_model.module.named_parameters()}

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if widths(pl_module) == [8, 3] and "after" not in seen:
                seen["after"] = {n: p.detach().clone() for n, p in average._average_model.module.named_parameters()}
                seen["live"] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
                seen["count"] = int(average._average_model.n_averaged)

        def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
            seen["rows"] = event.plan.keep["0.weight"][0]

    module = ToyModule(toy_network())
    rewinders = [WeightRewind("0st"), LRRewind("0st")] if rewound else []
    fit(tmp_path, module, [pruner(at="1ep"), *rewinders, average, Look()])
    expected = seen["live"]["network.0.weight"] if rewound else seen["before"]["network.0.weight"][seen["rows"]]
    assert torch.equal(seen["after"]["network.0.weight"], expected)
    assert seen["count"] == (0 if rewound else 12)  # an average of weights that were set back begins anew
    assert not torch.equal(seen["before"]["network.0.weight"][seen["rows"]], seen["live"]["network.0.weight"])
    assert widths(module) == [8, 3]


def inside(net: nn.Sequential) -> pl.LightningModule:
    return ToyModule(torch.compile(net, backend="eager"))


def in_place(net: nn.Sequential) -> pl.LightningModule:
    net.compile(backend="eager")
    return ToyModule(net)


def whole(net: nn.Sequential) -> Any:
    return torch.compile(ToyModule(net), backend="eager")


@pytest.mark.parametrize("build", [inside, in_place, whole])
def test_compiled_code_goes_on(tmp_path: Path, build: Any) -> None:
    """The same weights as without compilation, file included."""
    plain, net = ToyModule(wide_network()), wide_network()
    fit(tmp_path, plain, [pruner(at=["7st", "1ep"])])
    prune = pruner(at=["7st", "1ep"])
    fit(tmp_path, build(net), [prune])
    assert widths(net) == [8, 8, 3]
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    load_compact(wide_network(), prune.folder / "compact.safetensors")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path: Path, precision: str) -> None:
    module = ToyModule(wide_network())
    fit(tmp_path, module, [pruner("taylor", at="7st", taylor_steps=3)], precision=precision, moving=False)
    assert widths(module) == [8, 8, 3]
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {p.dtype for p in module.parameters()} == {dtype}


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_scaler(tmp_path: Path, fused: bool) -> None:
    module = ToyModule(wide_network(), lambda net: AdamW(net.parameters(), 1e-2, fused=fused))
    fit(tmp_path, module, [pruner("taylor", at="7st")], precision="16-mixed", accelerator="gpu", devices=1)
    assert widths(module) == [8, 8, 3]


class Gan(pl.LightningModule):
    """Two networks, two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(4, 12), wide_network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, _ = batch
        for i, optimizer in enumerate(self.optimizers()):
            logits = self.critic(self.generator(torch.randn(len(x), 4)))[:, 0]
            loss = F.softplus(-logits).mean() if i == 0 else F.softplus(logits).mean() - self.critic(x)[:, 0].mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SGD(self.generator.parameters(), 0.1), Adam(self.critic.parameters(), 1e-2)]


@pytest.mark.parametrize("criterion", ["l2", "taylor"])
def test_one_of_two_networks_under_manual_optimisation(tmp_path: Path, criterion: str) -> None:
    module = Gan()
    run = trainer(tmp_path, [pruner(criterion, at="1ep", module="critic")], max_epochs=2, limit_val_batches=0)
    run.fit(module, loaders()[0])
    assert widths(module) == [12, 8, 8, 3]
    assert run.global_step == 48


class Augmented(torch.utils.data.Dataset):
    """Samples that draw from the global generator."""

    def __init__(self) -> None:
        self.data = loaders()[0].dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        return x + torch.randn(12), y


class Words(pl.LightningModule):
    """Batches are dictionaries; forward asks for some of their entries by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        x = torch.relu(self.hidden(self.embed(tokens))) * mask[..., None]
        return self.head(x.mean(1)) * scale

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["tokens"], batch["mask"]), batch["label"])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.1)


def test_batches_that_are_dictionaries(tmp_path: Path) -> None:
    rows = [{"tokens": torch.randint(0, 20, (5,)), "mask": torch.ones(5), "label": i % 2} for i in range(16)]
    module = Words()
    run = trainer(tmp_path, [pruner()], max_epochs=2)
    run.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    assert (module.hidden.in_features, module.hidden.out_features) == (4, 3)


def test_generators_are_not_disturbed(tmp_path: Path) -> None:
    """A cut that removes nothing leaves the run as it would have been: shuffling and dropout draw the same numbers."""

    def run(callbacks: list[Any]) -> list[Tensor]:
        torch.manual_seed(7)
        module = ToyModule(wide_network(dropout=0.5))
        data = torch.utils.data.DataLoader(Augmented(), 8, shuffle=True)
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, data, loaders()[1])
        return [p.detach() for p in module.parameters()]

    with pytest.warns(NoEffectWarning):
        pruned = run([pruner(budget=Budget(channels=1.0), at=["3st", "1ep"])])
    assert all(torch.equal(a, b) for a, b in zip(pruned, run([]), strict=True))


@pytest.mark.parametrize("at", ["1ep", "7st"])
def test_what_a_cut_itself_cost(tmp_path: Path, at: str) -> None:
    """Validated right after it: what the compact network gives then, and nothing else is any different for it."""
    states: list[dict[str, Tensor]] = []
    metrics: list[dict[str, float]] = []

    class Keep(pl.Callback):
        validations = 0

        def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
            states.append({n: t.detach().clone() for n, t in pl_module.network.state_dict().items()})

        def on_validation_end(self, *_: Any) -> None:
            Keep.validations += 1

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def run(measured: bool) -> tuple[RunRecord, list[Tensor]]:
        torch.manual_seed(7)
        prune = pruner(at=at, validate_cuts=measured, monitor="val_loss", mode="min")
        module = ToyModule(wide_network(dropout=0.3))
        run = trainer(
            tmp_path, [prune, Keep(), EarlyStopping("val_loss", patience=9)], max_epochs=3, val_check_interval=4
        )
        train, _ = loaders(shuffle=True)
        run.fit(module, train, loaders()[1])
        return RunRecord.read(prune.folder), [p.detach() for p in module.parameters()]

    plain, weights = run(False)
    heard = Keep.validations
    record, same = run(True)
    assert Keep.validations == 2 * heard
    assert metrics[: len(metrics) // 2] == metrics[len(metrics) // 2 :]
    assert metrics[-1]
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert [row.metrics for row in record.rounds] == [row.metrics for row in plain.rounds]
    assert [row.best for row in record.rounds] == [row.best for row in plain.rounds]
    assert plain.rounds[1].start_metrics == {}
    narrow = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8),
                           nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()  # fmt: skip
    narrow.load_state_dict(states[-1])
    x, y = (torch.stack([sample[i] for sample in loaders()[1].dataset]) for i in range(2))
    with torch.no_grad():
        expected = {"val_loss": F.cross_entropy(narrow(x), y), "val_acc": (narrow(x).argmax(1) == y).float().mean()}
    assert record.rounds[1].start_metrics == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)
    assert record.rounds[1].start_metrics != record.rounds[1].metrics
    assert "start/val_acc" in (tmp_path / "run" / "version_1" / "rounds.csv").read_text().splitlines()[0]
