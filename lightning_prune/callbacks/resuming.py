"""What callbacks that resume a fit have in common: the checkpoint is whole, and written with the same settings."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_prune.errors import PruneError, ResumeError
from lightning_prune.files import check_archive


def check_checkpoint(trainer: "pl.Trainer") -> None:
    """Refuse a checkpoint with changed bytes, which torch loads without a word.

    Of a folder to which every process has added its part, this is about the file that rank 0 has written.

    Raises:
        FileFormatError: The checkpoint that ``trainer`` resumes from is damaged.
    """
    if not trainer.ckpt_path:
        return
    path = Path(trainer.ckpt_path)
    file = path / "meta.pt" if path.is_dir() else path
    if file.is_file():
        check_archive(file)


def require_same_settings(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a checkpoint was written with.

    Raises:
        ResumeError: A setting of the checkpoint differs from this run's.
    """
    for key, value in saved.items():
        if ours.get(key) != value:
            raise ResumeError(
                f"the checkpoint was written with {key}={value!r}, this run has {key}={ours.get(key)!r}. "
                "Resume with the same settings, or start a new run."
            )


@contextmanager
def taking_up(name: str) -> Iterator[None]:
    """While a callback's state is read: what does not fit in it is told as damage.

    Args:
        name: Of the callback.

    Raises:
        ResumeError: The state lacks something, or holds something of another kind.
    """
    try:
        yield
    except PruneError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ResumeError(
            f"the checkpoint's state of {name} is damaged, or of another version of this library "
            f"({type(error).__name__}: {error!s:.200}). Resume from another checkpoint."
        ) from error
