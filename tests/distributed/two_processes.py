"""A fit on two processes with CostProfiler; run by test_costs.py. Writes what each process holds."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_prune import Budget, ChannelPruner, CostProfiler, PruneError
from lightning_prune.callbacks import costs
from tests._helpers.models import ToyModule, loaders, toy_network


def main(task: str, folder: Path) -> None:
    """Fit; ``task`` is ``"fit"``, or ``"late"``: rank 0 takes longer than the others wait."""
    torch.manual_seed(0)
    profile = CostProfiler(seconds=0.01, verbose=False, timeout=2 if task == "late" else 60)
    if task == "late":
        original = costs.measure_savings

        def late(*args: Any, **options: Any) -> Any:
            time.sleep(8)
            return original(*args, **options)

        costs.measure_savings = late
    fit = pl.Trainer(
        callbacks=[ChannelPruner("l2", Budget(channels=0.5), at="1ep", verbose=False), profile],
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = ToyModule(toy_network(norm=False))
    failure = ""
    try:
        fit.fit(module, *loaders())
    except PruneError as error:
        failure = str(error)
    result = folder / f"{fit.global_rank}.json"
    result.write_text(json.dumps({"failure": failure, "rows": profile.rows}))
    while fit.global_rank == 0 and not (folder / "1.json").exists():  # the process that started the other ends it too
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
