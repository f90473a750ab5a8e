"""What a training epoch has summed up so far: values given to ``self.log`` and torchmetrics held by the module."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor, nn
from torchmetrics import Metric

_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx",
         "dataloader_idx", "metric_attribute")  # fmt: skip
_REDUCTIONS: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "min": torch.min, "max": torch.max}
_SUMS = ("value", "cumulated_batch_size")


def get_epoch_metrics(trainer: "pl.Trainer") -> dict[str, Any]:
    """Read the running training epoch's results and every torchmetric of the module that has been updated.

    Results with an own process group or reduction are left out: they cannot be described by plain values.
    """
    results: dict[str, Any] = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        reduction = meta.reduce_fx.__name__
        if result.has_reset or meta.sync._group is not None or _REDUCTIONS.get(reduction) is not meta.reduce_fx:
            continue
        results[key] = {
            "meta": {name: getattr(meta, name) for name in _META},
            "reduction": reduction,
            "sync": [meta.sync.should, meta.sync.rank_zero_only],
            "sums": {name: _copy(value) for name in _SUMS if isinstance(value := getattr(result, name, None), Tensor)},
            "is_tensor": result.is_tensor,
            "updates": result._update_count,
        }
    metrics = {
        name: {
            "updates": metric._update_count,
            "states": {key: _copy(getattr(metric, key)) for key in metric._defaults},
        }
        for name, metric in trainer.lightning_module.named_modules()
        if isinstance(metric, Metric) and metric._update_count > 0
    }
    return {"results": results, "metrics": metrics}


def set_epoch_metrics(trainer: "pl.Trainer", state: dict[str, Any]) -> None:
    """Undo :func:`get_epoch_metrics`; what the module no longer has is left out."""
    module, device = trainer.lightning_module, trainer.strategy.root_device
    modules = dict(module.named_modules())
    for name, saved in state["metrics"].items():
        metric = modules.get(name)
        if isinstance(metric, Metric) and metric._defaults.keys() == saved["states"].keys():
            for key, value in saved["states"].items():
                setattr(metric, key, _copy(value, device))
            metric._update_count, metric._computed = saved["updates"], None
    for key, saved in state["results"].items():
        result = _result(trainer, saved, modules, device)
        if result is not None:
            trainer.fit_loop.epoch_loop._results[key] = result


def _result(
    trainer: "pl.Trainer", saved: dict[str, Any], modules: dict[str, nn.Module], device: torch.device
) -> _ResultMetric | None:
    meta = _Metadata(**saved["meta"], reduce_fx=_REDUCTIONS[saved["reduction"]])
    should, rank_zero_only = saved["sync"]
    meta.sync = _Sync(fn=trainer.strategy.reduce, _should=should, rank_zero_only=rank_zero_only)
    result = _ResultMetric(meta, saved["is_tensor"]).to(device)
    if not saved["is_tensor"]:
        metric = modules.get(saved["meta"]["metric_attribute"] or "")
        if not isinstance(metric, Metric):
            return None
        result.value = metric
    for name, value in saved["sums"].items():
        setattr(result, name, _copy(value, device))
    result._update_count = saved["updates"]
    return result


def _copy(value: Any, device: torch.device | str = "cpu") -> Any:
    """Copy a tensor or a list of them."""
    if isinstance(value, list):
        return [_copy(part, device) for part in value]
    return value.detach().clone().to(device) if isinstance(value, Tensor) else value
