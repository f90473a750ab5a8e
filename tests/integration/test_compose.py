"""The pruner beside what people use: each composition trains, stays sparse, and does what it does without pruning."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim import lr_scheduler as lrs

from lightning_prune import (
    ConfigError,
    IterativeMagnitudePruner,
    LRRewind,
    RunRecord,
    TicketWriter,
    WeightRewind,
    load_ticket,
)
from lightning_prune.prunable import canonical_name
from tests._helpers.models import ToyModule, loaders, toy_network, trainer

KEPT = round(0.7 * round(0.7 * 240))  # of 12x16 + 16x3 weights after two cuts of 0.3


def pruner(**options: Any) -> IterativeMagnitudePruner:
    return IterativeMagnitudePruner(**({"fraction": 0.3, "rounds": 2, "verbose": False} | options))


def nonzero(module: nn.Module) -> int:
    return sum(int((p != 0).sum()) for p in module.parameters() if p.ndim == 2)


class Watch(pl.Callback):
    """Pruned weights are 0 after every step, and others move."""

    def __init__(self, pruner: IterativeMagnitudePruner) -> None:
        self.pruner, self.steps, self.checked = pruner, 0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps += 1
        for name, mask in (self.pruner.masks or {}).items():
            weight = {canonical_name(n): p for n, p in pl_module.named_parameters()}[name]
            assert not weight[~mask].any(), f"{name} moved at step {self.steps}"
            self.checked += int((~mask).sum())


def check_fit(tmp_path: Path, module: pl.LightningModule, extra: list[Any], data: Any = None, **options: Any) -> Watch:
    """Fit, and see after every step that pruned weights are 0."""
    prune = next((c for c in extra if isinstance(c, IterativeMagnitudePruner)), None) or pruner()
    watch = Watch(prune)
    callbacks = [c for c in extra if c is not prune]
    run = trainer(tmp_path, [prune, *callbacks, watch], **({"max_epochs": 2} | options))
    run.fit(module, *(data or loaders()))
    assert watch.checked > 0
    return watch


@pytest.mark.parametrize(
    "build",
    [
        lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
        lambda p: Adam(p, 1e-2, amsgrad=True, weight_decay=1e-2),
        lambda p: AdamW(p, 1e-2, foreach=False),
        lambda p: AdamW(p, 1e-2, fused=True),
        lambda p: RMSprop(p, 1e-2, momentum=0.9, centered=True),
        lambda p: Adagrad(p, 1e-1, initial_accumulator_value=0.1),
        lambda p: Adadelta(p, 1.0),
    ],
)
@pytest.mark.parametrize("rewind", [[], [LRRewind("1ep")], [WeightRewind("1ep", optimizer_state="reset")]])
def test_every_optimizer_keeps_pruned_weights_at_zero(tmp_path: Path, build: Any, rewind: list[Any]) -> None:
    module = ToyModule(configure=lambda net: build(net.parameters()))
    check_fit(tmp_path, module, list(rewind))
    assert nonzero(module.network) == KEPT


def test_lbfgs_moves_no_pruned_weight(tmp_path: Path) -> None:
    module = ToyModule(toy_network(norm=False), lambda net: LBFGS(net.parameters(), lr=0.1, max_iter=4))
    check_fit(tmp_path, module, [])
    assert nonzero(module.network) == KEPT


class Odd(Optimizer):
    """A third-party optimizer that moves every weight, also where the gradient is zero."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.full_like(p, 1e-3))
        return loss


def test_an_unknown_optimizer_is_held_too(tmp_path: Path) -> None:
    module = ToyModule(configure=lambda net: Odd(net.parameters()))
    check_fit(tmp_path, module, [])


