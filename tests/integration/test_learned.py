"""LearnedSupermask in fits: any module, plain before and after, resumed bit for bit, with a ticket that IMP takes."""

import csv
import io
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from lightning_prune import (
    ConfigError,
    IterativeMagnitudePruner,
    LearnedSupermask,
    MaskSet,
    PruneError,
    ResumeError,
    accelerate,
    load_ticket,
)
from lightning_prune.cli import main
from lightning_prune.record import RunRecord
from lightning_prune.reports.wandb_content import summary_of
from lightning_prune.resume import AtomicCheckpointIO
from tests._helpers.models import ToyModule, loaders, toy_data, toy_network, trainer

POPUP: dict[str, Any] = {"method": "edge_popup", "density": 0.4, "init": "kaiming_constant", "scale_fan": True}
STOCHASTIC: dict[str, Any] = {"method": "stochastic", "density": None, "rescale": True, "init": "signed_constant"}
HELD: dict[str, Any] = {"method": "stochastic", "density": 0.3, "samples": 2}
METHODS = pytest.mark.parametrize("options", [POPUP, STOCHASTIC, HELD], ids=["edge_popup", "stochastic", "held"])


def steep(module: nn.Module) -> Optimizer:
    return SGD(module.parameters(), lr=5.0, momentum=0.9, weight_decay=1e-3)


class SaveEverywhere(Checkpoint):
    """Writes a checkpoint in the middle of an epoch, after validation and at an epoch's end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 15:
            trainer.save_checkpoint(self.folder / "batch.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 24:
            trainer.save_checkpoint(self.folder / "validation.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 12:
            trainer.save_checkpoint(self.folder / "epoch.ckpt")


class Seen(Callback):
    """The masks and weights that training computed with, and the frozen weights, batch by batch."""

    def __init__(self) -> None:
        self.masks: list[str] = []
        self.frozen: list[Tensor] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        layer = pl_module.network[0]
        self.masks.append(MaskSet({"": layer.weight.detach() != 0}).digest())
        self.frozen.append(layer._parameters["weight"].detach().clone())


def fit(folder: Path, callbacks: list[Any], seed: int = 0, ckpt_path: Any = None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    module = ToyModule(toy_network(0, dropout=0.2), configure=options.pop("configure", steep))
    fitted = trainer(folder, callbacks, **({"max_epochs": 3} | options))
    fitted.fit(module, *loaders(shuffle=True), ckpt_path=ckpt_path)
    return fitted, module


@METHODS
def test_a_fit_trains_masks_and_leaves_a_plain_module(options: dict[str, Any], tmp_path: Path) -> None:
    first = toy_network(0)
    learn, seen = LearnedSupermask(**options), Seen()
    fitted, module = fit(tmp_path, [learn, seen])
    assert len(seen.frozen) == 36
    assert all(torch.equal(frozen, seen.frozen[0]) for frozen in seen.frozen)
    assert len(set(seen.masks)) > (20 if options["method"] == "stochastic" else 3)

    ticket = load_ticket(Path(fitted.log_dir) / "supermask.safetensors")
    assert ticket.masks == learn.masks
    assert list(module.state_dict()) == list(ToyModule(first).state_dict())
    assert all(type(layer).__module__.startswith("torch.nn") for layer in module.network.modules())
    assert all(p.requires_grad for p in module.parameters())
    plain = ToyModule(toy_network(7))
    ticket.apply_(plain)
    for (name, expected), found in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
    for name, mask in ticket.masks.items():
        weight = module.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        if options["density"] is not None:
            assert int(mask.sum()) == round(options["density"] * mask.numel())
    assert module.network[1].weight.tolist() == [1.0] * 16
    assert torch.equal(module.network[0].bias, first[0].bias)
    assert fitted.callback_metrics["prune/density"].item() == pytest.approx(learn.masks.density)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tested = fitted.test(module, loaders()[1], verbose=False)[0]["test_acc"]
    if not options.get("samples"):
        assert tested == pytest.approx(fitted.callback_metrics["test_acc"].item())
        x, y = toy_data(32, seed=1).tensors
        with torch.no_grad():
            assert tested == pytest.approx((module.network.eval()(x).argmax(1) == y).float().mean().item())


def test_it_learns(tmp_path: Path) -> None:
    """The untrained weights under the mask tell the training data's classes."""
    x, y = toy_data().tensors
    for options in (POPUP, STOCHASTIC):
        torch.manual_seed(0)
        module = ToyModule(nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 3)), configure=adam)
        before = (module.network(x).argmax(1) == y).float().mean()
        trainer(tmp_path, [LearnedSupermask(**options)], max_epochs=10).fit(module, *loaders())
        after = (module.network(x).argmax(1) == y).float().mean()
        assert after > max(0.8, before + 0.2)


