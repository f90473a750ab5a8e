"""Checkpoints that are whole or not there, wherever the temporary folder lies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_prune.errors import WriteError
from lightning_prune.files import atomic_write, load_archive


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
        try:
            with atomic_write(Path(local)) as temporary:
                torch.save(checkpoint, temporary)
        except RuntimeError as error:  # of torch's writer, which does not say what the system said
            if not any(part in str(error) for part in ("inline_container", "iostream", "PytorchStreamWriter")):
                raise
            raise WriteError(
                f"could not write {local}; what was there before is unchanged. Check free space and permissions."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file, without running code that is in it unless ``weights_only`` is False.

        Raises:
            FileFormatError: Missing, damaged, or with objects that only code could restore.
        """
        system, local = url_to_fs(str(path))
        if weights_only is False or not isinstance(system, LocalFileSystem):
            more = {} if weights_only is None else {"weights_only": weights_only}
            return super().load_checkpoint(path, map_location, **more)
        return load_archive(local, map_location)


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
