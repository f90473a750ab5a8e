"""The command ``lightning-prune``: LightningCLI's subcommands (fit, validate, test, predict) on recipes."""

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities.model_helpers import is_overridden

import lightning_prune.experiments  # noqa: F401  (its classes can then be named without their path)
from lightning_prune.callbacks.claims import claim, give_up
from lightning_prune.callbacks.folders import run_folder
from lightning_prune.callbacks.learned import LearnedSupermask
from lightning_prune.callbacks.pruner import RoundPruner
from lightning_prune.callbacks.remover import COMPACT_NAME
from lightning_prune.errors import ConfigError, FileFormatError, PruneError
from lightning_prune.files import load_archive
from lightning_prune.recipes import RecipeCLI, reading, split_trust
from lightning_prune.record import JSON_NAME, RunRecord

COMMANDS = {
    "channels": "lightning_prune.commands.channels",
    "compare": "lightning_prune.commands.compare",
    "connectivity": "lightning_prune.commands.connectivity",
    "export": "lightning_prune.commands.export",
    "models": "lightning_prune.commands.models",
    "profile": "lightning_prune.commands.profile",
    "report": "lightning_prune.commands.report",
    "sweep": "lightning_prune.commands.sweep",
    "sweep-report": "lightning_prune.commands.sweep_report",
    "wandb-report": "lightning_prune.commands.wandb_report",
}
"""Commands beside LightningCLI's, by the module whose ``main`` takes their arguments."""


class SaveRecipe(SaveConfigCallback):
    """Save the recipe beside the run; a resumed run writes into the folder it has had before."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``config.yaml``, over an earlier one only when resuming."""
        self.overwrite = self.overwrite or self.config.get("ckpt_path") is not None
        folder = run_folder(trainer)
        if stage == "fit" and folder is not None:
            claim(trainer, folder)  # another run that starts at this moment has chosen the same number
        if folder is None or trainer.loggers[0].log_dir is not None:
            super().setup(trainer, pl_module, stage)
            return
        # a logger without a folder of its own, such as W&B's: Lightning would write every run's into one place
        if trainer.is_global_zero and not self.already_saved:
            folder.mkdir(parents=True, exist_ok=True)
            path = str(folder / self.config_filename)
            self.parser.save(self.config, path, skip_none=False, overwrite=self.overwrite, multifile=self.multifile)
        self.already_saved = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Free the folder."""
        give_up(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the folder."""
        if stage == "fit":
            give_up(trainer)


class PruneCLI(RecipeCLI):
    """LightningCLI that tests once after a fit, adds the result to the record and says where the files are."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="Evaluate the last round's network on test data once."
        )
        parser.description = (
            "A recipe may name classes of lightning_prune, Lightning, torch, torchvision and torchmetrics; others with "
            "--trust PACKAGE, on the command line only."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then look at the checkpoint before anything is built."""
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        if command and self.config[command].get("weights_only") is False:
            raise ConfigError(
                "weights_only: false would let a checkpoint run code; the command line does not read such checkpoints. "
                "Load it in a program of your own."
            )
        checkpoint = self.config[command].get("ckpt_path") if command else None
        if checkpoint and checkpoint not in ("best", "last", "hpc"):
            check_checkpoint(Path(checkpoint))

    def before_instantiate_classes(self) -> None:
        """Let a resumed run go on in its folder, where the recipe's logger numbers its runs."""
        if self.subcommand != "fit":
            return
        config = self.config["fit"]
        checkpoint, logger = config.get("ckpt_path"), config["trainer"].get("logger")
        if not checkpoint or not hasattr(logger, "init_args"):
            return
        folder = Path(checkpoint).resolve().parent.parent
        settings = logger.init_args
        name = settings.get("name")
        if str(logger.class_path).rpartition(".")[2] == "WandbLogger":  # its folder is named by the project
            name = settings.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
        home = Path(str(settings.get("save_dir")), str(name)).resolve()
        if (folder / JSON_NAME).exists() and folder.parent == home and settings.get("version") is None:
            settings["version"] = folder.name

    def before_fit(self) -> None:
        """Tell the callbacks that write a record which recipe this is."""
        recipes = ", ".join(str(path) for path in self.config["fit"].get("config") or [])
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RoundPruner | LearnedSupermask):
                callback.recipe = recipes or None

    def after_fit(self) -> None:
        """Evaluate on test data, complete the record, and say where everything is."""
        pruners = [c for c in self.trainer.callbacks if isinstance(c, RoundPruner | LearnedSupermask)]  # type: ignore[attr-defined]
        folder = pruners[0].folder if pruners else None
        has_test = self.datamodule is not None and is_overridden("test_dataloader", self.datamodule)
        if self.config["fit"].test_after_fit and has_test and is_overridden("test_step", self.model):
            metrics = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)[0]
            if folder is not None and self.trainer.is_global_zero:
                record = RunRecord.read(folder)
                record.final = {name: float(value) for name, value in metrics.items()}
                record.write(folder)
            self._say("after the last round: " + ", ".join(f"{k} {v:.4f}" for k, v in sorted(metrics.items())))
        if folder is not None and self.trainer.is_global_zero:
            self._say(closing_lines(folder))

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text)


