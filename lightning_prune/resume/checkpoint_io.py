"""Checkpoints that are whole or not there, wherever the temporary folder lies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_prune.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own way to save, with the file written beside its place, flushed to disk, and renamed.

    Lightning writes to the system's temporary folder and moves the file. Between two file systems a move is a copy, so
    a process killed there leaves half a checkpoint, under the name of a whole one. Other than local paths are left to
    Lightning.

    Raises:
        WriteError: The system could not write; an earlier file is unchanged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one file."""
        system, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(Path(local)) as temporary:
            torch.save(checkpoint, temporary)


def save_atomically(trainer: "pl.Trainer") -> Callable[[], None]:
    """Let the trainer's checkpoints be written by :class:`AtomicCheckpointIO`, unless the user has chosen a way.

    Returns:
        A function that undoes it.
    """
    strategy: Any = trainer.strategy
    try:
        before = strategy.checkpoint_io
    except NotImplementedError:  # strategies that write shards of their own
        return lambda: None
    if type(before) is not TorchCheckpointIO:
        return lambda: None
    strategy.checkpoint_io = AtomicCheckpointIO()

    def undo() -> None:
        strategy.checkpoint_io = before

    return undo