class Noisy(ToyModule):
    """Writes to gradients after everybody else."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for p in self.parameters():
            p.grad += 0.01


def test_gradients_written_by_the_module_move_no_pruned_weight(tmp_path: Path) -> None:
    check_fit(tmp_path, Noisy(), [])


def test_pruned_entries_weigh_in_no_norm(tmp_path: Path) -> None:
    norms: list[tuple[float, float]] = []

    class Clipped(ToyModule):
        def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
            masks = prune.masks or {}
            kept = [p.grad[masks[n]] if n in masks else p.grad.flatten() for n, p in self.named_parameters()]
            alone = torch.linalg.vector_norm(torch.cat([g.flatten() for g in kept]))
            norms.append((float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)), float(alone)))

    prune = pruner()
    check_fit(tmp_path, Clipped(), [prune], gradient_clip_val=0.1)
    assert norms
    for total, alone in norms:
        assert total == pytest.approx(alone, rel=1e-6)


def test_gradient_accumulation_counts_steps(tmp_path: Path) -> None:
    module = ToyModule()
    prune = pruner()
    run = trainer(tmp_path, [prune, WeightRewind("2st"), LRRewind("2st")], max_epochs=2, accumulate_grad_batches=4)
    run.fit(module, *loaders())
    assert run.global_step == 6 + 2 * (6 - 2)
    assert nonzero(module.network) == KEPT


def test_bf16(tmp_path: Path) -> None:
    module = ToyModule()
    check_fit(tmp_path, module, [WeightRewind("1ep"), LRRewind("1ep")], precision="bf16-mixed")
    assert nonzero(module.network) == KEPT
    true = ToyModule()
    check_fit(tmp_path, true, [WeightRewind("1ep"), LRRewind("1ep")], precision="bf16-true")
    assert nonzero(true.network) == KEPT


class Manual(ToyModule):
    """Manual optimisation; ``raw`` goes around Lightning's backward."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.raw, self.automatic_optimization = raw, False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss.backward() if self.raw else self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimisation(tmp_path: Path, raw: bool) -> None:
    module = Manual(raw)
    check_fit(tmp_path, module, [WeightRewind("25%"), LRRewind("25%")])
    assert nonzero(module.network) == KEPT


class Gan(pl.LightningModule):
    """Two networks, two optimizers, two schedulers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(4, 12), toy_network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, _ = batch
        for i, optimizer in enumerate(self.optimizers()):
            fake = self.generator(torch.randn(len(x), 4))
            logits = self.critic(fake)[:, 0]
            loss = (
                F.softplus(-logits).mean() if i == 0 else F.softplus(logits).mean() - self.critic(x)[:, 0].mean() * 0.01
            )
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [SGD(self.generator.parameters(), 0.1), Adam(self.critic.parameters(), 1e-2)]
        return optimizers, [lrs.StepLR(o, 5) for o in optimizers]


def test_gan_with_two_optimizers(tmp_path: Path) -> None:
    module = Gan()
    prune = pruner()
    run = trainer(tmp_path, [prune, WeightRewind("25%"), LRRewind("25%")], max_epochs=2, limit_val_batches=0)
    run.fit(module, loaders()[0])
    batches = 24 + 2 * (24 - 6)
    assert run.global_step == 2 * batches
    assert nonzero(module) == round(0.7 * round(0.7 * (240 + 48)))
    assert [o.param_groups[0]["lr"] for o in run.optimizers] == pytest.approx([1e-5, 1e-6])


class Text(pl.LightningModule):
    """Batches are dictionaries of lists of text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(256, 8), nn.Linear(8, 2)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens = torch.stack([torch.tensor(list(text.encode())) for text in batch["text"]])
        return F.cross_entropy(self.head(self.embed(tokens)), batch["label"])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.1)


def test_a_module_that_takes_dictionaries_of_text(tmp_path: Path) -> None:
    module = Text()
    data = [{"text": f"word{i}", "label": i % 2} for i in range(8)]
    run = trainer(tmp_path, [pruner()], max_epochs=2)
    run.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert int((module.head.weight != 0).sum()) == round(0.7 * round(0.7 * 16))
    assert (module.embed.weight != 0).all()


def test_compiled_module(tmp_path: Path) -> None:
    module = ToyModule(torch.compile(toy_network(), backend="eager"))
    check_fit(tmp_path, module, [WeightRewind("1ep"), LRRewind("1ep"), TicketWriter()])
    assert nonzero(module.network) == KEPT
    plain = ToyModule()
    load_ticket(tmp_path / "run" / "version_0" / "tickets" / "round-02.safetensors").apply_(plain)
    assert nonzero(plain.network) == KEPT


