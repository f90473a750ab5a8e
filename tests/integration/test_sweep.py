"""A small sweep on scikit-learn's digits: what each arm spent, skipping, resuming, and what is never mixed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_prune import TrainingCost, compare_latency
from lightning_prune.cli import main
from lightning_prune.commands.sweep import main as sweep_main
from lightning_prune.experiments import SmallConvNet
from lightning_prune.record import Arm as Result
from lightning_prune.sweep.driver import Driver
from lightning_prune.sweep.facts import network_facts
from lightning_prune.sweep.latency import measure_arms
from lightning_prune.sweep.planning import Arm, plan_arms
from lightning_prune.sweep.processes import run_program
from lightning_prune.sweep.schema import Sweep, read_sweep

BATCH, STEPS = 32, 60
BUDGET = {"class_path": "lightning_prune.Budget", "init_args": {"macs": 0.9}}
RECIPES: dict[str, Any] = {
    "train.yaml": {
        "model": {
            "class_path": "lightning_prune.experiments.ImageClassifier",
            "init_args": {
                "network": {"class_path": "lightning_prune.experiments.SmallConvNet"},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
                "scheduler": {"class_path": "lightning_prune.experiments.Cosine"},
                "interval": "step",
            },
        },
        "data": {
            "class_path": "lightning_prune.experiments.Digits",
            "init_args": {"batch_size": BATCH, "drop_last": True},
        },
        "trainer": {"accelerator": "cpu"},
    },
    "hrank.yaml": {"trainer": {"callbacks": {
        "class_path": "lightning_prune.HRankPruner",
        "init_args": {"budget": BUDGET, "at": "0st", "images": 64, "validate_cuts": True},
    }}},
    "imp.yaml": {"trainer": {"callbacks": [
        {"class_path": "lightning_prune.IterativeMagnitudePruner", "init_args": {"verbose": False}},
        {"class_path": "lightning_prune.WeightRewind"},
        {"class_path": "lightning_prune.LRRewind"},
    ]}},
}  # fmt: skip
SWEEP = {
    "recipe": "train.yaml",
    "steps": STEPS,
    "first": 0.5,
    "checkpoint_every": 7,
    "networks": {"small": {"class": "lightning_prune.experiments.SmallConvNet", "width": 0.25}},
    "budgets": [0.4],
    "seeds": [1],
    "methods": {
        "dense": {"kind": "dense"},
        "hrank": {"kind": "cut", "recipe": "hrank.yaml"},
        "imp": {"kind": "rounds", "recipe": "imp.yaml", "rewind": 0.2, "rounds": 2},
        "scratch": {"kind": "scratch", "of": "hrank"},
        "narrowed": {"kind": "narrowed"},
        "scratch_steps": {"kind": "scratch", "of": "hrank", "equal": "steps"},
    },
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def sweep_in(folder: Path, **changes: Any) -> Sweep:
    for name, content in RECIPES.items():
        (folder / name).write_text(yaml.safe_dump(content))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP | {"output": str(folder / "out")} | changes))
    return read_sweep(folder / "sweep.yaml")


class Here:
    """Runs fits in this process, and remembers them."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def __call__(self, words: Sequence[str], log: Path) -> int:
        self.ran.append(list(words))
        with contextlib.redirect_stdout(None):
            try:
                main(list(words[1:]))
            except SystemExit as error:
                return int(error.code or 0)
        return 0


def planned(sweep: Sweep, methods: Sequence[str] | None = None) -> tuple[list[Arm], dict[str, Any]]:
    facts = {"small": network_facts(sweep, sweep.networks["small"], sweep.budgets, [])}
    return plan_arms(sweep, facts, ["small"], methods or [*sweep.methods], sweep.budgets, sweep.seeds), facts


def driven(sweep: Sweep, methods: Sequence[str] | None = None, **options: Any) -> tuple[Driver, Here]:
    arms, facts = planned(sweep, methods)
    here = Here()
    driver = Driver(arms, sweep.output, facts, **{"runner": here} | options)
    driver.run()
    return driver, here


def macs_by_hand(weights: dict[str, torch.Tensor]) -> int:
    """Multiply-adds an 8x8 image of the network with these weights: positions x kernel x inputs x outputs."""
    shapes = [value.shape for name, value in weights.items() if name.endswith("weight") and value.dim() > 1]
    positions = (64, 16, 16, 1)
    return sum(p * shape.numel() for p, shape in zip(positions, shapes, strict=True))


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def spent_by_hand(folder: Path) -> int:
    """What a fit without scoring has executed: steps of its last checkpoint, at the shapes of its saved network."""
    saved = checkpoint(folder)
    return 3 * BATCH * saved["global_step"] * macs_by_hand(saved["state_dict"])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Driver, Here]:
    folder = tmp_path_factory.mktemp("sweep")
    return folder, *driven(sweep_in(folder))


