"""A pruning run resumed from every checkpoint that Lightning can write: all rounds go on bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from lightning_prune import IterativeMagnitudePruner, LRRewind, WeightRewind
from tests._helpers.resuming import Case, check_moved, check_resumed, fit
from tests.integration.test_resume_fits import per_epoch, per_step

CASES = [
    ("2st", Case("a training that ends inside an epoch", per_epoch, options={"max_steps": 8, "max_epochs": -1})),
    (None, Case("validation inside epochs, no rewinding", per_step, options={"val_check_interval": 3})),
    ("1ep", Case("validation every second epoch", options={"check_val_every_n_epoch": 2, "max_epochs": 3})),
    ("4st", Case("accumulation", options={"accumulate_grad_batches": 2})),
]


def owners(to: str | None) -> list[Any]:
    prune = IterativeMagnitudePruner(0.3, rounds=2, monitor="val_loss", mode="min", verbose=False)
    return [prune, *([WeightRewind(to), LRRewind(to)] if to else [])]


@pytest.mark.parametrize(("to", "case"), CASES, ids=lambda value: value.name if isinstance(value, Case) else value)
def test_every_checkpoint_of_a_pruning_run(tmp_path: Path, to: str | None, case: Case) -> None:
    full = fit(case, tmp_path, owners=owners(to))
    assert len(full.saved) > 10
    moved = []
    for saved in full.saved[::3] + full.saved[-2:]:
        resumed = fit(case, tmp_path / "resumed", seeded=99, checkpoint=saved.path, hooks=(), owners=owners(to))
        check_resumed(full, resumed, saved)
        moved.append(check_moved(full, saved))
    assert any(moved)