def adam(module: nn.Module) -> Optimizer:
    return torch.optim.Adam(module.parameters(), 0.05)


@METHODS
@pytest.mark.parametrize("place", ["epoch", "batch", "validation"])
def test_resumed_equals_uninterrupted(options: dict[str, Any], place: str, tmp_path: Path) -> None:
    whole, seen = LearnedSupermask(**options), Seen()
    _, expected = fit(tmp_path / "whole", [whole, seen, SaveEverywhere(tmp_path)], enable_checkpointing=True)
    resumed, again = LearnedSupermask(**options), Seen()
    _, found = fit(tmp_path / "resumed", [resumed, again], seed=9, ckpt_path=tmp_path / f"{place}.ckpt")
    assert seen.masks[-len(again.masks) :] == again.masks
    assert len(again.masks) == 36 - {"epoch": 12, "batch": 15, "validation": 24}[place]
    assert resumed.masks == whole.masks
    for (name, one), other in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert len(resumed.record.rounds) == 1
    assert RunRecord.read(resumed.folder).comparable() == RunRecord.read(whole.folder).comparable()
    saved = torch.load(tmp_path / f"{place}.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(expected.state_dict())
    assert not torch.equal(saved["state_dict"]["network.0.weight"], expected.state_dict()["network.0.weight"])
    plain = ToyModule(toy_network(3))
    plain.load_state_dict(saved["state_dict"])  # loads without the callback, as the network under its mask
    assert (plain.network[0].weight == 0).float().mean() > 0.2


class Mean(Callback):
    """The accuracy of each sampled network on all validation data, by hand."""

    def __init__(self, learn: LearnedSupermask) -> None:
        self.learn, self.mean = learn, 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        x, y = toy_data(32, seed=1).tensors
        found = []
        pl_module.eval()
        for number in range(4):
            self.learn._learner.sample = number
            with torch.no_grad():
                found.append((pl_module.network(x).argmax(1) == y).float().mean().item())
        self.learn._learner.sample = None
        pl_module.train()
        self.mean = sum(found) / 4
        assert len(set(found)) > 1


def test_samples_give_the_mean_over_sampled_networks(tmp_path: Path) -> None:
    learn = LearnedSupermask("stochastic", None, samples=4)
    mean = Mean(learn)
    fitted, _ = fit(tmp_path, [learn, mean], max_epochs=1)
    assert fitted.callback_metrics["val_acc"].item() == pytest.approx(mean.mean)


class Manual(ToyModule):
    """Two optimizers over named weights, stepped by hand, one closure, gradient accumulation of its own."""

    def __init__(self) -> None:
        super().__init__(toy_network(0))
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.network(x), y))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = SGD([{"params": [self.network[0].weight], "lr": 3.0}, {"params": [self.network[0].bias]}], lr=0.1)
        return [first, torch.optim.AdamW([p for n, p in self.network.named_parameters() if n.startswith("4")], 0.1)], []


@pytest.mark.parametrize("options", [POPUP, HELD], ids=["edge_popup", "held"])
def test_optimizers_of_any_kind(options: dict[str, Any], tmp_path: Path) -> None:
    module, learn = Manual(), LearnedSupermask(**options)
    first = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer(tmp_path / "a", [learn], max_epochs=2).fit(module, *loaders())
    masks = learn.masks
    untrained = ToyModule(toy_network(0))
    again = LearnedSupermask(**options)
    trainer(tmp_path / "b", [again], max_epochs=2, limit_train_batches=0).fit(untrained, *loaders())
    for name in masks:
        assert not torch.equal(masks[name], again.masks[name])
    assert torch.equal(module.network[0].bias, first["network.0.bias"])


