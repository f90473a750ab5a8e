"""Resuming with the loaders people use, and the warnings and errors where equality ends."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.resume import ResumeState
from tests._helpers.resuming import (
    Case,
    Net,
    Noisy,
    Owner,
    Run,
    Saved,
    SaveEverywhere,
    check_moved,
    check_resumed,
    fit,
    noisy_loaders,
    seed,
)


def resume(case: Case, folder: Path, full: Run, saved: Saved, **options: Any) -> Run:
    resumed = fit(case, folder / "resumed", **({"seeded": 99, "checkpoint": saved.path, "hooks": ()} | options))
    check_resumed(full, resumed, saved)
    return resumed


def check_all(case: Case, folder: Path, hooks: tuple[str, ...] = ("on_train_batch_end", "on_train_epoch_end")) -> Run:
    full = fit(case, folder)
    chosen = [saved for saved in full.saved if saved.hook in hooks]
    assert sum(check_moved(full, saved) for saved in chosen) > 0
    for saved in chosen if len(chosen) < 8 else (chosen[0], *chosen[4::3], chosen[-1]):
        resume(case, folder, full, saved)
    return full


# loaders


def own_generator(**options: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    return noisy_loaders(generator=generator, **options)


def sampled(make: Any) -> Any:
    return lambda: noisy_loaders(sampler=make(Noisy()), shuffle=False)


def batch_sampled() -> Any:
    sampler = RandomSampler(Noisy(), generator=torch.Generator().manual_seed(3))
    loader = DataLoader(Noisy(), batch_sampler=BatchSampler(sampler, 4, drop_last=False))
    return loader, noisy_loaders()[1]


LOADERS = {
    "own generator": own_generator,
    "own generator, workers": lambda: own_generator(num_workers=1),
    "replacement": sampled(lambda data: RandomSampler(data, replacement=True, num_samples=20)),
    "weighted": sampled(lambda data: WeightedRandomSampler([1.0] * len(data), 24)),
    "subset": sampled(lambda data: SubsetRandomSampler(range(16))),
    "distributed": sampled(lambda data: DistributedSampler(data, num_replicas=1, rank=0)),
    "batch sampler": batch_sampled,
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(name: str, tmp_path: Path) -> None:
    check_all(Case(name, loaders=LOADERS[name]), tmp_path)


class InMemory:
    """A loader that is no DataLoader: its order is drawn from the global generator in ``__iter__``."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Noisy(noise=0)
        order = torch.randperm(24)
        return iter([(data.x[part] + torch.randn(4, 5), data.x[part].sum(1)) for part in order.split(4)])

    def __len__(self) -> int:
        return 6


def test_a_loader_that_is_no_dataloader(tmp_path: Path) -> None:
    check_all(Case("own", loaders=lambda: (InMemory(), noisy_loaders()[1])), tmp_path)


def test_data_are_reloaded_in_the_same_epochs(tmp_path: Path) -> None:
    """A reload draws an iterator more, which is seen with a loader that draws its order there."""
    options = {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 4}
    case = Case("reloaded", loaders=lambda: (InMemory(), noisy_loaders()[1]), options=options)
    check_all(case, tmp_path, ("on_train_epoch_end",))


class Stateful:
    """A loader that Lightning restores by ``state_dict``: its order comes from its own seed and epoch."""

    def __init__(self) -> None:
        self.epoch, self.position, self.drawn = 0, 0, 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        data = Noisy(noise=0)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch)).split(4)
        while self.position < len(self):
            part = order[self.position]
            self.position += 1
            self.drawn += 1
            yield data.x[part], data.x[part].sum(1)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


@pytest.mark.parametrize("options", [{}, {"max_steps": 11, "max_epochs": -1}], ids=["epochs", "steps"])
def test_a_loader_with_its_own_state_is_not_advanced_twice(tmp_path: Path, options: dict[str, Any]) -> None:
    loaders: list[Stateful] = []

    def make() -> tuple[Any, Any]:
        loaders.append(Stateful())
        return loaders[-1], noisy_loaders()[1]

    case = Case("stateful", loaders=make, options=options)
    full = fit(case, tmp_path)
    for saved in full.saved:
        resume(case, tmp_path, full, saved)
        assert loaders[-1].drawn == sum(event[0] == "train" for event in full.events[saved.events :])


