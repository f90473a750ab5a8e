"""Composable PyTorch Lightning callbacks for pruning.

Add callbacks to a Trainer, or use the functions without one:

    trainer = Trainer(max_epochs=30, callbacks=[IterativeMagnitudePruner(), WeightRewind("3%"), LRRewind("3%")])
"""

from lightning_prune.callbacks import (
    IterativeMagnitudePruner,
    LRRewind,
    Position,
    PruneEvent,
    TicketWriter,
    WeightRewind,
)
from lightning_prune.checkpoint import Ticket, load_ticket, save_ticket
from lightning_prune.errors import (
    BudgetError,
    ConfigError,
    EqualityError,
    FileFormatError,
    MaskMismatchError,
    NoEffectWarning,
    PruneError,
    ResumeError,
    SelectionError,
    TraceError,
    WriteError,
)
from lightning_prune.masks import MaskSet, prunable_parameters
from lightning_prune.record import RunRecord
from lightning_prune.scores import score_weights
from lightning_prune.selection import select
from lightning_prune.times import TrainTime

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ConfigError",
    "EqualityError",
    "FileFormatError",
    "IterativeMagnitudePruner",
    "LRRewind",
    "MaskMismatchError",
    "MaskSet",
    "NoEffectWarning",
    "Position",
    "PruneError",
    "PruneEvent",
    "ResumeError",
    "RunRecord",
    "SelectionError",
    "Ticket",
    "TicketWriter",
    "TraceError",
    "TrainTime",
    "WeightRewind",
    "WriteError",
    "load_ticket",
    "prunable_parameters",
    "save_ticket",
    "score_weights",
    "select",
]
