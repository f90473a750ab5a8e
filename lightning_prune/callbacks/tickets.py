"""Writes a ticket, mask and rewound weights, at every prune event."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_prune.callbacks.claims import claim
from lightning_prune.callbacks.company import together
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.folders import run_folder, tries_out
from lightning_prune.callbacks.rewind import named_state, require_pruner
from lightning_prune.checkpoint import Ticket, save_ticket
from lightning_prune.compact_files import save_compact


class TicketWriter(Callback):
    """Write ``tickets/round-XX.safetensors`` at every prune event, after weights and schedule were rewound.

    A ticket is the mask and the weights (parameters and buffers) that its round starts from; :func:`load_ticket` reads
    it without this callback. Where channels leave, it is the compact network that the round starts from, and
    :func:`load_compact` reads it. Acts in: the prune event. Rank 0 writes; each file is whole or not there. Parts of
    sharded parameters are sent to rank 0 one tensor after the other, so that the file is that of a single process and
    can be loaded on any number of them.

    Args:
        dirpath: The folder. Default ``None``: ``tickets`` in the run folder; without a logger nothing is written.

    Raises:
        ConfigError: In ``on_fit_start``: no pruner, or a folder that another run is using or has left tickets in.

    State saved: none; a ticket is written again, with the same content, when a resumed run comes to its round again.
    """

    prune_order = 2

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = None if dirpath is None else Path(dirpath)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to stand alone."""
        if stage == "fit":
            require_pruner(trainer, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold the folder; tickets of an earlier run are not written over."""
        path = self.ticket_path(trainer, 0)
        if path is not None:
            claim(trainer, path.parent, "round-*.safetensors")

    def ticket_path(self, trainer: pl.Trainer, round: int) -> Path | None:  # noqa: A002
        """Where the ticket of a round is written, or ``None``."""
        folder = self.dirpath
        if tries_out(trainer):
            return None
        if folder is None:
            run = run_folder(trainer)
            folder = None if run is None else run / "tickets"
        return None if folder is None else folder / f"round-{round:02d}.safetensors"

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Write the ticket."""
        path = self.ticket_path(trainer, event.round)
        sharded = event.masks is not None and event.masks.is_sharded
        if path is None or not (trainer.is_global_zero or sharded):
            return
        if event.masks is None:
            save_compact(pl_module.get_submodule(event.module), path)
            return
        info: dict[str, Any] = {
            "round": event.round,
            "density": event.density,
            "digest": event.masks.digest(),
            "rewound_to_step": None if event.rewound_to is None else event.rewound_to.step,
        }
        ticket = Ticket(event.masks, named_state(pl_module), info)
        if sharded:  # all processes give their parts
            together(lambda: save_ticket(path, ticket))
        else:
            save_ticket(path, ticket)
