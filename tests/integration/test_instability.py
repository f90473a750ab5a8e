"""Instability analysis: branches, lines and the command on a small recipe."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_prune import ConfigError, FileFormatError, MaskMismatchError, MaskSet, Ticket, TrainTime, save_ticket
from lightning_prune.cli import main
from lightning_prune.experiments import TensorLoader
from lightning_prune.instability.analysis import Analysis, Settings, Unit, find_tickets
from lightning_prune.instability.branches import BranchPoints, SGDNoise, TrainTicket
from lightning_prune.instability.lines import Measuring
from lightning_prune.instability.recipe import Built, read_recipe
from tests._helpers.resuming import KillAfter

EPOCHS, STEPS = 3, 5  # in all; an epoch
POINTS = ["0st", "2st", "1ep", "60%"]


class Noisy(pl.LightningModule):
    """Dropout and BatchNorm under a schedule; remembers which examples it saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[1])
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1] % 2)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1] % 2))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self) -> TensorLoader:
        return TensorLoader(
            torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20), 4, shuffle=True
        )

    def val_dataloader(self) -> TensorLoader:
        return TensorLoader(torch.ones(4, 4), torch.arange(4), 4)


def fit(callbacks: list[Callback], start: Path | None = None, epochs: int = EPOCHS) -> tuple[Noisy, pl.Trainer]:
    module = Noisy()
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    torch.manual_seed(7)
    trainer.fit(module, ckpt_path=start)
    return module, trainer


def equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> BranchPoints:
    points = BranchPoints([TrainTime.parse(p) for p in POINTS], tmp_path_factory.mktemp("trunk"))
    fit([SGDNoise(), points])
    return points


def test_the_trunk_keeps_its_points_and_stops_at_the_last(tmp_path: Path) -> None:
    points = BranchPoints([TrainTime.parse("1ep"), TrainTime.parse("0st")], tmp_path)
    trainer = fit([SGDNoise(), points])[1]
    assert trainer.global_step == STEPS
    assert points.steps == {"1ep": STEPS, "0st": 0} == json.loads((tmp_path / "steps.json").read_text())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["0st.ckpt", "1ep.ckpt"]
    for name, step in (("0st", 0), ("1ep", STEPS)):
        assert torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["global_step"] == step
    with pytest.raises(ConfigError, match=r"a branch at 100% \(step 15\) has nothing to train: training is 15 steps"):
        fit([SGDNoise(), BranchPoints([TrainTime.parse("100%")], tmp_path)])


@pytest.mark.parametrize("point", POINTS)
def test_going_on_without_new_noise_is_the_training_itself(trunk: BranchPoints, point: str) -> None:
    """So a point is at the very step it names, and branching changes nothing but the noise."""
    whole, _ = fit([])
    branch, trainer = fit([SGDNoise()], trunk.path(point))
    assert trainer.global_step == EPOCHS * STEPS
    assert equal(branch, whole)
    assert len(branch.seen) == EPOCHS * STEPS - trunk.steps[point]


@pytest.mark.parametrize("point", POINTS)
def test_branches_differ_in_their_noise_alone(trunk: BranchPoints, point: str) -> None:
    whole, _ = fit([])
    same = [fit([SGDNoise(1)], trunk.path(point))[0] for _ in range(2)]
    other, trainer = fit([SGDNoise(2)], trunk.path(point))
    assert equal(*same)
    assert not equal(same[0], other)
    assert not equal(other, whole)
    left = EPOCHS * STEPS - trunk.steps[point]
    assert trainer.global_step == EPOCHS * STEPS
    assert len(other.seen) == left
    first = [torch.cat(module.seen[: left % STEPS or STEPS]).tolist() for module in (same[0], other, whole)]
    assert first[0] != first[1]  # already in the epoch under way
    assert all(len(set(order)) == len(order) for order in first)  # no example twice in it


