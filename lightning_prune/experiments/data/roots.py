"""Where data lies: the argument, else an environment variable, else a cache folder of the user."""

import os
from pathlib import Path

from lightning_prune.errors import ConfigError

DATA_VARIABLE = "LIGHTNING_PRUNE_DATA"


def cache_folder() -> Path:
    """The user's cache folder of this library: ``$XDG_CACHE_HOME/lightning_prune``, else under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_prune"


def data_root(root: str | Path | None) -> Path:
    """The data folder: ``root``, else the environment variable ``LIGHTNING_PRUNE_DATA``, else the cache folder."""
    return Path(root or os.environ.get(DATA_VARIABLE) or cache_folder() / "data").expanduser()


def missing_data(name: str, root: Path, expected: str, reason: str = "") -> ConfigError:
    """The error for data that is not there: where was looked, what was expected, what to set.

    Args:
        name: Of the data set.
        root: Where was looked.
        expected: What should lie there, relative to the root.
        reason: Why fetching it failed, if it was tried.
    """
    tried = f" Downloading it failed: {reason}." if reason else " Or let it be downloaded there: --data.download=true."
    return ConfigError(
        f"{name} not found in {root}: expected {expected}. Set --data.root, or the environment variable "
        f"{DATA_VARIABLE}, to the folder that holds it.{tried}"
    )
