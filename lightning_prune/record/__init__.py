"""A run's record: what each round removed, cost and saved; and the record of an arm of a sweep."""

from lightning_prune.record.arm import ARM_NAME, Arm, ArmCost, ArmLatency, ArmStage
from lightning_prune.record.round import Round
from lightning_prune.record.run import CSV_NAME, FORMAT, JSON_NAME, VERSION, RunRecord, check_free

__all__ = [
    "ARM_NAME",
    "CSV_NAME",
    "FORMAT",
    "JSON_NAME",
    "VERSION",
    "Arm",
    "ArmCost",
    "ArmLatency",
    "ArmStage",
    "Round",
    "RunRecord",
    "check_free",
]
