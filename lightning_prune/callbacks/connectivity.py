"""Measures the barrier between the networks of successive rounds while an iterative pruner runs."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_prune.callbacks.claims import claim
from lightning_prune.callbacks.company import require_whole_network
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.examples import to_batch
from lightning_prune.callbacks.folders import run_folder
from lightning_prune.callbacks.logs import log_numbers
from lightning_prune.callbacks.rewind import require_pruner
from lightning_prune.connectivity import ErrorRate, LinearPath, linear_mode_connectivity
from lightning_prune.errors import ConfigError
from lightning_prune.files import write_json
from lightning_prune.resume import undisturbed

FILE_NAME = "connectivity.json"


class RoundConnectivity(Callback):
    """Measure the error along the line between the trained networks of each two successive rounds.

    At each prune event, before weights are rewound, and when training ends, the round's trained network is compared
    with the one before it. The line lies in the earlier round's subnetwork, which holds the later one's.

    Acts in: the prune event (first of all listeners) and ``on_train_end``. Changes nothing: weights, modes and
    random-number state come back. Results go to the trainer's loggers (``prune/barrier``), to ``connectivity.json``
    in the run folder, and to :attr:`rows`.

    Paper: Paul et al. 2023, arXiv:2210.03044: at higher sparsities successive networks are connected without a barrier
    if and only if they are matching. The barrier is that of Frankle et al. 2020, arXiv:1912.05671, section 2.
    Deviation: none that the abstract shows. (Two copies of one ticket, as the latter paper compares them, are not part
    of one fit: ``lightning-prune connectivity --tickets`` trains them.)

    Args:
        points: Places on the line, at least 2.
        batch_norm: ``"interpolate"`` or ``"recalibrate"``: :func:`linear_mode_connectivity`.
        calibration_batches: Training batches for ``"recalibrate"``.
        error: What to measure, of the LightningModule in eval mode: a number, or ``{split: number}``. Default: top-1
            error on the validation data (its first loader), whose batches are ``(inputs, labels)``.
        dirpath: Folder of ``connectivity.json``. Default: the run folder; without a logger none.

    State saved: the last round's trained network, and the measurements.

    Raises:
        ConfigError: An argument out of range; in ``setup``: no pruner beside it, a strategy that shards the network, or
            neither ``error`` nor a ``forward`` of the module; at an event: no validation data, or a pruner that removes
            channels instead of masking weights.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import IterativeMagnitudePruner, LRRewind, RoundConnectivity, WeightRewind
        >>> callbacks = [IterativeMagnitudePruner(), WeightRewind("3%"), LRRewind("3%"), RoundConnectivity(points=11)]
        >>> trainer = Trainer(max_epochs=30, callbacks=callbacks, logger=False, enable_checkpointing=False)

    Limits:
        With several processes (DDP) all measure rank 0's network, each on its share of the data, and the means are
        averaged; a share is as long as the others, as Lightning's samplers cut them. Statistics for ``"recalibrate"``
        are each process's, of its share.
    """

    prune_order = -1

    def __init__(
        self,
        points: int = 30,
        batch_norm: str = "interpolate",
        calibration_batches: int = 20,
        error: Callable[[nn.Module], Any] | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        if batch_norm not in ("interpolate", "recalibrate"):
            raise ConfigError(f"batch_norm={batch_norm!r} is unknown; choose 'interpolate' or 'recalibrate'.")
        for name, value, least in (("points", points, 2), ("calibration_batches", calibration_batches, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least {least}.")
        self.points, self.batch_norm, self.calibration_batches = points, batch_norm, calibration_batches
        self.error = error
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.rows: list[dict[str, Any]] = []
        """One entry for each two rounds, as JSON content: ``rounds``, ``density`` of both, and the path."""
        self._before: dict[str, Tensor] | None = None
        self._round = 0
        self._seen = -1  # the last round whose trained network was compared or kept
        self._density = [1.0]  # by round

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        require_pruner(trainer, self)
        require_whole_network(trainer, "so no line can be drawn between two networks here")
        if self.error is None and type(pl_module).forward is pl.LightningModule.forward:
            raise ConfigError(
                f"RoundConnectivity calls the module on inputs, and {type(pl_module).__name__} has no forward(): "
                "define it, or give error=...."
            )
        self.rows, self._before, self._round, self._seen, self._density = [], None, 0, -1, [1.0]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold the folder; an earlier run's file is not written over."""
        folder = self.dirpath or run_folder(trainer)
        if folder is not None:
            claim(trainer, folder, FILE_NAME)

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Compare the trained network with that of the round before."""
        if event.masks is None:
            raise ConfigError("RoundConnectivity needs networks of one shape; this pruner removes channels.")
        self._compare(trainer, pl_module)
        self._round = event.round
        self._density.append(event.masks.density)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the last round's network."""
        self._compare(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare it where nothing was left to train: resumed from the last checkpoint of all."""
        self._compare(trainer, pl_module)

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._seen >= self._round:
            return  # a finished run that was resumed
        self._seen = self._round
        state = {n: t.detach().to("cpu", copy=True) for n, t in pl_module.state_dict().items() if isinstance(t, Tensor)}
        state = trainer.strategy.broadcast(state)  # processes may have running statistics of their own
        before, self._before = self._before, state
        if before is None:
            return
        with undisturbed(trainer.strategy.root_device):
            path = self._measure(trainer, pl_module, before, state)
        density = [self._density[self._round - 1], self._density[self._round]]
        self.rows.append({"rounds": [self._round - 1, self._round], "density": density, **path.to_json()})
        log_numbers(trainer, {"prune/barrier": path.barrier})
        folder = self.dirpath or run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            write_json(folder / FILE_NAME, {"format": "lightning_prune.rounds", "version": 1, "lines": self.rows})

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, earlier: dict[str, Tensor], later: dict[str, Tensor]
    ) -> LinearPath:
        error = self.error or ErrorRate({"val": self._batches(trainer, pl_module, _validation_loader(trainer))})

        def over_processes(module: nn.Module) -> dict[str, float]:
            found = error(module)
            named = found if isinstance(found, dict) else {"error": found}
            values = torch.tensor([float(v) for v in named.values()], dtype=torch.float64, device=pl_module.device)
            mean = trainer.strategy.reduce(values, reduce_op="mean")
            return dict(zip(named, torch.as_tensor(mean).tolist(), strict=True))

        anew = self.batch_norm == "recalibrate"
        batches = None
        if anew:
            loader = islice(_loader_of(trainer.train_dataloader), self.calibration_batches)
            batches = self._batches(trainer, pl_module, loader)
        return linear_mode_connectivity(
            pl_module, earlier, later, over_processes, self.points, self.batch_norm, batches
        )

    @staticmethod
    def _batches(trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Iterable[Any]) -> list[Any]:
        return [to_batch(batch, trainer, pl_module) for batch in loader]

    def state_dict(self) -> dict[str, Any]:
        """The last trained network, and the measurements so far."""
        return {
            "before": self._before,
            "rows": list(self.rows),
            "round": self._round,
            "seen": self._seen,
            "density": list(self._density),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up."""
        self._before, self.rows = state_dict["before"], list(state_dict["rows"])
        self._round, self._density = state_dict["round"], list(state_dict["density"])
        self._seen = state_dict["seen"]


def _validation_loader(trainer: pl.Trainer) -> Any:
    loader = trainer.val_dataloaders
    if loader is None and trainer.enable_validation:  # a fit that has nothing left to train prepares none
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        loader = trainer.val_dataloaders
    if loader is None:
        raise ConfigError("RoundConnectivity measures errors on validation data, and there is none: give error=....")
    return _loader_of(loader)


def _loader_of(loaders: Any) -> Any:
    """The first of several loaders."""
    if isinstance(loaders, dict):
        return next(iter(loaders.values()))
    return loaders[0] if isinstance(loaders, list | tuple) else loaders
