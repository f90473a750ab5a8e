"""One validation that nobody hears of: what a cut cost, before training goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lightning_prune.resume import undisturbed

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def validate_quietly(trainer: pl.Trainer) -> dict[str, float]:
    """Validate the module as it is, inside a fit and between two batches.

    The module's own validation steps and hooks run; no callback and no logger does, generators and the trainer's
    metrics are put back, so that the fit goes on as if nothing had been.

    Args:
        trainer: A trainer that fits and is not in a batch.

    Returns:
        ``{name: value}`` of what the validation logged; empty where there is none.
    """
    if not trainer.enable_validation:
        return {}
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    with _unheard(trainer), undisturbed(trainer.strategy.root_device):
        loop.run()
        logged = dict(trainer.callback_metrics)
    return {name: float(value) for name, value in logged.items() if value.numel() == 1}


@contextmanager
def _unheard(trainer: pl.Trainer) -> Iterator[None]:
    connector: Any = trainer._logger_connector
    heard: Any = trainer
    callbacks, loggers, first = heard.callbacks, trainer.loggers, connector._first_loop_iter
    before = {name: dict(getattr(connector, name)) for name in _METRICS}
    heard.callbacks, trainer.loggers, trainer.validating = [], [], True
    for name in _METRICS:
        getattr(connector, name).clear()
    try:
        yield
    finally:
        heard.callbacks, trainer.loggers, trainer.training = callbacks, loggers, True
        connector._first_loop_iter = first
        for name, values in before.items():
            held = getattr(connector, name)
            held.clear()
            held.update(values)
