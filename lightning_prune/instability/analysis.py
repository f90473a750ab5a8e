"""Instability analysis: one trunk a seed, branches that differ in SGD noise, lines between their ends."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_prune.checkpoint import load_ticket
from lightning_prune.errors import ConfigError, PruneError
from lightning_prune.files import atomic_write, read_checkpoint, read_json, read_tensors, write_json, write_tensors
from lightning_prune.instability.branches import STEPS, BranchPoints, SGDNoise, TrainTicket, file_name
from lightning_prune.instability.recipe import Built, read_recipe
from lightning_prune.instability.share import Share, processes, share_of
from lightning_prune.record import RunRecord
from lightning_prune.times import TrainTime

SETTINGS = "analysis.json"
RECIPE = "recipe.yaml"
TICKET = "ticket.json"
SPLITS = {"train", "test"}
_FORMAT = "lightning_prune.instability"
_KIND = "solution"


@dataclass(frozen=True)
class Unit:
    """One run: a trunk, or a branch of it.

    Args:
        seed: Of the trunk.
        at: Where the branch begins; ``None``: the trunk.
        copy: Which of the copies.
        ticket: Its ticket, for a sparse branch.
        round: The ticket's round; 0: dense.
    """

    seed: int
    at: str | None = None
    copy: int = 0
    ticket: str | None = None
    round: int = 0

    @property
    def name(self) -> str:
        """Its folder within the analysis."""
        if self.at is None:
            return f"seed{self.seed}/trunk"
        kind = f"-round{self.round:02d}" if self.ticket else ""
        return f"seed{self.seed}/{file_name(self.at)}{kind}/copy{self.copy}"


@dataclass
class Settings:
    """What an analysis is made of.

    Attributes:
        overrides: Arguments of the command line that change the recipe.
        at: Points at which dense networks branch, as text.
        seeds: Of the trunks.
        copies: Branches at each point.
        tickets: ``{seed: [(round, point, path of the ticket)]}``.
        same_noise: The control: all copies of a point get one seed of noise.
        points: Places on each line.
        splits: Data on which errors are measured: ``"train"``, ``"test"``.
        align: Whether to measure lines to an aligned copy as well.
        calibration_batches: Batches of training data on which BatchNorm statistics are estimated anew.
    """

    overrides: list[str]
    at: list[str]
    seeds: list[int]
    copies: int = 2
    tickets: dict[int, list[tuple[int, str, str]]] = field(default_factory=dict)
    same_noise: bool = False
    points: int = 30
    splits: list[str] = field(default_factory=lambda: ["train", "test"])
    align: bool = False
    calibration_batches: int = 20


class Analysis:
    """The folder of an analysis, and what is done in it.

    Args:
        folder: Where trunks, branches and results are.
        recipe: The recipe; copied into the folder.
        settings: What is to be done.

    Raises:
        ConfigError: The folder holds an analysis of another recipe, or settings that make no sense.
    """

    def __init__(self, folder: Path, recipe: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        if settings.copies < 2:
            raise ConfigError(f"copies={settings.copies}: a line needs two; give at least 2.")
        if not settings.seeds:
            raise ConfigError("seeds=0: no training; give at least 1.")
        if settings.points < 2 or settings.calibration_batches < 1:
            raise ConfigError(
                f"points={settings.points}, calibration_batches={settings.calibration_batches}: expected at least 2 "
                "places on a line and at least 1 batch."
            )
        if not settings.splits or not set(settings.splits) <= SPLITS:
            raise ConfigError(f"splits={','.join(settings.splits)}: choose from train and test.")
        for time in settings.at:
            TrainTime.parse(time, "at")
        self._claim(recipe)
        for unit in self.units():
            if unit.ticket:
                self._claim_ticket(unit)

    def _claim(self, recipe: Path) -> None:
        """Write recipe and fixed settings, or see that they are the ones the folder was begun with."""
        import yaml

        content = {
            "format": _FORMAT,
            "version": 1,
            "recipe": read_recipe(recipe),
            "overrides": self.settings.overrides,
            "same_noise": self.settings.same_noise,
        }
        path = self.folder / SETTINGS
        if path.exists():
            earlier = read_json(path, "the settings of an instability analysis")
            changed = [key for key, value in content.items() if earlier.get(key) != value]
            if changed:
                raise ConfigError(
                    f"{self.folder} holds an analysis with another {' and '.join(changed)}; finished runs of it cannot "
                    "be mixed with new ones. Choose another folder with --out, or give the same arguments."
                )
            return
        with atomic_write(self.folder / RECIPE) as temporary:
            temporary.write_text(yaml.safe_dump(content["recipe"], sort_keys=False), encoding="utf-8")
        write_json(path, content)  # last, for processes that begin together

    def _claim_ticket(self, unit: Unit) -> None:
        """Keep which masks a ticket's branches have, or see that they are those."""
        assert unit.ticket is not None
        path = self.path(unit).parent / TICKET
        content = {"masks": load_ticket(unit.ticket).masks.digest()}
        if not path.exists():
            write_json(path, content)
        elif read_json(path, "the digest of a ticket's masks") != content:
            raise ConfigError(
                f"{path.parent} holds branches of a ticket with other masks than {unit.ticket}. Choose another folder "
                "with --out."
            )

    # --------------------------------------------------------------------- runs

    def points(self, seed: int) -> list[str]:
        """Points at which the trunk of a seed is kept."""
        dense = list(self.settings.at)
        return list(dict.fromkeys(dense + [at for _, at, _ in self.settings.tickets.get(seed, [])]))

    def units(self) -> list[Unit]:
        """Every run, trunks before their branches."""
        found = []
        for seed in self.settings.seeds:
            found.append(Unit(seed))
            for copy in range(self.settings.copies):
                found += [Unit(seed, at, copy) for at in self.settings.at]
                found += [
                    Unit(seed, at, copy, path, number) for number, at, path in self.settings.tickets.get(seed, [])
                ]
        return found

    def path(self, unit: Unit) -> Path:
        """The folder of a run."""
        return self.folder / unit.name

    def is_done(self, unit: Unit) -> bool:
        """Whether a run has finished: the trunk has all points, a branch has its end."""
        if unit.at is None:
            points = self._branch_points(unit.seed)
            return all(points.path(point).exists() for point in points.at)
        return (self.path(unit) / "end.safetensors").exists()

    def _branch_points(self, seed: int) -> BranchPoints:
        times = [TrainTime.parse(point, "at") for point in self.points(seed)]
        return BranchPoints(times, self.folder / f"seed{seed}" / "trunk" / "points")

    def run(self, unit: Unit) -> None:
        """Train a trunk to its last point, or a branch to its end; a branch goes on from its last checkpoint.

        Raises:
            ConfigError: A branch whose trunk has not reached its point.
        """
        folder = self.path(unit)
        built = self.build(unit.seed)
        points = self._branch_points(unit.seed)
        if unit.at is None:
            trainer = built.trainer(folder, [SGDNoise(), points])
            trainer.fit(built.model, datamodule=built.data)
            if not self.is_done(unit):
                raise PruneError(f"{unit.name} ended before its last branch point; see {folder}.")
            return
        last = folder / "checkpoints" / "last.ckpt"
        start = last if last.exists() else points.path(unit.at)
        if not start.exists():
            raise ConfigError(
                f"{unit.name} branches from {start}, which is not there: run seed{unit.seed}/trunk first."
            )
        read_checkpoint(start)  # Lightning would run code that is in it
        ticket = [TrainTicket(Path(unit.ticket))] if unit.ticket else []
        keep = ModelCheckpoint(last.parent, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        trainer = built.trainer(folder, [SGDNoise(self.noise(unit)), *ticket, keep])
        trainer.fit(built.model, datamodule=built.data, ckpt_path=start)
        if not trainer.state.finished:
            raise PruneError(f"{unit.name} was interrupted; the same command goes on from its last epoch.")
        if trainer.is_global_zero:
            state = {n: v for n, v in built.model.state_dict().items() if isinstance(v, Tensor)}
            header = {"unit": unit.name, "steps": trainer.global_step}
            write_tensors(folder / "end.safetensors", state, kind=_KIND, version=1, header=header)
            last.unlink(missing_ok=True)

    def start(self, branch: Unit) -> dict[str, Tensor]:
        """The state at which a branch begins: its trunk's, with the ticket's mask and weights for a sparse one."""
        assert branch.at is not None
        state = read_checkpoint(self._branch_points(branch.seed).path(branch.at))["state_dict"]
        if not branch.ticket:
            return state
        model = self.build(branch.seed).model
        model.load_state_dict(state)
        load_ticket(branch.ticket).apply_(model)
        return model.state_dict()

    def share(self) -> Share:
        """Which part of the analysis this process does."""
        if processes() == 1:
            return Share()
        trainer = self.build(self.settings.seeds[0]).trainer(self.folder, [])
        return share_of(trainer.num_devices * trainer.num_nodes)

    def build(self, seed: int) -> Built:
        """Model, data and Trainer of the recipe."""
        return Built(self.folder / RECIPE, self.settings.overrides, seed)

    def step(self, branch: Unit) -> int:
        """The optimizer step at which a branch begins."""
        steps = read_json(self._branch_points(branch.seed).dirpath / STEPS, "the steps of branch points")
        return int(steps[branch.at])

    def end(self, branch: Unit) -> tuple[dict[str, Tensor], int]:
        """The state that a finished branch has reached, and at which step."""
        state, header = read_tensors(self.path(branch) / "end.safetensors", kind=_KIND, version=1)
        return state, int(header["steps"])

    def noise(self, unit: Unit) -> int:
        """Seed of a branch's SGD noise."""
        return 1_000_000 + unit.seed * 1000 + (0 if self.settings.same_noise else unit.copy)

    def settings_json(self) -> dict[str, Any]:
        """The settings as JSON content."""
        return asdict(self.settings) | {"recipe": read_recipe(self.folder / RECIPE)}


def find_tickets(folders: Sequence[Path]) -> dict[int, list[tuple[int, str, str]]]:
    """The tickets of finished runs, by the run's seed: (round, where its rewinding point is, path).

    Raises:
        ConfigError: Runs without a seed, without tickets, whose tickets were not rewound, or of one seed and one
            rewinding point.
    """
    found: dict[int, list[tuple[int, str, str]]] = {}
    for folder in folders:
        record = RunRecord.read(folder)
        paths = sorted((folder / "tickets").glob("round-*.safetensors"))
        if record.seed is None or not paths:
            raise ConfigError(
                f"{folder} has {'no tickets' if not paths else 'no seed'}; expected a run with TicketWriter."
            )
        own = []
        for path in paths:
            info = load_ticket(path).info
            if info.get("rewound_to_step") is None:
                raise ConfigError(f"{path} was not rewound, so no training starts from it; use runs with WeightRewind.")
            own.append((int(info["round"]), f"{info['rewound_to_step']}st", str(path.resolve())))
        known = {(number, at) for number, at, _ in found.get(record.seed, [])}
        if known & {(number, at) for number, at, _ in own}:
            raise ConfigError(
                f"{folder} has seed {record.seed} and rewound to {own[0][1]}, as an earlier run; give runs that differ "
                "in one of them."
            )
        found.setdefault(record.seed, []).extend(own)
    return found