class Stream(IterableDataset):
    """Has no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Noisy(noise=0.1)
        return (data[int(index)] for index in torch.randperm(24))


def stream_loaders(workers: int = 0) -> tuple[Any, Any]:
    return DataLoader(Stream(), 4, num_workers=workers), noisy_loaders()[1]


def test_data_without_length_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    check_all(Case("stream", loaders=stream_loaders), tmp_path, ("on_train_epoch_end",))


def test_data_without_length_inside_an_epoch_warns(tmp_path: Path) -> None:
    case = Case("stream", loaders=stream_loaders)
    full = fit(case, tmp_path)
    with pytest.warns(UserWarning, match="no length, so its next batch was loaded ahead"):
        fit(case, tmp_path / "resumed", seeded=99, checkpoint=full.saved[2].path, hooks=())


def test_data_without_length_inside_an_epoch_from_workers(tmp_path: Path) -> None:
    check_all(Case("stream", loaders=lambda: stream_loaders(1), options={"max_epochs": 1}), tmp_path)


def persistent(noise: float) -> Any:
    def make() -> tuple[Any, Any]:
        train = DataLoader(Noisy(noise=noise), 4, shuffle=True, num_workers=1, persistent_workers=True)
        return train, DataLoader(Noisy(8), 4)

    return make


def test_persistent_workers(tmp_path: Path) -> None:
    """The order always; random numbers of the workers in the first epoch."""
    check_all(Case("augmented", loaders=persistent(0.1), options={"max_epochs": 1}), tmp_path)
    check_all(Case("order only", loaders=persistent(0.0)), tmp_path, ("on_train_epoch_end",))
    case = Case("warned", loaders=persistent(0.0))
    full = fit(case, tmp_path)
    inside = [saved for saved in full.saved if saved.hook == "on_train_batch_end"][-2]
    with pytest.warns(UserWarning, match="random numbers of persistent workers are lost"):
        resume(case, tmp_path, full, inside)


def test_loaders_of_different_length_warn_inside_an_epoch(tmp_path: Path) -> None:
    class First(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[0], batch_idx)

    def make() -> tuple[Any, Any]:
        return [noisy_loaders()[0], DataLoader(Noisy(8), 4, shuffle=True)], noisy_loaders()[1]

    case = Case("several", loaders=make, module=First)
    full = fit(case, tmp_path)
    for saved in full.saved:
        if saved.hook == "on_train_epoch_end":
            resume(case, tmp_path, full, saved)
    with pytest.warns(UserWarning, match="differ in length"):
        fit(case, tmp_path / "resumed", seeded=99, checkpoint=full.saved[2].path, hooks=())


# settings that differ


def test_other_data_is_refused_inside_an_epoch_and_warned_of_at_its_end(tmp_path: Path) -> None:
    full = fit(Case("as it was"), tmp_path)
    other = Case("other", loaders=lambda: noisy_loaders(batch_size=3))
    with pytest.raises(ResumeError, match=r"place in the data is lost \(batch size: \[4\] then, \[3\] now; batches an"):
        fit(other, tmp_path / "a", checkpoint=full.saved[1].path, hooks=())
    end = next(saved for saved in full.saved if saved.hook == "on_train_epoch_end")
    with pytest.warns(UserWarning, match=r"will not equal.*batch size: \[4\] then, \[3\] now"):
        fit(other, tmp_path / "b", checkpoint=end.path, hooks=())
    workers = Case("workers", loaders=lambda: noisy_loaders(num_workers=1))
    with pytest.warns(UserWarning, match=r"data workers: \[0\] then, \[1\] now"):
        fit(workers, tmp_path / "c", checkpoint=full.saved[1].path, hooks=())


def test_less_data_than_were_trained_on_is_refused(tmp_path: Path) -> None:
    full = fit(Case("stream", loaders=stream_loaders), tmp_path)

    class Short(Stream):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            data = Noisy()
            return (data[index] for index in range(8))

    case = Case("short", loaders=lambda: (DataLoader(Short(), 4), noisy_loaders()[1]))
    fourth = full.saved[3]
    assert fourth.hook == "on_train_batch_end"
    with (
        pytest.warns(UserWarning, match="no length"),
        pytest.raises(ResumeError, match="after 4 batches of an epoch, but the training data now gives only 2"),
    ):
        fit(case, tmp_path / "resumed", checkpoint=fourth.path, hooks=())


def test_a_checkpoint_without_state_warns_and_later_ones_are_good(tmp_path: Path) -> None:
    case = Case("plain")
    bare = fit(case, tmp_path / "bare", owners=())
    (tmp_path / "first").mkdir()
    with (
        pytest.warns(UserWarning, match="holds no resume state"),
        pytest.warns(UserWarning, match="dataloader is not resumable"),  # Lightning's own, and true here
    ):
        first = fit(case, tmp_path / "first", checkpoint=bare.saved[1].path)
    assert first.saved[0].hook == "on_train_batch_end"
    for saved in first.saved:
        resume(case, tmp_path, first, saved)


def test_a_later_version_is_refused() -> None:
    with pytest.raises(ResumeError, match="version 99, this library reads up to 1"):
        ResumeState().load_state_dict({"version": 99})


# where the promise ends


def test_inside_an_accumulation_warns(tmp_path: Path) -> None:
    case = Case("accumulation", options={"accumulate_grad_batches": 4, "val_check_interval": 3})
    full = fit(case, tmp_path)
    saved = next(saved for saved in full.saved if saved.hook == "on_validation_end")
    with pytest.warns(UserWarning, match="between two optimizer steps, and the gradients accumulated so far are lost"):
        fit(case, tmp_path / "resumed", checkpoint=saved.path, hooks=())


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad", "on_validation_start"])
def test_checkpoints_inside_a_batch_or_a_validation_warn_and_go_on(tmp_path: Path, hook: str) -> None:
    case = Case("inside", options={"val_check_interval": 2})
    full = fit(case, tmp_path, hooks=(hook,))
    saved = full.saved[4] if hook != "on_validation_start" else full.saved[1]
    with pytest.warns(UserWarning, match="written inside a (batch|validation), which is repeated"):
        resumed = fit(case, tmp_path / "resumed", seeded=99, checkpoint=saved.path, hooks=())
    left = [event[:2] for event in full.events[saved.events :]]
    assert [event[:2] for event in resumed.events][-len(left) :] == left
    assert len(resumed.events) - len(left) in (0, 1)
    assert torch.equal(resumed.state["counters"], full.state["counters"])


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_end"])
def test_other_checkpoints_between_epochs_are_inside_the_promise(tmp_path: Path, hook: str) -> None:
    case = Case("between", loaders=lambda: (InMemory(), noisy_loaders()[1]))  # draws its order with the iterator
    full = fit(case, tmp_path, hooks=(hook,))
    for saved in full.saved:
        resume(case, tmp_path, full, saved)
    assert full.saved


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_hooks_of_the_module_after_the_checkpoint_are_named(tmp_path: Path, hook: str) -> None:
    module = type("Overrides", (Net,), {hook: lambda self, *args: None})
    case = Case("overrides", module=module, options={"val_check_interval": 2, "max_epochs": 1})
    full = fit(case, tmp_path, hooks=(hook,))
    with pytest.warns(UserWarning, match=f"written before the LightningModule's own {hook}"):
        resume(case, tmp_path, full, full.saved[0])


# callbacks that stop and save


def stopping() -> list[pl.Callback]:
    return [EarlyStopping("val_loss", patience=0, min_delta=100.0)]


@pytest.mark.parametrize("options", [{}, {"min_epochs": 3}], ids=["stops", "may not stop yet"])
def test_a_pending_stop_is_kept(tmp_path: Path, options: dict[str, Any]) -> None:
    case = Case("stopping", callbacks=stopping, options={"max_epochs": 5, **options})
    full = check_all(case, tmp_path, ("on_validation_end", "on_train_epoch_end", "on_train_batch_end"))
    assert max(event[1] for event in full.events) == options.get("min_epochs", 2) - 1
    stopped = torch.load(full.saved[-1].path, weights_only=True)["callbacks"]["Owner"]["stop"]
    assert stopped


def test_a_stop_asked_for_inside_an_epoch_is_kept(tmp_path: Path) -> None:
    class AtBatch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.should_stop or args[-1] == 2

    case = Case("stop", callbacks=lambda: [AtBatch()], options={"limit_val_batches": 0})
    full = fit(case, tmp_path)
    assert [event[2] for event in full.events if event[0] == "train"] == [0, 1, 2]
    resume(case, tmp_path, full, full.saved[2])


def test_a_stop_by_the_clock_is_not_kept(tmp_path: Path) -> None:
    class Now(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 0

    full = fit(Case("stopped", callbacks=lambda: [Now(), Timer("00:01:00:00")]), tmp_path, max_epochs=2)
    assert max(event[1] for event in full.events) == 0
    resumed = fit(
        Case("longer", callbacks=lambda: [Timer("00:01:00:00")]), tmp_path / "r", checkpoint=full.saved[-1].path
    )
    assert max(event[1] for event in resumed.events) == 1


def test_model_checkpoint_and_early_stopping_go_through(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[pl.Callback]:
        best = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2, filename="{epoch}-{step}")
        return [best, EarlyStopping("val_loss", patience=1)]

    def outcome(run: Run) -> tuple[Any, ...]:
        best, early = run.trainer.checkpoint_callbacks[-1], run.trainer.early_stopping_callback
        assert isinstance(best, ModelCheckpoint)
        assert early is not None
        scores = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
        return Path(best.best_model_path).name, float(best.best_model_score), scores, str(early.state_dict())

    case = Case("both", callbacks=lambda: callbacks(tmp_path / "best"), options={"max_epochs": 5})
    full = fit(case, tmp_path)
    expected = outcome(full)
    assert len(expected[2]) == 2
    for saved in full.saved[::5]:
        shutil.rmtree(tmp_path / "best", ignore_errors=True)
        assert outcome(resume(case, tmp_path, full, saved)) == expected


# going on from a resumed fit, longer fits, two owners


def test_a_resumed_fit_can_be_resumed(tmp_path: Path) -> None:
    case = Case("plain", options={"val_check_interval": 3})
    full = fit(case, tmp_path)
    first = full.saved[1]
    (tmp_path / "again").mkdir()
    again = fit(case, tmp_path / "again", seeded=99, checkpoint=first.path)
    check_resumed(full, again, first)
    for saved in again.saved:
        resume(case, tmp_path, again, saved)


def test_a_finished_fit_goes_on_with_a_higher_limit(tmp_path: Path) -> None:
    case = Case("plain")
    long = fit(case, tmp_path, max_epochs=3)
    end = tmp_path / "end.ckpt"
    short = fit(case, tmp_path / "short", max_epochs=2, hooks=(), after=lambda trainer: trainer.save_checkpoint(end))
    saved = Saved("after the fit", end, len(short.events), short.weights)
    assert check_moved(long, saved)
    resume(case, tmp_path, long, saved, max_epochs=3)


class SecondOwner(Owner):
    """Another callback that owns a state."""


def test_of_two_owners_one_acts(tmp_path: Path) -> None:
    case = Case("two")
    full = fit(case, tmp_path, owners=[Owner(), SecondOwner()])
    alone = fit(case, tmp_path / "alone", hooks=())
    assert full.events == alone.events
    for saved in full.saved[1::4]:
        resume(case, tmp_path, full, saved, owners=[Owner(), SecondOwner()])
        resume(case, tmp_path, full, saved, owners=[SecondOwner(), Owner()])


# beginning inside an epoch


def skip(batches: int, epoch: int = 1) -> list[pl.Callback]:
    def before_epoch(trainer: pl.Trainer, resume_state: ResumeState) -> None:
        if trainer.current_epoch == epoch:
            resume_state.fast_forward_next_epoch(batches)

    return [Owner(before_epoch)]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_that_begins_at_a_later_batch(tmp_path: Path, workers: int) -> None:
    """It sees the batches of a whole epoch from there on; everything else in it happens as in a whole epoch."""

    class Plain(Noisy):
        def __init__(self) -> None:
            super().__init__(noise=0.0)

    def make() -> tuple[Any, Any]:
        return DataLoader(Plain(), 4, shuffle=True, num_workers=workers), DataLoader(Noisy(8), 4)

    case = Case("skip", loaders=make, options={"val_check_interval": 4, "accumulate_grad_batches": 2, "max_epochs": 3})
    whole = fit(case, tmp_path / "whole", hooks=())
    full = fit(case, tmp_path, owners=skip(3))
    first = [event for event in full.events if event[1] == 0]
    assert first == [event for event in whole.events if event[1] == 0]

    def batches(run: Run, epoch: int) -> list[tuple[Any, ...]]:
        return [event[2:4] for event in run.events if event[:2] == ("train", epoch)]

    assert [index for index, _ in batches(full, 1)] == [3, 4, 5]
    assert batches(full, 1) == batches(whole, 1)[3:]
    assert [index for index, _ in batches(full, 2)] == list(range(6))
    kinds = [event[0] for event in full.events if event[1] == 1]
    assert kinds == ["train", "validation", "train", "train", "epoch end"]  # validated after batch 3, the 4th
    # optimizer steps fall on the batches of odd index, as in a whole epoch: 3 a whole epoch, 2 from batch 3 on
    assert [event[2] for event in full.events if event[0] == "epoch end"] == [3, 5, 8]
    for saved in full.saved if workers == 0 else full.saved[3::3]:
        resume(case, tmp_path, full, saved, owners=skip(3))


def test_beginning_at_batch_0_changes_nothing(tmp_path: Path) -> None:
    case = Case("skip")
    assert fit(case, tmp_path, owners=skip(0), hooks=()).events == fit(case, tmp_path, hooks=()).events


def test_the_first_epoch_can_begin_later(tmp_path: Path) -> None:
    case = Case("skip")
    run = fit(case, tmp_path, owners=skip(4, epoch=0))
    assert [event[2] for event in run.events if event[:2] == ("train", 0)] == [4, 5]
    for saved in run.saved:
        resume(case, tmp_path, run, saved, owners=skip(4, epoch=0))


@pytest.mark.parametrize(("batches", "given"), [(6, 6), (9, 6)])
def test_beginning_beyond_the_epoch_is_refused(tmp_path: Path, batches: int, given: int) -> None:
    with pytest.raises(ConfigError, match=f"begin at its batch {batches}, but it has only {given} batches"):
        fit(Case("skip"), tmp_path, owners=skip(batches), hooks=())


@pytest.mark.gpu
def test_generators_of_a_gpu_go_on(tmp_path: Path) -> None:
    """Dropout there draws from CUDA's generator; a network this small is summed up in the same order each time."""
    check_all(Case("gpu", options={"accelerator": "gpu", "devices": 1, "deterministic": "warn"}), tmp_path)


