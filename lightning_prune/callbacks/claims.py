"""One run at a time in a folder: runs that are under way hold it, finished ones are left alone."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl

from lightning_prune.errors import ConfigError, WriteError

try:
    import fcntl
except ImportError:  # Windows: only this process's own fits are kept apart
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lightning_prune.lock"

_held: dict[Path, tuple[int, IO[str]]] = {}  # by folder: which trainer holds it, and the open lock file


def claim(trainer: "pl.Trainer", folder: str | Path, *leavings: str) -> None:
    """Hold ``folder`` for this trainer's run until :func:`give_up`; rank 0 alone, again without effect.

    The system frees the folder when the process ends, however it ends: a killed run can be resumed at once.

    Args:
        trainer: The trainer.
        folder: Made where it is missing.
        leavings: Patterns of files that an earlier run has left; only a resumed fit may find any.

    Raises:
        ConfigError: Another run holds the folder, or has left its files there.
        WriteError: The folder cannot be written to.
    """
    if not trainer.is_global_zero:
        return
    folder = Path(folder).resolve()
    holder = _held.get(folder)
    if holder is None:
        _held[folder] = (id(trainer), lock_folder(folder))
    elif holder[0] != id(trainer):
        raise _taken(folder, "another fit of this process")
    if trainer.ckpt_path is not None:
        return
    found = sorted(path.name for pattern in leavings for path in folder.glob(pattern))
    if found:
        raise ConfigError(
            f"{folder} holds {found[0]}{' and more ' if len(found) > 1 else ' '}of an earlier run, and a run does not "
            "write over another: resume that run from its checkpoint (ckpt_path), give another folder, or delete this "
            "one (a run that ended before its first checkpoint cannot be resumed)."
        )


def give_up(trainer: "pl.Trainer") -> None:
    """Free every folder that this trainer's run holds."""
    for folder, (owner, file) in list(_held.items()):
        if owner == id(trainer):
            del _held[folder]
            file.close()  # with it goes the lock


def lock_folder(folder: Path) -> IO[str]:
    """Lock a folder for this process until the file that is returned is closed; make it where it is missing.

    Raises:
        ConfigError: Another process holds it.
        WriteError: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as the run lasts)
    except OSError as error:
        raise WriteError(f"cannot write to {folder}: {error.strerror or error}. Check the path.") from error
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: data workers do not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            number = file.read(20).strip()
            file.close()
            raise _taken(folder, f"process {number}" if number.isdigit() else "another process") from error
        return file  # a file system without locks
    with suppress(OSError):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file


def _taken(folder: Path, by: Any) -> ConfigError:
    return ConfigError(
        f"{folder} is in use by {by}, and a run folder holds one run: wait until that has ended, or log to another "
        "folder."
    )