def check_checkpoint(path: Path) -> None:
    """See that a checkpoint can be read, without running code from it.

    Raises:
        FileFormatError: It is missing, damaged, or holds objects that only code could restore.
    """
    try:
        load_archive(path)
    except FileFormatError as error:
        raise FileFormatError(f"--ckpt_path: {error}") from error


def closing_lines(folder: Path) -> str:
    """Where a run's files are, and what to try next."""
    lines = [f"\nThis run is in {folder}:", f"  record of every round   {JSON_NAME}, rounds.csv"]
    tickets = sorted((folder / "tickets").glob("*.safetensors"))
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    compact = (folder / COMPACT_NAME).exists()
    if tickets:
        what = "compact networks        " if compact else "tickets (mask, weights) "
        lines.append(f"  {what}tickets/{tickets[0].name} to {tickets[-1].name}")
    if compact:
        lines.append(f"  the compact network     {COMPACT_NAME} (load_compact)")
    if checkpoints:
        lines.append(f"  checkpoints             checkpoints/ ({len(checkpoints)})")
    lines += [
        "Try next:",
        f"  this run as a page      lightning-prune report {folder}",
        "  another length or seed  --trainer.max_epochs 30, --seed_everything 1",
    ]
    if (folder / "checkpoints" / "last.ckpt").exists() and not compact:
        lines.append(f"  more rounds             raise rounds, then --ckpt_path {folder / 'checkpoints' / 'last.ckpt'}")
    return "\n".join(lines)


def _own_command(name: str) -> Callable[[list[str]], None] | None:
    """Our own commands, imported when they are called."""
    module = COMMANDS.get(name)
    return None if module is None else importlib.import_module(module).main


def main(args: list[str] | None = None) -> None:
    """Run the command; an error that this library or Lightning raises on purpose is one message and exit code 1."""
    words = sys.argv[1:] if args is None else args
    # lightning's own use of torch, which torch 2.14 announces to change; nothing a user of the command can act on
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    try:
        names, words = split_trust(words)
        with reading(names):
            _run(words, args)
    except Exception as error:
        meant = _meant(error)
        if meant is None:  # a bug, ours or in the user's code: the traceback is what helps
            raise
        print(f"lightning-prune: {type(meant).__name__}: {meant}", file=sys.stderr)
        sys.exit(1)


def _run(words: list[str], args: list[str] | None) -> None:
    own = _own_command(words[0]) if words else None
    if own is not None:
        own(words[1:])
        return
    PruneCLI(
        save_config_callback=SaveRecipe,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=None if args is None else words,
    )


def _meant(error: BaseException | None) -> BaseException | None:
    """The error that was raised on purpose, also where the parser that built the object has wrapped it."""
    while error is not None and not isinstance(error, PruneError | MisconfigurationException | OSError):
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