def test_the_best_checkpoint_is_one_per_round_and_of_the_network_before_the_cut(tmp_path: Path) -> None:
    module = ToyModule()
    best = ModelCheckpoint(monitor="val_loss", mode="min")
    run = trainer(tmp_path, [best, pruner(), WeightRewind("0st")], max_epochs=3, enable_checkpointing=True)
    run.fit(module, *loaders())
    record = RunRecord.read(tmp_path / "run" / "version_0")
    files = sorted(p.name for p in (tmp_path / "run" / "version_0" / "checkpoints").glob("*.ckpt"))
    assert [f.split("round")[1] for f in files] == ["00.ckpt", "01.ckpt", "02.ckpt"]
    for row in record.rounds:
        again = ToyModule()
        file = tmp_path / "run" / "version_0" / row.best_checkpoint
        again.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        result = trainer(tmp_path / "again", []).validate(again, loaders()[1], verbose=False)[0]
        assert result["val_loss"] == pytest.approx(row.best["value"], rel=1e-5)
        assert nonzero(again.network) == row.kept


def test_early_stopping_ends_the_round_and_not_the_fit(tmp_path: Path) -> None:
    class Flat(ToyModule):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", 1.0 if self.trainer.current_epoch else 2.0)

    for at_epoch_end in (False, True):
        folder = tmp_path / str(at_epoch_end)
        stop = EarlyStopping("val_loss", patience=2, check_on_train_epoch_end=at_epoch_end)
        run = trainer(folder, [stop, pruner(), WeightRewind("1ep"), LRRewind("1ep")], max_epochs=50)
        run.fit(Flat(), *loaders())
        rounds = RunRecord.read(folder / "run" / "version_0").rounds
        assert len(rounds) == 3
        assert [row.stopped_early for row in rounds[:2]] == [True, True]
        assert run.current_epoch < 15


def test_early_stopping_inside_an_epoch(tmp_path: Path) -> None:
    class Flat(ToyModule):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    stop = EarlyStopping("val_loss", patience=1)
    run = trainer(tmp_path, [pruner(), stop], max_epochs=50, val_check_interval=3)
    run.fit(Flat(), *loaders())
    rounds = RunRecord.read(tmp_path / "run" / "version_0").rounds
    assert [row.steps for row in rounds] == [6, 6, 6]


def test_user_minimum_holds_in_every_round(tmp_path: Path) -> None:
    class Flat(ToyModule):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    stop = EarlyStopping("val_loss", patience=1)
    run = trainer(tmp_path, [pruner(), stop], max_epochs=50, min_epochs=4)
    run.fit(Flat(), *loaders())
    rounds = RunRecord.read(tmp_path / "run" / "version_0").rounds
    assert [row.steps for row in rounds] == [48, 48, 48]


@pytest.mark.filterwarnings("ignore:.*WeightAveraging is an experimental")
def test_averaged_copies_stay_sparse(tmp_path: Path) -> None:
    module = ToyModule()
    average = EMAWeightAveraging(decay=0.9)
    seen: list[int] = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(nonzero(average._average_model))

    check_fit(tmp_path, module, [average, WeightRewind("0st"), Look()])
    assert seen == [240, 240, 168, 168, KEPT, KEPT]
    assert nonzero(module.network) == KEPT


def test_stochastic_weight_averaging_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, [pruner(), StochasticWeightAveraging(1e-2)], max_epochs=4)
    with pytest.raises(ConfigError, match="StochasticWeightAveraging changes the Trainer's length"):
        run.fit(ToyModule(), *loaders())


def test_learning_rate_monitor(tmp_path: Path) -> None:
    def configure(net: nn.Module) -> Any:
        optimizer = SGD(net.parameters(), 0.1)
        return [optimizer], [lrs.CosineAnnealingLR(optimizer, 2)]

    check_fit(tmp_path, ToyModule(configure=configure), [LearningRateMonitor(), LRRewind("0st")])
    text = (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    assert "lr-SGD" in text
    assert "prune/density" in text


def test_trainer_test_leaves_the_pruner_alone(tmp_path: Path) -> None:
    module = ToyModule()
    run = trainer(tmp_path, [pruner(), WeightRewind("0st")], max_epochs=2)
    run.fit(module, *loaders())
    before = {n: p.clone() for n, p in module.state_dict().items()}
    run.test(module, loaders()[1], verbose=False)
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())
    assert run.max_epochs == 2


