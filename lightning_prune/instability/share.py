"""An analysis divided between the processes that torchrun has started."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_prune.errors import ConfigError

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
_SECONDS = 1.0  # between two looks at whether another process has finished


@dataclass(frozen=True)
class Share:
    """Which part of an analysis this process does.

    Args:
        index: Of this process.
        count: How many processes divide the runs among them; 1: every run is done here.
        leads: Whether this process puts the results together.
    """

    index: int = 0
    count: int = 1
    leads: bool = True

    def of(self, items: Sequence[T]) -> list[T]:
        """This process's part: every ``count``-th."""
        return list(items[self.index :: self.count])

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Wait for what another process does; torchrun ends all of them when one fails."""
        if self.count > 1 and not done():
            print(f"waiting for {what}", flush=True)
            while not done():
                time.sleep(_SECONDS)


def processes() -> int:
    """How many processes were started together, by torchrun or by Lightning."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share_of(devices: int) -> Share:
    """How the processes that torchrun started divide the work.

    Runs on one device are spread: each process trains others, as if it had been started alone. Where a run itself takes
    as many processes as there are (``strategy: ddp``), all train each run together.

    Args:
        devices: Over how many processes one run of the recipe goes.

    Raises:
        ConfigError: One run takes several processes, but not as many as there are.
    """
    started = processes()
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    if devices == started:
        return Share(leads=rank == 0)
    if devices > 1:
        raise ConfigError(
            f"a run of this recipe takes {devices} processes, and torchrun started {started}. Start {devices}, which "
            "then train each run together, or set --trainer.devices=1, and each process trains runs of its own."
        )
    for name in _VARIABLES:  # each run is on its own: Lightning must not look for the others
        os.environ.pop(name, None)
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    return Share(rank, started, leads=rank == 0)