def test_bf16_accumulation_and_clipping(tmp_path: Path) -> None:
    learn, seen = LearnedSupermask(**STOCHASTIC), Seen()
    extra = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    fit(tmp_path, [learn, seen], **extra)
    assert learn.masks is not None
    assert all(torch.equal(frozen, seen.frozen[0]) for frozen in seen.frozen)


def test_the_ticket_feeds_iterative_pruning(tmp_path: Path) -> None:
    learn = LearnedSupermask(**POPUP, dirpath=tmp_path)
    fit(tmp_path / "a", [learn])
    prune = IterativeMagnitudePruner(rounds=1, masks_from=tmp_path / "supermask.safetensors", verbose=False)
    fit(tmp_path / "b", [prune], max_epochs=1)
    assert prune.masks == learn.masks
    with pytest.raises(ConfigError, match=r"masks_from=.* is one ticket, for one cut"):
        IterativeMagnitudePruner(rounds=2, masks_from=tmp_path / "supermask.safetensors")


@pytest.mark.parametrize("options", [POPUP, HELD], ids=["edge_popup", "held"])
def test_the_result_is_in_a_record(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn = LearnedSupermask(**options, monitor="val_acc")
    fitted, _ = fit(tmp_path / "a", [learn], max_epochs=2)
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    record = RunRecord.read(fitted.log_dir)
    (row,) = record.rounds
    assert (row.kept, row.total, row.digest) == (learn.masks.kept, learn.masks.total, learn.masks.digest())
    assert row.per_layer == {name: (int(m.sum()), m.numel()) for name, m in learn.masks.items()}
    assert (row.step, row.steps, row.ticket) == (24, 24, "supermask.safetensors")
    assert row.metrics["val_acc"] == fitted.callback_metrics["val_acc"].item()
    assert row.best["value"] >= row.metrics["val_acc"]
    assert record.method["LearnedSupermask"]["samples"] == options.get("samples", 0)
    assert (Path(fitted.log_dir) / "rounds.csv").read_text().count("\n") == 2
    assert "dense" not in summary_of(record)

    longer = LearnedSupermask(**options, monitor="val_acc")  # goes on from a fit that had ended
    fit(tmp_path / "b", [longer], ckpt_path=tmp_path / "after.ckpt")
    assert [row.step for row in RunRecord.read(longer.folder).rounds] == [36]
    capsys.readouterr()
    main(["compare", str(learn.folder), str(longer.folder)])
    assert capsys.readouterr().out.count("val_acc") == 1
    main(["report", str(learn.folder), "--format", "csv"])
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert line["method"].startswith("LearnedSupermask")
    assert float(line["sparsity, %"]) == pytest.approx(100 * row.sparsity)
    assert float(line["val_acc"]) == row.metrics["val_acc"]
    (learn.folder / "supermask.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"record\.json is the record of an earlier run"):
        fit(tmp_path / "c", [LearnedSupermask(**options, dirpath=learn.folder)])


@pytest.mark.parametrize("options", [POPUP, STOCHASTIC], ids=["edge_popup", "rescaled"])
def test_the_result_is_accelerated(options: dict[str, Any], tmp_path: Path) -> None:
    """Masks and plain network, as they come out of the fit, compute the same when their layers are made fast."""
    layers = [nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 3)]
    module = ToyModule(nn.Sequential(*layers), configure=steep)
    learn = LearnedSupermask(**options | ({"density": 0.05} if options is POPUP else {}))
    trainer(tmp_path, [learn], max_epochs=1).fit(module, *loaders())
    x = toy_data(32, seed=1).tensors[0]
    network = module.network.eval()
    masks = MaskSet({name.removeprefix("network."): mask for name, mask in learn.masks.items()})
    fast = accelerate(network, masks, x, seconds=0.01)
    expected = network(x).detach()
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert expected.std() > 0
    if options is POPUP:
        assert fast.plan is not None  # most of the first layer's neurons have no input left


def test_an_error_in_the_fit_leaves_a_plain_module(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ValueError("stop")

    torch.manual_seed(0)
    module = ToyModule(toy_network(0))
    with pytest.raises(ValueError, match="stop"):
        trainer(tmp_path, [LearnedSupermask(samples=2, method="stochastic"), Fails()], max_epochs=1).fit(
            module, *loaders()
        )
    assert type(module.network[0]) is nn.Linear
    assert "validation_step" not in module.__dict__
    assert "network.0.weight_scores" not in dict(module.named_parameters())
    assert all(p.requires_grad for p in module.parameters())


def test_a_layer_that_samples_nothing(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match="a layer of 192 weights sampled none"):
        fit(tmp_path, [LearnedSupermask("stochastic", None, start=1e-9)])


def test_bad_company(tmp_path: Path) -> None:
    learn = LearnedSupermask
    with pytest.raises(ConfigError, match="IterativeMagnitudePruner cuts weights that LearnedSupermask keeps frozen"):
        fit(tmp_path / "a", [learn(), IterativeMagnitudePruner(rounds=1, verbose=False)])
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's own
        fit(tmp_path / "b", [learn(), learn()])
    with pytest.raises(ConfigError, match="averaging callback"):
        fit(tmp_path / "c", [learn(), EMAWeightAveraging()])
    with pytest.raises(ConfigError, match=r"no optimizer steps 'network\.0\.weight'"):
        fit(tmp_path / "d", [learn()], configure=lambda net: SGD(net[4].parameters(), 0.1))
    fit(tmp_path / "e", [SaveEverywhere(tmp_path)], enable_checkpointing=True, max_epochs=1)
    with pytest.raises(ResumeError, match="written without LearnedSupermask"):
        fit(tmp_path / "f", [learn()], ckpt_path=tmp_path / "epoch.ckpt")
    fit(tmp_path / "g", [learn(density=0.5), SaveEverywhere(tmp_path)], enable_checkpointing=True, max_epochs=1)
    with pytest.raises(ResumeError, match=r"written with density=0\.5, this run has density=0\.4"):
        fit(tmp_path / "h", [learn(density=0.4)], ckpt_path=tmp_path / "epoch.ckpt")


def test_a_run_does_not_write_over_another(tmp_path: Path) -> None:
    """Nor leaves half a checkpoint: these are written as a pruner's are."""

    class Written(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)

    learn = LearnedSupermask(**POPUP, dirpath=tmp_path / "ticket")
    saver = SaveEverywhere(tmp_path)
    fitted, _ = fit(tmp_path / "a", [learn, Written(), saver], enable_checkpointing=True, max_epochs=1)
    assert type(fitted.strategy.checkpoint_io) is TorchCheckpointIO
    with pytest.raises(ConfigError, match=r"holds supermask\.safetensors of an earlier run"):
        fit(tmp_path / "b", [learn], max_epochs=1)
    fit(tmp_path / "c", [learn], max_epochs=1, ckpt_path=tmp_path / "epoch.ckpt")


@pytest.mark.parametrize("missing", ["hyper_parameters", "learner", "resume", "learner.scores"])
def test_a_damaged_state_says_so(missing: str, tmp_path: Path) -> None:
    fit(tmp_path / "a", [LearnedSupermask(), SaveEverywhere(tmp_path)], enable_checkpointing=True, max_epochs=1)
    saved = torch.load(tmp_path / "epoch.ckpt", weights_only=True)
    state = saved["callbacks"][LearnedSupermask().state_key]
    *path, last = missing.split(".")
    for key in path:
        state = state[key]
    del state[last]
    torch.save(saved, tmp_path / "less.ckpt")
    with pytest.raises(ResumeError, match="checkpoint's state of LearnedSupermask is damaged"):
        fit(tmp_path / "b", [LearnedSupermask()], ckpt_path=tmp_path / "less.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 3}, "edge_popup has one mask"),
        ({"method": "stochastic", "samples": -1}, "samples=-1"),
        ({"exclude": "fc"}, r"write exclude=\['fc'\]"),
        ({"density": 0.0}, "density=0.0"),
        ({"method": "bernoulli"}, "method='bernoulli' is unknown"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LearnedSupermask(**options)
