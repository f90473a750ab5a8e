"""What goes wrong in a run leaves whole files behind, and a resumed run that ends as an undisturbed one."""

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_prune import MaskSet, PruneError, SelectionError
from lightning_prune.errors import WriteError
from lightning_prune.resume import AtomicCheckpointIO
from tests._helpers.models import toy_network
from tests.faults.cases import CASES, RUN, Case, Classifier, Images, Killer, Raises, fit, newest
from tests.faults.stress import check_files, compare

Whole = Callable[[str], Path]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Undisturbed runs, by case."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("whole")
            fit(CASES[name], done[name], None)
        return done[name]

    return run


@pytest.fixture(autouse=True)
def _seed_of_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture
def _limit() -> Iterator[None]:
    """Put the limit on the size of files back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_goes_on(name: str, folder: Path, whole: Whole) -> None:
    """Everything in the folder can be read, and a run that goes on there ends like the undisturbed one."""
    assert check_files(folder) > 2
    assert not [path for path in folder.rglob("*.tmp") if path.is_file()]
    assert not (folder / "end.pt").exists()
    checkpoint = newest(folder)
    assert checkpoint is not None
    fit(CASES[name], folder, checkpoint)
    assert compare(whole(name), folder) is None


class NearlyFull(pl.Callback):
    """After so many batches no file can grow beyond 3 kB; the limit is the system's own."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("name", ["lottery", "slimming, gates"])
def test_a_polite_end(name: str, tmp_path: Path, whole: Whole) -> None:
    """SIGTERM, as a cluster sends it before it takes the machine away: Lightning ends the fit."""
    with pytest.raises(SystemExit):
        fit(CASES[name], tmp_path, None, Killer(9, signal.SIGTERM))
    check_goes_on(name, tmp_path, whole)


@pytest.mark.parametrize(
    ("name", "hook", "time"),
    [
        ("lottery", "on_prune", 1),
        ("lottery", "on_save_checkpoint", 3),
        ("lottery", "on_validation_end", 4),
        ("slimming", "on_prune", 2),
        ("hrank, layer by layer", "on_train_batch_start", 13),
    ],
)
def test_an_error_in_the_users_code(name: str, hook: str, time: int, tmp_path: Path, whole: Whole) -> None:
    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(CASES[name], tmp_path, None, Raises(hook, time, ZeroDivisionError("mine")))
    check_goes_on(name, tmp_path, whole)


@pytest.mark.usefixtures("_limit")
@pytest.mark.parametrize(("name", "after"), [("lottery", 9), ("lottery", 18), ("hrank", 10)])
def test_no_room_left(name: str, after: int, tmp_path: Path, whole: Whole) -> None:
    with pytest.raises(WriteError, match=r"could not write .*; what was there before is unchanged"):
        fit(CASES[name], tmp_path, None, NearlyFull(after))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    check_goes_on(name, tmp_path, whole)


def test_checkpoints_do_not_pass_through_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A move from the temporary folder to the run's is a copy there, and a kill would leave half of it."""
    seen: list[str] = []
    original = AtomicCheckpointIO.save_checkpoint

    def save(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        seen.append(str(path))
        original(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    monkeypatch.setattr("shutil.move", lambda *_: pytest.fail("a checkpoint was moved"))
    trainer = fit(CASES["fine-tuning, random pruning"], tmp_path, None)
    assert len(seen) == len(list(tmp_path.rglob("*.ckpt"))) > 10
    assert type(trainer.strategy.checkpoint_io) is not AtomicCheckpointIO  # as it was, once the fit is over


class Diverges(Classifier):
    """Its loss is not a number, from a batch on."""

    seen, since = 0, 10**9

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen += 1
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.seen >= self.since else loss


def diverging(case: Case, since: int) -> Diverges:
    net = Images() if case.images else toy_network(dropout=0.2)
    torch.manual_seed(0)
    module = Diverges(net, lambda part: case.configure(part, case.steps))
    module.since = since
    return module


@pytest.mark.parametrize(("name", "since", "error"), [("lottery", 20, SelectionError), ("slimming", 8, PruneError)])
def test_a_loss_that_is_no_number(name: str, since: int, error: type[PruneError], tmp_path: Path) -> None:
    module = diverging(CASES[name], since)
    with pytest.raises(error, match=r"NaN|not all finite"):
        fit(CASES[name], tmp_path, None, module=module)
    check_files(tmp_path)
    weights = dict(module.named_parameters())
    assert any(weight.isnan().any() for weight in weights.values())
    if name == "lottery":  # in its second round: pruned entries are still exactly 0
        checkpoint = torch.load(newest(tmp_path), weights_only=True)  # type: ignore[arg-type]
        masks = MaskSet.from_state_dict(checkpoint["callbacks"]["IterativeMagnitudePruner"]["masks"])
        assert masks.sparsity > 0.2
        assert all(not weights[n][~mask].any() for n, mask in masks.items())


def test_a_clock_that_jumps(tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, real, real_ns = random.Random(0), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-1e7, 1e7))
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + rng.randrange(-(10**16), 10**16))
    with pytest.raises(ZeroDivisionError):
        fit(CASES["lottery"], tmp_path, None, Raises("on_train_batch_start", 13, ZeroDivisionError()))
    for path in tmp_path.rglob("*.ckpt"):
        os.utime(path, (rng.uniform(0, 2e9), rng.uniform(0, 2e9)))
    check_goes_on("lottery", tmp_path, whole)


class Lost(CSVLogger):
    """A logger whose connection breaks."""

    left = 10**9

    def log_metrics(self, *args: Any, **options: Any) -> None:
        type(self).left -= 1
        if type(self).left <= 0:
            raise ConnectionError("the server is gone")
        super().log_metrics(*args, **options)


@pytest.mark.parametrize("after", [1, 7, 12])
def test_a_logger_that_loses_its_server(
    after: int, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lost, "left", 10**9)
    loggers = [CSVLogger(tmp_path, name=RUN.parts[0], version=RUN.parts[1]), Lost(tmp_path, name="lost")]

    class Soon(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if args[4] == 5:
                Lost.left = min(Lost.left, after)

    with pytest.raises(ConnectionError):
        fit(CASES["lottery"], tmp_path, None, Soon(), logger=loggers, log_every_n_steps=1)
    monkeypatch.setattr(Lost, "left", 10**9)
    check_goes_on("lottery", tmp_path, whole)


def test_links_are_replaced_and_not_followed(tmp_path: Path, whole: Whole) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(CASES["lottery"], tmp_path / "run", None, Raises("on_prune", 1, ZeroDivisionError()))
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "run" / RUN
    for name in ("record.json", "rounds.csv", "connectivity.json", "tickets/round-01.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
    checkpoint = newest(tmp_path / "run")
    fit(CASES["lottery"], tmp_path / "run", checkpoint)
    assert outside.read_text() == "mine"
    assert compare(whole("lottery"), tmp_path / "run") is None
