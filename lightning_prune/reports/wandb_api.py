"""What W&B knows of a project, asked where somebody is logged in."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.errors import ConfigError

PREFIX = "prune/end/"
NO_METRICS = (
    "round",
    "sparsity",
    "density",
    "params",
    "macs",
    "latency",
    "latency_ms",
    "theoretical_speedup",
    "measured_speedup",
)
"""What stands beside metrics under ``prune/end/``."""


@dataclass(frozen=True)
class Project:
    """A project with pruning runs.

    Attributes:
        entity: Who owns it.
        name: Its name.
        metrics: How many of its runs have each metric.
    """

    entity: str
    name: str
    metrics: Counter[str]

    def choose_metric(self, wanted: str | None) -> str:
        """``wanted``, else ``val_acc``, else what most runs have.

        Raises:
            ConfigError: No run has it.
        """
        if wanted is not None and wanted not in self.metrics:
            raise ConfigError(
                f"no run in {self.entity}/{self.name} has metric {wanted!r}; they have: "
                f"{', '.join(sorted(self.metrics))}."
            )
        if wanted is None and "val_acc" in self.metrics:
            return "val_acc"
        return wanted or self.metrics.most_common(1)[0][0]


def find_project(name: str, entity: str = "") -> Project | None:
    """Ask W&B for a project's runs.

    Args:
        name: Of the project.
        entity: Who owns it; ``""``: who is logged in.

    Returns:
        The project; None where nobody is logged in.

    Raises:
        ConfigError: No such project, none of its runs comes from a pruner, or W&B does not answer.
    """
    import wandb

    try:
        if not wandb.login(prompt=False):
            return None
        api = wandb.Api()
        entity = entity or str(api.default_entity)
        runs = list(api.runs(f"{entity}/{name}"))
    except Exception as error:
        raise ConfigError(
            f"W&B gives no runs of {entity + '/' if entity else ''}{name} ({type(error).__name__}: {error}). Check the "
            "name (ENTITY/PROJECT) and the connection, or use --offline."
        ) from error
    return Project(entity, name, metrics_of([run.summary for run in runs], f"{entity}/{name}"))


def metrics_of(summaries: Sequence[Any], where: str) -> Counter[str]:
    """How many runs have each metric, from their summaries.

    Raises:
        ConfigError: No run, or none that a pruner has logged.
    """
    if not summaries:
        raise ConfigError(
            f"{where} has no runs yet. Log some, or sync offline ones: wandb sync FOLDER/wandb/offline-run-*"
        )
    names = [key.removeprefix(PREFIX) for summary in summaries for key in dict(summary) if key.startswith(PREFIX)]
    found = Counter(name for name in names if name not in NO_METRICS)
    if not found:
        raise ConfigError(
            f"none of the {len(summaries)} runs in {where} has a metric under {PREFIX}: they were logged without a "
            "pruner of this library, or have ended no round."
        )
    return found
