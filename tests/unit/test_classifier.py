"""The classification task and its schedules: metrics, rates step by step, configuration, bad input."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, ReduceLROnPlateau, StepLR

from lightning_prune.errors import ConfigError
from lightning_prune.experiments import Cosine, Digits, Drops, ImageClassifier, OneCycle, TensorLoader

# Lightning's own use of torch
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")

LR = 0.4


class Flat(nn.Module):
    """One linear layer on flattened pixels."""

    def __init__(self, num_classes: int = 10, features: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


class Rates(Callback):
    """The rate and the momentum that each optimizer step used."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.momenta: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: SGD) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.momenta.append(optimizer.param_groups[0]["momentum"])


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(**(quiet | {"enable_model_summary": False, "max_epochs": 1} | options))


def task(**options: Any) -> ImageClassifier:
    return ImageClassifier(Flat(), optimizer=partial(SGD, lr=LR, momentum=0.9), **options)


def rates_of(model: ImageClassifier, steps_an_epoch: int = 5, **options: Any) -> Rates:
    rates = Rates()
    loader = TensorLoader(torch.rand(steps_an_epoch * 2, 1, 8, 8), torch.randint(10, (steps_an_epoch * 2,)), 2)
    trainer(callbacks=[rates], **options).fit(model, loader, loader)
    return rates


# Metrics


def test_metrics_are_means_over_all_images() -> None:
    data, model = Digits(eval_batch_size=100, watch_test=True), task(label_smoothing=0.2)
    run = trainer()
    run.fit(model, data)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    model.eval()
    with torch.no_grad():
        for name, split in (("val", data.splits.val), ("watch_test", data.splits.test)):
            logits = model(split.images)
            assert logged[f"{name}_loss"] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-5)
            accuracy = (logits.argmax(1) == split.labels).double().mean().item()
            assert logged[f"{name}_acc"] == pytest.approx(accuracy, rel=1e-6)
    assert set(logged) == {"train_loss", "val_loss", "val_acc", "watch_test_loss", "watch_test_acc"}
    tested = run.test(model, data, verbose=False)[0]
    assert tested == pytest.approx({f"test_{k}": logged[f"watch_test_{k}"] for k in ("loss", "acc")}, rel=1e-6)


def test_the_training_loss_is_smoothed_cross_entropy() -> None:
    model, batch = task(label_smoothing=0.3), (torch.rand(6, 1, 8, 8), torch.arange(6))
    model.log = lambda *_, **__: None  # type: ignore[method-assign]  # no trainer: nowhere to log
    log_probabilities = model(batch[0]).log_softmax(1)
    targets = F.one_hot(batch[1], 10) * 0.7 + 0.03
    expected = -(targets * log_probabilities).sum(1).mean()
    torch.testing.assert_close(model.training_step(batch, 0), expected)


def test_the_training_loss_is_logged_at_the_steps_that_the_trainer_logs() -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.losses: dict[int, float] = {}

        def on_train_batch_end(self, run: Trainer, module: LightningModule, out: Any, batch: Any, index: int) -> None:
            losses.append(out["loss"].item())
            self.losses[run.global_step] = run.callback_metrics["train_loss"].item()

    losses: list[float] = []
    seen = Seen()
    loader = TensorLoader(torch.rand(14, 1, 8, 8), torch.randint(10, (14,)), 2)
    trainer(callbacks=[seen], log_every_n_steps=3, max_epochs=2).fit(task(log_train_acc=True), loader, loader)
    # seven steps an epoch: each epoch's first, and every third of all
    latest = [losses[i] for i in (0, 0, 2, 2, 2, 5, 5, 7, 8, 8, 8, 11, 11, 11)]
    assert list(seen.losses.values()) == pytest.approx(latest)


def test_predict_gives_logits() -> None:
    data, model = Digits(), task()
    predicted = torch.cat(trainer().predict(model, data))
    with torch.no_grad():
        torch.testing.assert_close(predicted, model(data.splits.test.images))


# Schedules


def test_a_schedule_takes_its_length_from_the_trainer() -> None:
    found = rates_of(task(scheduler=Cosine(), interval="step"), max_epochs=4).rates
    assert found == pytest.approx([LR * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)])
    found = rates_of(task(scheduler=Cosine(final_lr=0.1)), max_epochs=4).rates
    assert found[::5] == pytest.approx([0.1 + (LR - 0.1) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])
    found = rates_of(task(scheduler=Drops([0.5, 0.75], factor=0.2), interval="step"), max_steps=12, max_epochs=-1).rates
    assert found == pytest.approx([LR] * 6 + [LR / 5] * 3 + [LR / 25] * 3)


@pytest.mark.parametrize(("options", "epochs"), [({"max_epochs": 4}, 4), ({"max_steps": 12, "max_epochs": -1}, 3)])
def test_a_schedule_in_epochs_counts_epochs(options: dict[str, int], epochs: int) -> None:
    found = rates_of(task(scheduler=Drops([0.5])), **options).rates
    drop = round(epochs * 0.5)
    assert found[::5] == pytest.approx([LR] * drop + [LR / 10] * (epochs - drop))


def test_a_schedule_counts_optimizer_steps_under_accumulation() -> None:
    found = rates_of(
        task(scheduler=Cosine(), interval="step"), steps_an_epoch=6, max_epochs=2, accumulate_grad_batches=2
    ).rates
    assert found == pytest.approx([LR * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])


def test_a_schedule_in_epochs_counts_epochs_under_accumulation() -> None:
    found = rates_of(
        task(scheduler=Drops([0.5])), steps_an_epoch=6, max_steps=12, max_epochs=-1, accumulate_grad_batches=2
    ).rates  # three steps an epoch, four epochs
    assert found == pytest.approx([LR] * 6 + [LR / 10] * 6)