SCHEDULERS = {
    "step": lambda o: lrs.StepLR(o, 2, 0.5),
    "multi_step": lambda o: lrs.MultiStepLR(o, [1, 3]),
    "constant": lambda o: lrs.ConstantLR(o, 0.5, 2),
    "linear": lambda o: lrs.LinearLR(o, 0.1, total_iters=3),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lrs.PolynomialLR(o, 4),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 4),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
    "lambda": lambda o: lrs.LambdaLR(o, lambda n: 0.9**n),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda n: 0.8),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "one_cycle": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=4),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=1), lrs.CosineAnnealingLR(o, 3)], [1]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, total_iters=2), lrs.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("to", ["0st", "1ep", "30%"])
def test_every_scheduler_repeats_its_first_round(tmp_path: Path, name: str, to: str) -> None:
    seen: list[tuple[float, float]] = []

    def configure(net: nn.Module) -> Any:
        optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
        return [optimizer], [SCHEDULERS[name](optimizer)]

    module = ToyModule(configure=configure)
    module.on_before_zero_grad = lambda o: seen.append((o.param_groups[0]["lr"], o.param_groups[0]["momentum"]))  # type: ignore[method-assign]
    run = trainer(tmp_path, [LRRewind(to), pruner()], max_epochs=4)
    run.fit(module, *loaders())
    k = {"0st": 0, "1ep": 12, "30%": 14}[to]
    assert len(set(seen)) > 1
    assert seen == seen[:48] + 2 * seen[k:48]


def test_reduce_on_plateau_repeats_at_epoch_boundaries_and_is_refused_inside(tmp_path: Path) -> None:
    class Plateau(ToyModule):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    def configure(net: nn.Module) -> Any:
        optimizer = SGD(net.parameters(), 0.1)
        scheduler = lrs.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    seen: list[float] = []
    module = Plateau(configure=configure)
    module.on_before_zero_grad = lambda o: seen.append(o.param_groups[0]["lr"])  # type: ignore[method-assign]
    run = trainer(tmp_path, [pruner(), LRRewind("1ep")], max_epochs=4)
    run.fit(module, *loaders())
    assert len(set(seen)) == 3
    assert seen == seen[:48] + 2 * seen[12:48]
    run = trainer(tmp_path, [pruner(), LRRewind("5st")], max_epochs=4)
    with pytest.raises(ConfigError, match="inside an epoch"):
        run.fit(Plateau(configure=configure), *loaders())


def test_random_reinitialisation_and_random_pruning_controls(tmp_path: Path) -> None:
    first = ToyModule()
    check_fit(tmp_path / "a", first, [WeightRewind("0st"), LRRewind("0st"), TicketWriter()])
    tickets = tmp_path / "a" / "run" / "version_0"
    prune = pruner(masks_from=tickets)
    second = ToyModule()
    check_fit(tmp_path / "b", second, [prune, WeightRewind("0st", reinit=True), LRRewind("0st"), TicketWriter()])
    ours, theirs = (
        load_ticket(t / "tickets" / "round-02.safetensors") for t in (tickets, tmp_path / "b/run/version_0")
    )
    assert ours.masks == theirs.masks
    name = "network.0.weight"
    assert not torch.equal(ours.weights[name], theirs.weights[name])
    shuffled = pruner(control="random_pruning", seed=3)
    third = ToyModule()
    check_fit(tmp_path / "c", third, [shuffled, WeightRewind("0st")])
    assert nonzero(third.network) == KEPT
    plain = pruner()
    fourth = ToyModule()
    check_fit(tmp_path / "d", fourth, [plain, WeightRewind("0st")])
    counts = [RunRecord.read(tmp_path / run / "run" / "version_0").rounds[1].per_layer for run in "cd"]
    assert counts[0] == counts[1]
    assert (shuffled.masks[name] != plain.masks[name]).any()