@pytest.mark.parametrize("ticket", [False, True])
def test_an_interrupted_branch_goes_on_exactly(trunk: BranchPoints, ticket: bool, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [SGDNoise(5), *([TrainTicket(make_ticket(trunk, tmp_path))] if ticket else [])]

    whole, _ = fit(callbacks(), trunk.path("2st"))
    with pytest.raises(RuntimeError, match="killed"):
        fit([*callbacks(), KillAfter(tmp_path / "last.ckpt", 1)], trunk.path("2st"))
    resumed, trainer = fit(callbacks(), tmp_path / "last.ckpt")
    assert trainer.global_step == EPOCHS * STEPS
    assert equal(whole, resumed)
    if ticket:
        assert int((resumed.net[0].weight == 0).sum()) == 16


def make_ticket(trunk: BranchPoints, folder: Path, shift: float = 0.0) -> Path:
    state = torch.load(trunk.path("2st"), weights_only=True)["state_dict"]
    masks = MaskSet({"net.0.weight": torch.arange(32).view(8, 4) % 2 == 0})
    module = Noisy()
    module.load_state_dict(state)
    module.net[0].weight.data += shift
    masks.apply_(module)
    save_ticket(folder / "ticket.safetensors", Ticket(masks, module.state_dict(), {"round": 1}))
    return folder / "ticket.safetensors"


def test_a_ticket_is_trained_under_its_mask(trunk: BranchPoints, tmp_path: Path) -> None:
    branch, _ = fit([SGDNoise(1), TrainTicket(make_ticket(trunk, tmp_path))], trunk.path("2st"))
    pruned = torch.arange(32).view(8, 4) % 2 == 1
    assert not branch.net[0].weight[pruned].any()
    dense, _ = fit([SGDNoise(1)], trunk.path("2st"))
    assert not equal(branch, dense)
    assert all(torch.equal(one, two) for one, two in zip(branch.seen, dense.seen, strict=True))


def test_a_ticket_of_another_training_is_named(trunk: BranchPoints, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"kept weights of net\.0\.weight are not those"):
        fit([SGDNoise(1), TrainTicket(make_ticket(trunk, tmp_path, shift=0.5))], trunk.path("2st"))
    masks = MaskSet({"other.weight": torch.ones(2, 2) > 0})
    save_ticket(tmp_path / "foreign.safetensors", Ticket(masks, {"other.weight": torch.ones(2, 2)}))
    with pytest.raises(MaskMismatchError, match="belongs to another network"):
        fit([SGDNoise(1), TrainTicket(tmp_path / "foreign.safetensors")], trunk.path("2st"))


# ------------------------------------------------------------------ the command

RECIPE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_prune.experiments.ImageClassifier",
        "init_args": {
            "network": {"class_path": "lightning_prune.experiments.SmallConvNet", "init_args": {"width": 0.125}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2, "momentum": 0.9}},
        },
    },
    "data": {"class_path": "lightning_prune.experiments.Digits", "init_args": {"batch_size": 128}},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 5,
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": "imp"},
        },
        "callbacks": [
            {"class_path": "lightning_prune.IterativeMagnitudePruner", "init_args": {"rounds": 2, "fraction": 0.5}},
            {"class_path": "lightning_prune.WeightRewind", "init_args": {"to": "3st"}},
            {"class_path": "lightning_prune.LRRewind", "init_args": {"to": "3st"}},
            {"class_path": "lightning_prune.TicketWriter"},
            {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
        ],
    },
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-prune"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def command(recipe: Path, *arguments: str) -> None:
    main(["connectivity", "--config", str(recipe), "--points", "3", *arguments])


def lines(folder: str) -> list[dict[str, Any]]:
    return json.loads(Path(folder, "connectivity.json").read_text())["lines"]


