"""Where a run leaves its files."""

from pathlib import Path

import lightning.pytorch as pl


def tries_out(trainer: pl.Trainer) -> bool:
    """Whether the trainer runs a few batches only to see that they run (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of this run: its first logger's, the one beside ModelCheckpoint's ``checkpoints``.

    Returns:
        The folder, the same on every rank; ``None`` where the trainer has no logger or only tries out
        (``fast_dev_run``): then nothing is written.
    """
    if not trainer.loggers or tries_out(trainer):
        return None
    logger = trainer.loggers[0]
    folder = getattr(logger, "log_dir", None)
    if folder is None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return Path(trainer.strategy.broadcast(str(folder)))
