"""What watches metrics starts anew in each round: ModelCheckpoint's best, EarlyStopping's patience, averages."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from lightning_prune.masks import MaskSet


def name_checkpoints(trainer: pl.Trainer, round: int, names: dict[int, str | None]) -> None:  # noqa: A002
    """Let every ModelCheckpoint's file names carry the round.

    Args:
        trainer: The trainer.
        round: The round that trains now.
        names: The callbacks' own file names by the callback's ``id``; filled at the first call.
    """
    for callback in _all(trainer, ModelCheckpoint):
        own = names.setdefault(id(callback), callback.filename)
        callback.filename = f"{own or '{epoch}-{step}'}-round{round:02d}"


def restore_names(trainer: pl.Trainer, names: dict[int, str | None]) -> None:
    """Undo :func:`name_checkpoints`."""
    for callback in _all(trainer, ModelCheckpoint):
        if id(callback) in names:
            callback.filename = names[id(callback)]


def start_anew(trainer: pl.Trainer) -> None:
    """Forget the best of the round that has ended, so that the next has its own. Files stay."""
    for callback in _all(trainer, ModelCheckpoint):
        callback.best_k_models = {}
        callback.kth_best_model_path = ""
        callback.best_model_path = ""
        callback.best_model_score = None
        callback.current_score = None
        callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    for callback in _all(trainer, EarlyStopping):
        callback.wait_count = 0
        callback.stopped_epoch = 0
        callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)


def best_checkpoint(trainer: pl.Trainer) -> str | None:
    """The best checkpoint of the round so far, if some ModelCheckpoint watches a metric."""
    for callback in _all(trainer, ModelCheckpoint):
        if callback.monitor is not None and callback.best_model_path:
            return callback.best_model_path
    return None


def watched_metric(trainer: pl.Trainer) -> tuple[str, str] | None:
    """The metric, and its mode, that a ModelCheckpoint or else an EarlyStopping of the trainer watches."""
    for kind in (ModelCheckpoint, EarlyStopping):
        for callback in _all(trainer, kind):
            if callback.monitor is not None:
                return callback.monitor, callback.mode
    return None


def averages(trainer: pl.Trainer) -> list[nn.Module]:
    """Every ``AveragedModel`` that a callback of the trainer holds, as Lightning's ``WeightAveraging`` does."""
    held = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [average for average in held if isinstance(average, nn.Module)]


def cut_averages(trainer: pl.Trainer, pl_module: pl.LightningModule, masks: MaskSet | None, rewound: bool) -> None:
    """Keep averaged copies of the weights in step with a cut.

    Args:
        trainer: The trainer.
        pl_module: The module, cut already; channels that left have left the copies too.
        masks: The new masks, if weights are masked.
        rewound: The weights were set back: the average of what came before means nothing now and starts anew.
    """
    for average in averages(trainer):
        copy, count = average.module, average.n_averaged
        assert isinstance(copy, nn.Module)
        assert isinstance(count, Tensor)
        if rewound:
            copy.load_state_dict(pl_module.state_dict())
            count.zero_()
        if masks is not None:
            masks.apply_(copy)


def _all(trainer: pl.Trainer, kind: type) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
