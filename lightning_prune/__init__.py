"""Composable PyTorch Lightning callbacks for pruning.

Add callbacks to a Trainer, or use the functions without one:

    trainer = Trainer(max_epochs=30, callbacks=[IterativeMagnitudePruner(), WeightRewind("3%"), LRRewind("3%")])
"""

from lightning_prune.acceleration import Accelerated, accelerate
from lightning_prune.actions import Supermask, mask_weights, supermask
from lightning_prune.callbacks import (
    ChannelPruner,
    CostProfiler,
    EarlyBird,
    HRankPruner,
    IterativeMagnitudePruner,
    LearnedSupermask,
    LRRewind,
    Position,
    PruneEvent,
    RoundConnectivity,
    SlimmingPruner,
    SlimmingRegularizer,
    SupermaskScorer,
    TicketWriter,
    TrainingCost,
    WeightRewind,
    load_compact_checkpoint,
)
from lightning_prune.channels import (
    Budget,
    ChannelSelection,
    RemovalPlan,
    compact,
    feature_ranks,
    plan_removal,
    trace_channels,
)
from lightning_prune.checkpoint import Ticket, load_ticket, save_ticket
from lightning_prune.compact_files import load_compact, save_compact
from lightning_prune.connectivity import ErrorRate, LinearPath, linear_mode_connectivity
from lightning_prune.costs import Costs, Latency, LatencyComparison, compare_latency, count_costs, measure_latency
from lightning_prune.errors import (
    BudgetError,
    CollapseWarning,
    ConfigError,
    EqualityError,
    ExportError,
    FileFormatError,
    MaskMismatchError,
    MeasurementError,
    NoEffectWarning,
    PruneError,
    ResumeError,
    SelectionError,
    TraceError,
    WriteError,
)
from lightning_prune.export import ExportReport, export_onnx, export_program
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import prunable_parameters
from lightning_prune.record import RunRecord
from lightning_prune.reports.wandb_reporter import WandbReporter
from lightning_prune.scores import score_weights
from lightning_prune.selection import select
from lightning_prune.settling import mask_distance
from lightning_prune.times import TrainTime

__version__ = "0.1.0"

__all__ = [
    "Accelerated",
    "Budget",
    "BudgetError",
    "ChannelPruner",
    "ChannelSelection",
    "CollapseWarning",
    "ConfigError",
    "CostProfiler",
    "Costs",
    "EarlyBird",
    "EqualityError",
    "ErrorRate",
    "ExportError",
    "ExportReport",
    "FileFormatError",
    "HRankPruner",
    "IterativeMagnitudePruner",
    "LRRewind",
    "Latency",
    "LatencyComparison",
    "LearnedSupermask",
    "LinearPath",
    "MaskMismatchError",
    "MaskSet",
    "MeasurementError",
    "NoEffectWarning",
    "Position",
    "PruneError",
    "PruneEvent",
    "RemovalPlan",
    "ResumeError",
    "RoundConnectivity",
    "RunRecord",
    "SelectionError",
    "SlimmingPruner",
    "SlimmingRegularizer",
    "Supermask",
    "SupermaskScorer",
    "Ticket",
    "TicketWriter",
    "TraceError",
    "TrainTime",
    "TrainingCost",
    "WandbReporter",
    "WeightRewind",
    "WriteError",
    "accelerate",
    "compact",
    "compare_latency",
    "count_costs",
    "export_onnx",
    "export_program",
    "feature_ranks",
    "linear_mode_connectivity",
    "load_compact",
    "load_compact_checkpoint",
    "load_ticket",
    "mask_distance",
    "mask_weights",
    "measure_latency",
    "plan_removal",
    "prunable_parameters",
    "save_compact",
    "save_ticket",
    "score_weights",
    "select",
    "supermask",
    "trace_channels",
]
