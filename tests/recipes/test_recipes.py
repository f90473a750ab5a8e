"""Every recipe is read, its classes are built, and it trains a few batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    IterativeMagnitudePruner,
    LearnedSupermask,
    MaskSet,
    Ticket,
    experiments,
    prunable_parameters,
    save_ticket,
)
from lightning_prune.callbacks.remover import ChannelRemover
from lightning_prune.cli import PruneCLI, main
from lightning_prune.experiments import LeNet300100
from lightning_prune.record import RunRecord
from lightning_prune.sweep.facts import NetworkFacts, build
from lightning_prune.sweep.planning import plan_arms
from lightning_prune.sweep.schema import read_sweep
from tests._helpers.wandb_runs import read_runs

ROOT = Path(__file__).parents[2]
FRAGMENTS = sorted((ROOT / "recipes" / "loggers").glob("*.yaml"))
SWEEPS = [ROOT / "recipes" / "sweep" / "cifar10.yaml"]
PARTS = [p for p in sorted((ROOT / "recipes" / "sweep").glob("*.yaml")) if p.stem != "train" and p not in SWEEPS]
ALONE = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if p not in (*FRAGMENTS, *SWEEPS, *PARTS)]
RECIPES = [*ALONE, *PARTS]
CONVNEXT = {"class_path": "lightning_prune.experiments.convnext_cifar", "init_args": {"patch_size": 2}}


class RandomImages(LightningDataModule):
    """Noise in the shape of a recipe's data, so that the recipe runs where the data is not."""

    def __init__(self, shape: tuple[int, ...], num_classes: int, watch_test: bool) -> None:
        super().__init__()
        self.shape, self.num_classes, self.watch_test = shape, num_classes, watch_test

    def _loader(self, n: int) -> DataLoader:
        x, y = torch.randn(n, *self.shape), torch.randint(self.num_classes, (n,))
        return DataLoader(TensorDataset(x, y), 4)

    def train_dataloader(self) -> DataLoader:
        return self._loader(24)

    def val_dataloader(self) -> Any:
        return [self._loader(4), self._loader(4)] if self.watch_test else self._loader(4)

    def test_dataloader(self) -> DataLoader:
        return self._loader(4)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 6


def content_of(path: Path) -> dict[str, Any]:
    """A recipe; a part of the sweep on top of the training that it is a part of, on a network that it suits."""
    recipe = yaml.safe_load(path.read_text())
    if path not in PARTS:
        return recipe
    assert recipe.keys() == {"trainer"}
    assert recipe["trainer"].keys() == {"callbacks"}
    callbacks = recipe["trainer"]["callbacks"]
    whole = yaml.safe_load((path.parent / "train.yaml").read_text())
    whole["trainer"]["callbacks"] = callbacks if isinstance(callbacks, list) else [callbacks]
    if path.stem in ("gates", "blocks"):
        whole["model"]["init_args"]["network"] = CONVNEXT
    return whole


def test_the_sweep_has_an_arm_for_every_method_that_suits_a_network() -> None:
    sweep = read_sweep(SWEEPS[0])
    facts = NetworkFacts((3, 16, 16), 64, 1000, 50, {"50": 0.5, "25": 0.25}, {"50": 480, "25": 240})
    names = ([*sweep.networks], [*sweep.methods])
    arms = plan_arms(sweep, dict.fromkeys(sweep.networks, facts), *names, sweep.budgets, sweep.seeds)
    for name, network in sweep.networks.items():
        mine = {arm.method.name for arm in arms if arm.network.name == name}
        assert mine >= {"dense", "continued", "l1", "random", "weight_rewinding", "scratch", "narrowed"}
        assert ("slimming" in mine) != ("gates" in mine)
        built = build(network.spec())
        assert built.eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
        norms = any(isinstance(module, torch.nn.BatchNorm2d) for module in built.modules())
        assert norms == ("slimming" in mine)
    assert {recipe.stem for arm in arms if (recipe := arm.method.recipe)} | {"sparsity"} == {p.stem for p in PARTS}


@pytest.mark.parametrize("path", [*RECIPES, *SWEEPS], ids=lambda p: p.stem)
def test_header_says_what_paper_command_and_result(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    for part in ("What:", "Paper:", "Command:"):
        assert part in text, part
    assert f"recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" in text


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda p: p.stem)
def test_a_fragment_says_what_it_does_and_sets_nothing_but_the_logger(path: Path) -> None:
    text = path.read_text()
    assert "What:" in text
    assert f"Command: lightning-prune fit --config recipes/quickstart.yaml --config recipes/loggers/{path.name}" in text
    assert yaml.safe_load(text)["trainer"].keys() == {"logger"}


