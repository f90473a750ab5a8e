"""One of two processes of fits with slimming and HRank; test_structured.py starts both, and runs them alone."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune import Budget, HRankPruner, LRRewind, SlimmingPruner, SlimmingRegularizer
from tests._helpers.channels import Residual, Watch, images
from tests._helpers.models import ToyModule, trainer

BATCH = 8
EPOCHS = 2


class FixedStatistics(Residual):
    """BatchNorm by running statistics: those of a batch are each process's own, and two could not equal one."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def module() -> ToyModule:
    torch.manual_seed(3)
    network = FixedStatistics()
    with torch.no_grad():
        for norm in (network.bn, network.bn_a, network.bn_b):  # scales and ranks that differ
            norm.weight.copy_(torch.rand(8) + 0.2)
            norm.bias.copy_(torch.linspace(-0.8, 0.8, 8)[torch.randperm(8)])
    return ToyModule(network.train(), lambda m: SGD(m.parameters(), 0.05, momentum=0.9))


def callbacks(job: str) -> list[Any]:
    if job == "hrank":
        return [HRankPruner(Budget(channels=0.5), "7st", images=33, verbose=False)]
    if job == "layerwise":
        return [HRankPruner(rates="[0.5]*3", at=["3st", "7st"], layerwise=True, images=33, verbose=False)]
    penalise = SlimmingRegularizer(0.02, "subgradient" if job == "slimming" else "proximal", "group")
    return [SlimmingPruner(Budget(channels=0.5), ["4st", "1ep"], verbose=False), penalise, LRRewind("0st")]


def run(folder: Path, job: str, processes: int = 1) -> dict[str, Any]:
    """One fit; every process takes its part of the same batches."""
    watch, fitted = Watch(moving=False), module()
    options: dict[str, Any] = {"max_epochs": EPOCHS, "use_distributed_sampler": False}
    whole, val = images(batch_size=BATCH)
    if processes > 1:
        options |= {"devices": processes, "strategy": DDPStrategy(process_group_backend="gloo")}
        sampler = DistributedSampler(whole.dataset, processes, int(os.environ["RANK"]), shuffle=False)
        whole = DataLoader(whole.dataset, BATCH // processes, sampler=sampler)
    trainer(folder, [*callbacks(job), watch], **options).fit(fitted, whole, val)
    return {
        "steps": [event.step for event in watch.events],
        "digests": [event.plan.digest() for event in watch.events],
        "weights": [p.detach().flatten().tolist() for p in fitted.parameters()],
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = {job: run(Path(sys.argv[1]) / job, job, 2) for job in sys.argv[2:]}
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