def times(folder: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.safetensors")}


def test_the_command_trains_measures_and_draws(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--out", "out", "--at", "0st,50%", "--seeds", "2", "--align"]
    plane = ["--plane", "2"]
    command(recipe, *options, *plane)
    found = lines("out")
    assert len(found) == 2 * 2 * 2 * 2  # seeds, points, BatchNorm, aligned or not
    assert {(line["at"], line["step"], line["end"]) for line in found} == {("0st", 0, 20), ("50%", 10, 20)}
    for line in found:
        for split, errors in line["errors"].items():
            assert len(errors) == 3
            assert line["barriers"][split] == pytest.approx(max(errors) - (errors[0] + errors[-1]) / 2)
    assert any(line["barriers"]["test"] > 0 for line in found)
    assert {"lines.svg", "barrier-against-step.svg", "connectivity.md"} <= {p.name for p in Path("out").iterdir()}
    assert "| 10 | 100.00 % | recalibrate, aligned | 2 x 1 |" in Path("out/connectivity.md").read_text()
    assert "<svg" in Path("out/lines.svg").read_text()
    check_planes(found)

    before = times("out")
    assert len(before) == 8
    capsys.readouterr()
    command(recipe, *options, "--no-pictures")  # nothing is trained again
    assert capsys.readouterr().out.count("done before") == 10
    assert (times("out"), lines("out")) == (before, found)

    (Path("out/seed1/50pct/copy1") / "end.safetensors").unlink()
    for measured in Path("out/seed1/50pct").glob("line*.json"):
        measured.unlink()
    command(recipe, *options, "--no-pictures")  # what is missing is made again, and comes out the same
    assert lines("out") == found
    with pytest.raises(SystemExit):
        command(recipe, *options, "--trainer.max_epochs=3")
    assert "another overrides" in capsys.readouterr().err


def check_planes(found: list[dict[str, Any]]) -> None:
    """Two corners of a plane are the ends of the line, the third the network from which both branched."""
    assert {path.name for path in Path("out").glob("plane-*.svg")} == {"plane-seed0-0st.svg", "plane-seed0-50pct.svg"}
    for line in found:
        if line["seed"] == 0 and line["batch_norm"] == "recalibrate" and not line["aligned"]:
            place = line["at"].replace("%", "pct")
            plane = json.loads(Path(f"out/seed0/{place}/plane0-1.json").read_text())
            for split, errors in line["errors"].items():
                a, b, start = plane["corners"][split]
                assert (b, a) == (errors[0], errors[-1])
                assert start > max(a, b)


def test_copies_that_share_noise_have_no_barrier(recipe: Path) -> None:
    command(recipe, "--out", "out", "--at", "0st,3st", "--seeds", "1", "--same_noise", "--no-pictures")
    found = lines("out")
    assert len(found) == 4
    for line in found:
        assert line["barriers"] == {"train": 0.0, "test": 0.0}
        assert len(set(line["errors"]["test"])) == 1


def test_every_run_is_a_command_of_its_own(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--out", "out", "--at", "3st", "--seeds", "1", "--no-pictures"]
    command(recipe, *options, "--list")
    listed = capsys.readouterr().out.splitlines()
    assert [line.rpartition("--only ")[2] for line in listed] == ["seed0/trunk", "seed0/3st/copy0", "seed0/3st/copy1"]
    assert all(line.startswith("to do") for line in listed)
    with pytest.raises(SystemExit):
        command(recipe, *options, "--only", "seed0/3st/copy1")
    assert "run seed0/trunk first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(recipe, *options, "--only", "seed7/trunk")
    assert "there is no such run" in capsys.readouterr().err
    for name in ("seed0/trunk", "seed0/3st/copy1"):
        command(recipe, *options, "--only", name)
    capsys.readouterr()
    command(recipe, *options, "--list")
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["done ", "to do", "done "]
    before = times("out")
    command(recipe, *options)
    assert times("out").items() >= before.items()
    assert len(lines("out")) == 2


def test_tickets_of_a_run_branch_at_their_rewinding_point(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    main(["fit", "--config", str(recipe), "--seed_everything", "4"])
    run = "runs/imp/version_0"
    command(recipe, "--out", "out", "--tickets", run, "--splits", "test")
    found = lines("out")
    assert "kept weights" not in capsys.readouterr().err
    assert {(line["seed"], line["step"], line["round"], line["density"]) for line in found} == {
        (4, 3, 1, 0.5), (4, 3, 2, 0.25)
    }  # fmt: skip
    assert {"lines.svg", "barrier-against-density.svg"} <= {path.name for path in Path("out").iterdir()}

    ticket = Path(run, "tickets", "round-01.safetensors")
    ticket.write_bytes(Path(run, "tickets", "round-02.safetensors").read_bytes())  # both are now of round 2
    ticket.rename(ticket.with_name("round-02.safetensors"))
    with pytest.raises(ConfigError, match="as an earlier run"):
        find_tickets([Path(run), Path(run)])
    settings = Settings([], [], [4], tickets={4: [(1, "3st", str(ticket.with_name("round-02.safetensors")))]})
    with pytest.raises(ConfigError, match="holds branches of a ticket with other masks"):
        Analysis(Path("out"), recipe, settings)


def test_tickets_of_one_seed_may_differ_in_their_rewinding_point(recipe: Path, tmp_path: Path) -> None:
    for point in ("0st", "3st"):
        content = yaml.safe_load(recipe.read_text())
        content["trainer"]["callbacks"][0]["init_args"]["rounds"] = 1
        for callback in content["trainer"]["callbacks"][1:3]:
            callback["init_args"]["to"] = point
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        main(["fit", "--config", str(tmp_path / "run.yaml"), "--seed_everything", "4"])
    runs = [f"runs/imp/version_{number}" for number in (0, 1)]
    command(recipe, "--out", "out", "--tickets", *runs, "--splits", "test", "--no-pictures")
    assert {(line["seed"], line["step"], line["round"]) for line in lines("out")} == {(4, 0, 1), (4, 3, 1)}


def test_what_cannot_be_analysed_is_named(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(FileFormatError, match="cannot be read as a recipe"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(FileFormatError, match="is no recipe"):
        read_recipe(tmp_path / "list.yaml")
    settings = Settings([], ["0st"], [0], copies=1)
    with pytest.raises(ConfigError, match="copies=1"):
        Analysis(tmp_path / "out", recipe, settings)
    with pytest.raises(ConfigError, match="at='soon' is not a time"):
        Analysis(tmp_path / "out", recipe, Settings([], ["soon"], [0]))
    with pytest.raises(FileFormatError, match="does not exist"):
        find_tickets([tmp_path])
    for change, message in (
        ({"points": 1}, "points=1"),
        ({"splits": ["val"]}, "splits=val: choose from train and test"),
        ({"calibration_batches": 0}, "calibration_batches=0"),
        ({"seeds": []}, "seeds=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Analysis(tmp_path / "out", recipe, Settings(**({"overrides": [], "at": [], "seeds": [0]} | change)))
    with pytest.raises(SystemExit):
        command(recipe, "--plane", "1")
    assert "--plane 1: expected places in each direction" in capsys.readouterr().err


def test_a_trunk_keeps_what_it_has_and_a_damaged_point_is_refused(recipe: Path, tmp_path: Path) -> None:
    out, trunk = tmp_path / "out", Unit(0)
    for at in (["0st"], ["2st"]):
        Analysis(out, recipe, Settings([], at, [0])).run(trunk)
    later = Analysis(out, recipe, Settings([], ["0st", "2st"], [0]))
    assert later.is_done(trunk)
    assert [later.step(Unit(0, at)) for at in ("0st", "2st")] == [0, 2]
    point = out / "seed0" / "trunk" / "points" / "2st.ckpt"
    content = bytearray(point.read_bytes())
    content[len(content) // 2] ^= 0xFF
    point.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"2st\.ckpt is damaged"):
        later.run(Unit(0, "2st"))


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_errors_are_measured_in_the_recipes_precision(
    recipe: Path, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    settings = Settings([f"--trainer.precision={precision}"], ["0st"], [0], splits=["test"])
    measuring = Measuring(Analysis(tmp_path / "out", recipe, settings))
    seen: list[torch.dtype] = []
    measuring.model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert 0 < measuring.error(measuring.model)["test"] < 1
    assert set(seen) == {dtype}


def test_callbacks_that_prune_or_stop_are_left_out(recipe: Path) -> None:
    built = Built(recipe, [], 0)
    assert built.dropped == ["IterativeMagnitudePruner", "WeightRewind", "LRRewind", "TicketWriter", "ModelCheckpoint"]
    kinds = {type(callback).__name__ for callback in built.trainer(Path("out"), []).callbacks}
    assert "LearningRateMonitor" in kinds
    assert not kinds & set(built.dropped)
