"""Building a recipe's model, data and Trainer for the parts of an analysis."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.recipes import RecipeCLI, parse_yaml

_PARTS = ("seed_everything", "model", "data", "trainer", "optimizer", "lr_scheduler")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe, or the ``config.yaml`` that a run has left, as far as it says what is trained and on what.

    Raises:
        FileFormatError: No such file, or no recipe.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, FileFormatError) as error:
        raise FileFormatError(f"{path} cannot be read as a recipe: {error}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise FileFormatError(f"{path} is no recipe: expected a YAML file with model, data and trainer.")
    return {key: content[key] for key in _PARTS if key in content}


class Built:
    """What a recipe describes, built under a seed exactly as ``lightning-prune fit`` builds it.

    Args:
        recipe: The recipe's file.
        overrides: Further arguments of the command line, such as ``--trainer.max_epochs=3``.
        seed: Of initialisation and, until a branch, of everything else.

    Attributes:
        model: The LightningModule.
        data: The data module.
        dropped: Names of the recipe's callbacks that have no place in an analysis.

    Raises:
        ConfigError: A recipe without a data module.
    """

    def __init__(self, recipe: Path, overrides: Sequence[str], seed: int) -> None:
        # the Trainer that the command line builds is not used: each part of an analysis gets one with its own logger
        arguments = ["--config", str(recipe), *overrides, f"--seed_everything={seed}", "--trainer.logger=false"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*args parameter is intended.*")
            self._cli = RecipeCLI(
                run=False,
                args=arguments,
                save_config_callback=None,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
            )
        if self._cli.datamodule is None:
            raise ConfigError(f"{recipe} has no data module; instability analysis needs data: in the recipe.")
        self.model: pl.LightningModule = self._cli.model
        self.data: pl.LightningDataModule = self._cli.datamodule
        configured: Mapping[str, Any] = self._cli.config_init["trainer"]
        given = configured.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        self._kept = [callback for callback in given if not _has_no_place(callback)]
        self.dropped = [type(callback).__name__ for callback in given if _has_no_place(callback)]

    def trainer(self, folder: Path, callbacks: Sequence[Callback]) -> pl.Trainer:
        """The recipe's Trainer, logging into ``folder/logs``, with these callbacks beside those of the recipe."""
        return self._cli.instantiate_trainer(
            logger=CSVLogger(save_dir=str(folder), name="logs"),
            callbacks=[*self._kept, *callbacks],
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        )


def _has_no_place(callback: Callback) -> bool:
    """Whether a callback prunes, listens to pruning, keeps checkpoints, or ends copies at different times."""
    prunes = getattr(callback, "sends_prune_events", False) or hasattr(callback, "on_prune")
    return prunes or isinstance(callback, Checkpoint | EarlyStopping)