def test_one_cycle_moves_momentum_the_other_way() -> None:
    found = rates_of(task(scheduler=OneCycle(max_lr=1.0, rise=0.4), interval="step"), max_epochs=4)
    assert found.rates.index(max(found.rates)) == found.momenta.index(min(found.momenta)) == 7
    assert max(found.rates) == pytest.approx(1.0)
    assert found.rates[-1] < 0.05


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, lambda epoch: 1.0),
        (partial(MultiStepLR, milestones=[1, 3]), lambda epoch: 0.1 ** ((epoch >= 1) + (epoch >= 3))),
        (partial(CosineAnnealingLR, T_max=4), lambda epoch: (1 + math.cos(math.pi * epoch / 4)) / 2),
        (Cosine(), lambda epoch: (1 + math.cos(math.pi * epoch / 4)) / 2),
    ],
)
def test_a_warm_up_multiplies_the_schedule(scheduler: Any, expected: Callable[[int], float]) -> None:
    found = rates_of(task(scheduler=scheduler, warmup_steps=7), max_epochs=4).rates
    assert found == pytest.approx([LR * min(1, (i + 1) / 8) * expected(i // 5) for i in range(20)])


@pytest.mark.parametrize(
    "scheduler", [partial(LambdaLR, lr_lambda=lambda _: 1.0), OneCycle(max_lr=1.0), Cosine(final_lr=0.01)]
)
def test_a_warm_up_beside_a_scheduler_that_would_undo_it(scheduler: Any) -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps=3 beside \w+LR: it sets the rate outright.*Drops"):
        rates_of(task(scheduler=scheduler, interval="step", warmup_steps=3))


def test_plateau_watches_the_monitored_metric() -> None:
    model = task(scheduler=partial(ReduceLROnPlateau, mode="max", patience=0, factor=0.5), monitor="val_acc")
    model.validation_step = lambda batch, batch_idx: model.log("val_acc", 0.5)  # type: ignore[method-assign,misc]
    found = rates_of(model, max_epochs=4).rates
    assert found[::5] == pytest.approx([LR, LR, LR / 2, LR / 4])


def test_a_schedule_in_epochs_needs_epochs_of_known_length() -> None:
    class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))] * 20)

    model, data = task(scheduler=Cosine()), torch.utils.data.DataLoader(Endless(), batch_size=None)
    with pytest.raises(ConfigError, match=r"epochs of unknown length.*interval='step'"):
        trainer(max_steps=3, max_epochs=-1, limit_val_batches=1).fit(model, data, data)


def test_a_schedule_needs_a_length() -> None:
    with pytest.raises(ConfigError, match="Cosine takes its length from the Trainer, which has none"):
        rates_of(task(scheduler=Cosine()), max_epochs=-1, max_time={"seconds": 5})


# Configuration


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's own use of jsonargparse
def test_everything_is_set_from_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-prune"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
        seed_everything: 3
        model:
          class_path: lightning_prune.experiments.ImageClassifier
          init_args:
            network: {class_path: lightning_prune.experiments.SmallConvNet, init_args: {width: 0.25}}
            optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.2}}
            scheduler: {class_path: lightning_prune.experiments.Drops, init_args: {at: [0.5]}}
            warmup_steps: 3
        data:
          class_path: lightning_prune.experiments.Digits
          init_args: {batch_size: 50}
        trainer: {max_epochs: 2}
        """
    )
    cli = LightningCLI(
        LightningModule,
        LightningDataModule,
        run=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        trainer_defaults={"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        args=["--config", str(recipe), "--model.warmup_steps=4", "--trainer.accelerator=cpu"],
    )
    rates = Rates()
    cli.trainer.callbacks.append(rates)
    cli.trainer.fit(cli.model, cli.datamodule)
    steps = len(cli.datamodule.train_dataloader())
    expected = [0.2 * min(1, (i + 1) / 5) * (1 if i < steps else 0.1) for i in range(2 * steps)]
    assert rates.rates == pytest.approx(expected)


def test_defaults_train_and_a_torch_scheduler_is_set_from_a_configuration() -> None:
    model = ImageClassifier(Flat(), scheduler=partial(StepLR, step_size=1))
    run = trainer(max_epochs=3)
    run.fit(model, Digits())
    assert isinstance(run.optimizers[0], torch.optim.Adam)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"interval": "batch"}, "interval='batch'"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cosine(-1), "final_lr=-1"),
        (lambda: OneCycle(0.0), r"max_lr=0\.0"),
        (lambda: OneCycle(1.0, rise=1.0), r"rise=1\.0"),
        (lambda: Drops([]), "at="),
        (lambda: Drops([0.7, 0.5]), r"at=\[0\.7, 0\.5\]"),
        (lambda: Drops([0.5, 1.0]), "rising shares"),
        (lambda: Drops([0.5], factor=2), "factor=2"),
    ],
)
def test_bad_schedules(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_class_count_that_the_data_contradicts() -> None:
    with pytest.raises(ConfigError, match=r"the data has 10 classes, ImageClassifier\(num_classes=7\)"):
        trainer().fit(ImageClassifier(Flat(7), num_classes=7), Digits())


def test_a_class_count_that_the_network_contradicts() -> None:
    with pytest.raises(ConfigError, match=r"Flat gives outputs of shape \(\d+, 7\); expected \(N, 10\)"):
        trainer().fit(ImageClassifier(Flat(7)), Digits())
