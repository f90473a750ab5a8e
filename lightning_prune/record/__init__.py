"""A run's record: what each round removed, cost and saved."""

from lightning_prune.record.round import Round
from lightning_prune.record.run import CSV_NAME, FORMAT, JSON_NAME, VERSION, RunRecord, check_free

__all__ = ["CSV_NAME", "FORMAT", "JSON_NAME", "VERSION", "Round", "RunRecord", "check_free"]