def test_every_arm_has_spent_the_same(done: tuple[Path, Driver, Here]) -> None:
    folder, driver, here = done
    assert driver.failures == {}
    assert len(here.ran) == 7
    home = folder / "out" / "small" / "seed1"
    weights = checkpoint(home / "dense")["state_dict"]
    allowed = 3 * BATCH * STEPS * macs_by_hand(weights)
    names = ("dense", "hrank-40", "imp-40", "scratch-40", "narrowed-40")
    spent = {name: spent_by_hand(home / name) for name in names}
    images = 64 * macs_by_hand(weights)  # HRank's, a forward pass each
    spent["hrank-40"] += spent_by_hand(home / "first") + images
    for name, macs in spent.items():
        assert macs == pytest.approx(allowed, rel=0.02), name
        result = Result.read(home / name)
        assert result.cost.limit == allowed
        assert result.cost.macs == pytest.approx(macs, rel=1e-6), name
    assert len({round(macs) for macs in spent.values()}) > 2  # counted one by one, not copied
    steps = Result.read(home / "scratch_steps-40")
    assert (steps.cost.limit, steps.cost.stages[0].steps) == (None, STEPS)


def test_what_an_arm_tells(done: tuple[Path, Driver, Here]) -> None:
    home = done[0] / "out" / "small" / "seed1"
    cut, masked, narrow = (Result.read(home / f"{name}-40") for name in ("hrank", "imp", "narrowed"))
    dense = macs_by_hand(checkpoint(home / "dense")["state_dict"])
    compact = checkpoint(home / "hrank-40")["state_dict"]
    assert cut.kept["macs"] == macs_by_hand(compact) / dense <= 0.4
    assert cut.kept["params"] < 0.5
    widths = [SmallConvNet(width=step / 500) for step in range(5, 126)]
    assert narrow.kept["macs"] == max(m for m in (macs_by_hand(n.state_dict()) / dense for n in widths) if m <= 0.4)
    assert (masked.kept["macs"], masked.budget_on) == (1, "params")
    assert masked.kept["nonzero_params"] == pytest.approx(0.4, abs=0.03)  # BatchNorm and biases stay
    assert cut.before is not None
    assert cut.after_cut is not None
    assert cut.after_cut["val_acc"] < cut.before["val_acc"]
    assert set(cut.metrics) == {"val_acc", "val_loss", "test_acc", "test_loss"}
    assert [len(result.commands) for result in (cut, masked)] == [2, 1]


def test_finished_arms_are_skipped_and_others_never_mixed_in(
    done: tuple[Path, Driver, Here], capsys: pytest.CaptureFixture
) -> None:
    folder, _, _ = done
    driver, here = driven(sweep_in(folder))
    assert (here.ran, driver.failures) == ([], {})
    assert capsys.readouterr().out.count("(done before)") == 6
    driver, here = driven(sweep_in(folder, steps=70), ["dense"])
    assert here.ran == []
    assert "trainer.max_steps is '60' there, and '70'" in driver.failures["small seed 1 dense"]
    changed = RECIPES["train.yaml"]["data"]["init_args"]
    changed["drop_last"] = False
    try:
        driver, here = driven(sweep_in(folder), ["dense"])
    finally:
        changed["drop_last"] = True
    assert here.ran == []
    assert "recipes.0.data.init_args.drop_last is True there, and False" in driver.failures["small seed 1 dense"]


