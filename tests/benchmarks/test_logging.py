"""What W&B costs a fit: nothing between events but a guarded call, and how much at a cut of a ResNet-50."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import wandb
from lightning.pytorch.loggers import WandbLogger

from lightning_prune import MaskSet, Ticket, prunable_parameters, save_ticket
from lightning_prune.reports.wandb_content import LAYER_COLUMNS, layer_rows
from lightning_prune.reports.wandb_run import GuardedRun
from lightning_prune.scores import MagnitudeScores, score_quantiles

pytestmark = pytest.mark.bench


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardedRun]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    guarded = GuardedRun(WandbLogger(save_dir=tmp_path, project="bench", version="one", offline=True))
    assert not guarded.disabled
    guarded.open(tmp_path)
    yield guarded
    wandb.finish()


def seconds(call: Callable[[], Any], times: int = 1) -> float:
    """Processor time of this process, which a busy machine does not stretch as it stretches the clock's."""
    begin = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begin) / times


def test_a_guarded_call_beside_a_plain_one(run: GuardedRun) -> None:
    """Lightning's own values, by turns: what a logging step pays for not being stopped by W&B."""
    values = {"train_loss": 1.0, "epoch": 1.0}
    plain, guarded = [], []
    for number in range(60):
        plain.append(seconds(lambda n=number: run._log(values, n), 20))
        guarded.append(seconds(lambda n=number: run.log(values, n), 20))
    ratios = np.divide(guarded, plain)
    low, ratio, high = np.percentile(ratios, [25, 50, 75])
    print(f"plain {1e6 * np.median(plain):.0f} us, guarded {ratio:.3f} x (quartiles {low:.3f} to {high:.3f})")
    assert ratio < 1.5


def test_a_cut_of_a_resnet50(run: GuardedRun, tmp_path: Path) -> None:
    """25.5 M weights: the parts of what is logged, in seconds of this process, beside what the ticket itself takes."""
    network = torchvision.models.resnet50()
    parameters = prunable_parameters(network)
    scores, masks = MagnitudeScores(parameters), MaskSet({n: p.abs() > 1e-3 for n, p in parameters.items()})
    path = tmp_path / "round-01.safetensors"
    save_ticket(path, Ticket(masks, dict(network.state_dict()), {"round": 1}))
    quantiles = {name: score_quantiles(scores[name], mask) for name, mask in masks.items()}
    rows = layer_rows(1, masks.kept_per_tensor(), quantiles)
    found = {
        "quantiles": seconds(lambda: [score_quantiles(scores[name], mask) for name, mask in masks.items()]),
        "table": seconds(lambda: run.table("prune/layers", LAYER_COLUMNS, rows, 1)),
        "artifact": seconds(lambda: run.artifact("ticket-one", "ticket", path, "round-01", {"digest": "d"})),
        "ticket on disk": seconds(lambda: save_ticket(path, Ticket(masks, dict(network.state_dict()), {"round": 1}))),
    }
    print(f"{len(rows)} layers: " + ", ".join(f"{name} {value:.2f} s" for name, value in found.items()))
    assert torch.get_num_threads() == 1
    assert found["quantiles"] < 10