# several processes


class OnRanks(Net):
    """Each rank draws other random numbers, and leaves its events and weights in a file."""

    folder: Path
    seeded: int

    def setup(self, stage: str) -> None:
        seed(self.seeded + self.global_rank)

    def on_train_end(self) -> None:
        saver = self.trainer.callbacks[-1]
        assert isinstance(saver, SaveEverywhere)
        saved = [(saved.hook, str(saved.path), saved.events) for saved in saver.saved]
        result = {"events": self.events, "weights": self.weights(), "saved": saved}
        torch.save(result, self.folder / f"rank{self.global_rank}.pt")


def fit_on_two_ranks(folder: Path, seeded: int, checkpoint: str | None = None, owned: bool = True) -> list[Any]:
    folder.mkdir(exist_ok=True)
    case = Case("ranks", options={})
    net = OnRanks(case)
    net.folder, net.seeded = folder, seeded
    trainer = pl.Trainer(
        strategy="ddp_fork",
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        callbacks=[*([Owner()] if owned else []), SaveEverywhere(folder, () if checkpoint else SaveEverywhere.HOOKS)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, *noisy_loaders(batch_size=2), ckpt_path=checkpoint)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_get_their_own_generators_back(tmp_path: Path) -> None:
    full = fit_on_two_ranks(tmp_path / "full", seeded=1)
    assert [event[3:5] for event in full[0]["events"] if event[0] == "train"] != [
        event[3:5] for event in full[1]["events"] if event[0] == "train"
    ]
    for hook in SaveEverywhere.HOOKS:
        index = next(index for index, saved in enumerate(full[0]["saved"]) if saved[0] == hook)
        path = full[0]["saved"][index][1]
        resumed = fit_on_two_ranks(tmp_path / hook, 50, path)
        plain = fit_on_two_ranks(tmp_path / f"{hook}-plain", 50, path, owned=False)
        for rank in range(2):
            assert resumed[rank]["events"] == full[rank]["events"][full[rank]["saved"][index][2] :]
            assert torch.equal(resumed[rank]["weights"], full[rank]["weights"])
            assert not torch.equal(plain[rank]["weights"], full[rank]["weights"])