@pytest.mark.parametrize(
    ("method", "arm"),
    [("dense", "dense"), pytest.param("imp", "imp-40", marks=pytest.mark.slow),
     pytest.param("hrank", "hrank-40", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_killed_arm_goes_on_and_ends_as_the_others(
    done: tuple[Path, Driver, Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, arm: str
) -> None:
    step = TrainingCost.on_train_batch_end

    def killed(self: TrainingCost, trainer: Any, *rest: Any) -> None:
        step(self, trainer, *rest)
        if trainer.global_step == 37:
            raise OSError("killed")

    sweep = sweep_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingCost, "on_train_batch_end", killed)
        driver, _ = driven(sweep, [method])
    assert "exit status 1" in driver.failures[f"small seed 1 {arm}"]
    driver, here = driven(sweep, [method])
    assert driver.failures == {}
    (words,) = here.ran
    assert "resume" in words[-1]
    folder, whole = sweep.output / "small" / "seed1" / arm, done[0] / "out" / "small" / "seed1" / arm
    ours, theirs = checkpoint(folder), checkpoint(whole)
    assert ours["global_step"] == theirs["global_step"] > 37
    assert all(torch.equal(value, ours["state_dict"][name]) for name, value in theirs["state_dict"].items())
    assert Result.read(folder).cost.macs == Result.read(whole).cost.macs
    assert Result.read(folder).metrics == Result.read(whole).metrics
    assert sorted(path.name for path in folder.glob("checkpoints/[lr]*")) == ["last.ckpt"]


def test_a_command_of_the_list_run_by_itself_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sweep = sweep_in(tmp_path, steps=4)
    sweep_main(["--config", str(tmp_path / "sweep.yaml"), "--list", "--methods", "dense"])
    said, command = capsys.readouterr().out.splitlines()
    assert said.startswith("# to do:")
    (arm,), _ = planned(sweep, ["dense"])
    assert command.split()[:2] == ["lightning-prune", "fit"]
    Here()(arm.stages[0].command, tmp_path)
    driver, here = driven(sweep, ["dense"])
    assert (here.ran, driver.failures) == ([], {})
    assert Result.read(arm.folder).cost.stages[0].steps == 4
    driver, _ = driven(sweep_in(tmp_path, steps=5), ["dense"])
    assert "trainer.max_steps is 4 there, and 5" in driver.failures["small seed 1 dense"]


def test_failures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fails(words: Sequence[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write("out of luck\n")
        return 3

    sweep = sweep_in(tmp_path)
    driver, _ = driven(sweep, runner=fails)
    assert list(driver.failures) == ["small seed 1 dense"]
    driver, _ = driven(sweep, runner=fails, keep_going=True)
    assert len(driver.failures) == 6
    assert "exit status 3" in driver.failures["small seed 1 dense"]
    assert "out of luck" in driver.failures["small seed 1 dense"]
    assert "needs" in driver.failures["small seed 1 scratch-40"]


def test_latency_is_measured_once_for_each_shape(
    done: tuple[Path, Driver, Here], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, driver, _ = done
    sweep = sweep_in(folder, latency={"batch_size": 4, "seconds": 0.02})
    measured = []

    def compare(dense: torch.nn.Module, network: torch.nn.Module, inputs: torch.Tensor, **options: Any) -> Any:
        measured.append((macs_by_hand(dense.state_dict()), macs_by_hand(network.state_dict()), options["batch_size"]))
        return compare_latency(dense, network, inputs, **options)

    monkeypatch.setattr("lightning_prune.sweep.latency.compare_latency", compare)
    home = folder / "out" / "small" / "seed1"
    dense, *small = (macs_by_hand(checkpoint(home / f)["state_dict"]) for f in ("dense", "hrank-40", "narrowed-40"))
    assert measure_arms(sweep, driver.arms, driver.facts) == []
    assert measured == [(dense, small[0], 4), (dense, small[1], 4)]
    cut, scratch, masked = (Result.read(home / f"{name}-40").latency for name in ("hrank", "scratch", "imp"))
    assert cut is not None
    assert cut == scratch
    assert (cut.batch_size, cut.threads, masked) == (4, 1, None)
    replace(Result.read(home / "scratch-40"), latency=None).write(home / "scratch-40")
    assert measure_arms(sweep, driver.arms, driver.facts) == []
    assert len(measured) == 2
    assert Result.read(home / "scratch-40").latency == cut


def test_an_arm_waits_for_one_that_another_sweep_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms, facts = planned(sweep_in(tmp_path), ["hrank", "scratch"])
    visited = []

    def visit(self: Driver, number: int, arm: Arm) -> bool:
        visited.append(arm.method.name)
        if visited == ["hrank"]:
            return False  # another sweep is at it
        (arm.folder / "compact.safetensors").parent.mkdir(parents=True)
        (arm.folder / "compact.safetensors").touch()
        return True

    monkeypatch.setattr(Driver, "_visit", visit)
    monkeypatch.setattr("lightning_prune.sweep.driver._LOOK_AGAIN", 0.0)
    Driver(arms, tmp_path, facts).run()
    assert visited == ["hrank", "hrank", "scratch"]


def test_the_exit_status_tells_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run(self: Driver) -> None:
        assert self.keep_going
        assert [arm.label for arm in self.arms] == ["small seed 1 dense", "small seed 1 hrank-40"]
        self.failures["small seed 1 dense"] = "no luck\nat all"

    sweep_in(tmp_path)
    monkeypatch.setattr(Driver, "run", run)
    with pytest.raises(SystemExit, match="1"):
        main(["sweep", "--config", str(tmp_path / "sweep.yaml"), "--methods", "hrank,dense", "--keep-going"])
    said = capsys.readouterr().err
    assert "1 of 2 arms failed:\n  small seed 1 dense: no luck\n" in said
    assert "at all" not in said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_sweeps_and_a_killed_one_run_every_arm_once(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, steps=200)
    command = [sys.executable, "-m", "lightning_prune", "sweep", "--config", str(tmp_path / "sweep.yaml")]
    command += ["--methods", "dense,hrank,scratch"]
    home = sweep.output / "small" / "seed1"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list((home / "dense" / "checkpoints").glob("resume*.ckpt")):
        assert first.poll() is None
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)  # its fit lives on: what comes next waits for it
    first.wait()
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    try:
        assert [process.wait() for process in both] == [0, 0]
    finally:
        for process in both:
            process.terminate()
    assert sorted(path.parent.name for path in home.glob("*/arm.json")) == ["dense", "hrank-40", "scratch-40"]
    for path in home.glob("*/stage.json"):
        text = (home / "logs" / f"{path.parent.name}.log").read_text()
        assert text.count("$ lightning-prune fit") == (2 if path.parent.name == "dense" else 1), path
        assert json.loads(path.read_text())["done"]
        assert sorted(found.name for found in path.parent.glob("checkpoints/last*")) == ["last.ckpt"]
    log = tmp_path / "log"
    assert run_program(["lightning-prune", "fit", "--config", "none.yaml"], log) != 0
    assert "none.yaml" in log.read_text()
