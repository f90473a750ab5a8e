"""A run in W&B, behind Lightning's logger: whatever goes wrong there is a warning, and nothing is sent twice."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_prune.errors import FileFormatError
from lightning_prune.files import read_json, write_json

LEDGER = "wandb.json"
FORMAT = "lightning_prune.wandb"


class GuardedRun:
    """One ``WandbLogger`` during a fit.

    While it is attached, the logger's ``log_metrics`` (through which Lightning's own values go too) raises no error:
    the first is told in a warning, and training goes on. What is logged under ``prune/`` is written down in
    ``wandb.json`` in the run folder, so that a run that is resumed from a checkpoint, and comes to the same rounds
    again, does not log them twice under the same identity.

    Args:
        logger: The logger, on process 0.
    """

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger
        self._ledger: Path | None = None
        self._sent: list[str] = []
        self._earlier: list[str] = []  # of what an earlier process sent, what this one has not come to again
        self._warned = False
        self._log = logger.log_metrics

    @property
    def disabled(self) -> bool:
        """Whether W&B is switched off (``mode="disabled"``)."""
        return bool(getattr(self.logger.experiment, "disabled", False))

    @property
    def identity(self) -> str:
        """The run's id."""
        return str(self.logger.version)

    def attach(self) -> None:
        """Stand between the logger and W&B."""
        vars(self.logger)["log_metrics"] = self.log

    def detach(self) -> None:
        """Leave the logger as it was."""
        vars(self.logger).pop("log_metrics", None)

    def open(self, folder: Path | None) -> None:
        """Read what an earlier process of the same run has sent.

        Args:
            folder: The run folder; None: nothing is written down.
        """
        self._sent, self._earlier = [], []
        path = self._ledger = None if folder is None else folder / LEDGER
        if path is None or not path.exists():
            return

        def read() -> None:
            content = read_json(path, "a list of what was sent to W&B")
            if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != 1:
                raise FileFormatError(f"{path} is no list of what was sent to W&B; all is sent again.")
            if content["run"] == self.identity:
                self._sent, self._earlier = list(content["sent"]), list(content["sent"])

        self.attempt("reading what was sent before", read)

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log, as ``WandbLogger.log_metrics`` does."""
        ours = sorted(name for name in metrics if name.startswith("prune/"))
        what = f"{step}: {' '.join(ours)}" if ours else None
        self.once(what, "logging", lambda: self._log(metrics, step))

    def table(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log a table."""
        self.attempt(f"logging {key}", lambda: self.logger.log_table(key, columns=columns, data=rows, step=step))

    def histogram(self, key: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Log a histogram: how many values lie between successive edges."""

        def send() -> None:
            import wandb

            pair = np.asarray(counts), np.asarray(edges)
            self.log({key: wandb.Histogram(np_histogram=pair)}, step)

        self.attempt(f"logging {key}", send)

    def page(self, key: str, make: Callable[[], str], step: int) -> None:
        """Log the HTML page that ``make`` gives."""

        def send() -> None:
            import wandb

            self.log({key: wandb.Html(make(), inject=False)}, step)

        self.attempt(f"logging {key}", send)

    def artifact(self, name: str, kind: str, path: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Log a file as an artifact; it is not copied, so it must stay until it is uploaded."""

        def send() -> None:
            import wandb

            artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata))
            artifact.add_file(str(path), name=path.name, policy="immutable")
            self.logger.experiment.log_artifact(artifact, aliases=[alias])

        self.once(f"{name}:{alias} {metadata.get('digest', '')}", f"logging {path.name}", send)

    def summarise(self, fields: Callable[[], Mapping[str, Any]]) -> None:
        """Set summary fields under ``prune/``."""

        def send() -> None:
            for name, value in fields().items():
                self.logger.experiment.summary[f"prune/{name}"] = value

        self.attempt("writing the summary", send)

    def describe(self, content: Mapping[str, Any]) -> None:
        """Put ``content`` into the run's config, under ``prune``."""
        config = {"prune": dict(content)}
        self.attempt("describing the run", lambda: self.logger.experiment.config.update(config, allow_val_change=True))

    def define(self, names: Sequence[str], against: str) -> None:
        """Let metrics be plotted against another by default."""

        def send() -> None:
            for name in names:
                self.logger.experiment.define_metric(name, step_metric=against)

        self.attempt("naming the axes", send)

    def once(self, what: str | None, doing: str, action: Callable[[], Any]) -> None:
        """Do what an earlier process of this run has not done.

        Args:
            what: Names it; None: always done, and not written down.
            doing: What is done, for the warning.
            action: Does it.
        """
        if what in self._earlier:
            self._earlier.remove(what)
        elif self.attempt(doing, action) and what is not None:
            self._sent.append(what)
            if self._ledger is not None:
                path, content = self._ledger, {"format": FORMAT, "version": 1, "run": self.identity, "sent": self._sent}
                self.attempt("writing down what was sent", lambda: write_json(path, content))

    def attempt(self, doing: str, action: Callable[[], Any]) -> bool:
        """Call ``action``; an error is a warning, once.

        Returns:
            Whether it went well.
        """
        try:
            action()
        except Exception as error:
            if not self._warned:
                self._warned = True
                reason = (str(error).splitlines() or [""])[0]
                rank_zero_warn(
                    f"W&B: {doing} failed ({type(error).__name__}: {reason}). Training goes on; what fails is missing "
                    "in W&B, without another warning. Record and files in the run folder do not depend on it."
                )
            return False
        return True