@pytest.mark.filterwarnings("ignore:.*num_workers.*")
@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_wandb_fragment_logs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The command in its header, on less data: a run of its own each time, and the same id when resumed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-prune"])
    monkeypatch.setenv("WANDB_SILENT", "true")

    def rounds(number: int) -> list[str]:
        recipe = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
        recipe["trainer"]["callbacks"][0]["init_args"]["rounds"] = number
        return ["fit", "--config", str(small_copy(recipe, tmp_path)), "--config", str(FRAGMENTS[0]), *options]

    options = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "10", "--trainer.limit_val_batches", "2"]
    options += ["--trainer.limit_test_batches", "2", "--trainer.enable_progress_bar", "false"]
    for _ in range(2):
        main([*rounds(1), "--test_after_fit", "false"])
        wandb.finish()
    first, second = read_runs(tmp_path / "runs" / "wandb")
    assert first.run_id != second.run_id
    for run in (first, second):
        folder = tmp_path / "runs" / "lightning-prune" / run.run_id
        assert (folder / "config.yaml").is_file()
        assert [row["prune/round"] for row in run.rows("prune/round")] == [1]
        assert list(run.logged_artifacts()) == [f"ticket-{run.run_id}:round-01"]
    last = tmp_path / "runs" / "lightning-prune" / first.run_id / "checkpoints" / "last.ckpt"
    main([*rounds(2), "--ckpt_path", str(last)])
    wandb.finish()
    resumed = [run for run in read_runs(tmp_path / "runs" / "wandb") if run.run_id == first.run_id]
    assert len(resumed) == 2
    assert [row["prune/round"] for row in resumed[1].rows("prune/round")] == [2]
    assert len(RunRecord.read(last.parents[1]).rounds) == 3
    assert f"runs/lightning-prune/{first.run_id}" in capsys.readouterr().out


def small_copy(recipe: dict[str, Any], folder: Path) -> Path:
    """The recipe without downloads, with two passes at most and as many images as the noise has."""
    network = recipe["model"]["init_args"]["network"]
    if network["class_path"].endswith("torchvision_model"):
        network.get("init_args", {}).pop("weights", None)
    if network["class_path"].endswith("trained"):  # by an earlier run, which the header names
        inner = network["init_args"]["network"]
        built = getattr(experiments, inner["class_path"].rsplit(".", 1)[1])(**inner["init_args"])
        weights = folder / network["init_args"]["weights"]
        weights.parent.mkdir(parents=True)
        torch.save({"state_dict": {f"network.{n}": t for n, t in built.state_dict().items()}}, weights)
    for callback in recipe["trainer"].get("callbacks", []):
        options = callback.get("init_args", {})
        for name, length in (("at", 2), ("budget", 2)):
            if isinstance(options.get(name), list):
                options[name] = options[name][:length]
        if "images" in options:
            options["images"] = 8
    copy = folder / "recipe.yaml"
    copy.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return copy


@pytest.mark.filterwarnings("ignore:.*ends before a round does")
@pytest.mark.filterwarnings("ignore:the scales have not separated")
@pytest.mark.filterwarnings("ignore:feature ranks carry no order")
@pytest.mark.filterwarnings("ignore:.*was not logged in validation")
@pytest.mark.filterwarnings("ignore:.*num_workers.*")
@pytest.mark.filterwarnings("ignore:cut .* removes the last weights")  # classifiers that have hardly left a small start
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_a_few_batches(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-prune"])
    recipe = content_of(path)
    pruner = recipe["trainer"].get("callbacks", [{}])[0].get("init_args", {})
    if "masks_from" in pruner:
        network = torch.nn.ModuleDict({"network": LeNet300100()})
        masks = MaskSet({n: torch.rand_like(p) > 0.5 for n, p in prunable_parameters(network).items()})
        for number in range(1, pruner["rounds"] + 1):
            ticket = Ticket(masks, dict(network.named_parameters()), {"round": number})
            save_ticket(Path(pruner["masks_from"]) / "tickets" / f"round-{number:02d}.safetensors", ticket)
    classes = recipe["model"]["init_args"].get("num_classes", 10)
    name = recipe["data"]["class_path"].rsplit(".", 1)[1]
    shape = {"Digits": (1, 8, 8), "MNIST": (1, 28, 28), "CIFAR10": (3, 32, 32), "ImageFolders": (3, 64, 64)}[name]
    watch = recipe["data"].get("init_args", {}).get("watch_test", False)
    options = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    options += ["--trainer.enable_model_summary=false", "--trainer.precision=32-true"]
    cli = PruneCLI(
        run=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        args=["--config", str(small_copy(recipe, tmp_path)), *options],
    )
    before = sum(p.numel() for p in cli.model.parameters())
    cli.trainer.fit(cli.model, datamodule=RandomImages(shape, classes, watch))
    learn = next((c for c in cli.trainer.callbacks if isinstance(c, LearnedSupermask)), None)
    if learn is not None:
        assert cli.trainer.global_step == 1
        assert learn.masks is not None
        assert 0.05 < learn.masks.density < 0.95
        assert all(torch.equal(cli.model.get_parameter(n) != 0, mask) for n, mask in learn.masks.items())
        return
    remover = next((c for c in cli.trainer.callbacks if isinstance(c, ChannelRemover)), None)
    if remover is not None:
        assert cli.trainer.global_step == remover.rounds + 1
        assert sum(p.numel() for p in cli.model.parameters()) < before
        return
    found = next((c for c in cli.trainer.callbacks if isinstance(c, IterativeMagnitudePruner)), None)
    if found is None:  # a recipe for another command, or a control, which trains as it is
        assert cli.trainer.global_step == 1
        return
    assert found.masks is not None
    assert cli.trainer.global_step == pruner["rounds"] + 1
    left = found.masks.density
    assert left < 0.9
    weights = {n: p for n, p in cli.model.named_parameters() if n in found.masks}
    assert all(not weights[n][~mask].any() for n, mask in found.masks.items())
