"""Fits in which channels leave, resumed from every checkpoint that Lightning can write: they go on bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import Budget, ChannelPruner, LRRewind, WeightRewind
from tests._helpers.resuming import Case, Noisy, SaveEverywhere, check_moved, check_resumed, fit
from tests.integration.test_resume_fits import per_epoch, per_step

HALF = Budget(channels=0.5)


class Stream(IterableDataset):
    """The same samples without a length or an index."""

    def __init__(self) -> None:
        self.data = Noisy()

    def __iter__(self) -> Any:
        return iter([self.data[i] for i in range(len(self.data))])


def stream() -> tuple[Any, Any]:
    return DataLoader(Stream(), 4), DataLoader(Noisy(8), 4)


CASES: list[tuple[str, dict[str, Any], list[Any], Case]] = [
    ("one cut", {"at": "50%", "validate_cuts": True}, [], Case("per epoch", per_epoch)),
    ("inside an epoch", {"at": ["3st", "8st"], "validate_cuts": True}, [],
     Case("per step", per_step, options={"val_check_interval": 3})),
    ("taylor", {"criterion": "taylor", "at": "8st", "taylor_steps": 4}, [], Case("taylor", per_step)),
    ("taylor, a whole epoch", {"criterion": "taylor", "at": "6st"}, [], Case("taylor", per_epoch)),
    ("random", {"criterion": "random", "at": ["2st", "4st"]}, [], Case("accumulation", options={
        "accumulate_grad_batches": 2})),
    ("schedule again", {"at": ["50%", "100%"]}, [LRRewind("2st")], Case("rewound", per_step)),
    ("weights too", {"at": "100%"}, [WeightRewind("2st"), LRRewind("2st")], Case("rewound", per_epoch)),
    ("averaged", {"at": "7st"}, [], Case("averaged", per_epoch, callbacks=lambda: [EMAWeightAveraging(decay=0.5)])),
    ("a stream", {"at": ["0st", "1ep"]}, [], Case("a stream", per_epoch, loaders=stream, options={
        "limit_train_batches": 6})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "rewinders", "case"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_checkpoint(tmp_path: Path, name: str, options: dict[str, Any], rewinders: list[Any], case: Case) -> None:
    def owners() -> list[Any]:
        prune = ChannelPruner(**({"criterion": "l2", "budget": HALF, "module": "network", "verbose": False} | options))
        return [prune, *[type(r)(str(r.to)) for r in rewinders]]

    cutters: list[Any] = owners()
    # batches of a stream are loaded ahead, so it resumes exactly between epochs only
    hooks = ["on_train_epoch_end"] if name == "a stream" else SaveEverywhere.HOOKS
    full = fit(case, tmp_path, owners=cutters, hooks=hooks)
    rows = cutters[0]._recorder.record.comparable()
    assert rows["rounds"][0]["kept"] == 8
    assert rows["rounds"][-1]["kept"] == 4
    assert full.state["model.network.0.weight"].shape == (4, 5)
    moved, before, after = [], 0, 0
    # Lightning ends a fit that has nothing left to train without on_train_end, where averages are taken up
    last = [] if name == "averaged" else full.saved[-1:]
    for saved in full.saved[: -1 : 1 if len(full.saved) < 4 else 2] + last:
        again = owners()
        resumed = fit(case, tmp_path / "resumed", seeded=99, checkpoint=saved.path, hooks=(), owners=again)
        check_resumed(full, resumed, saved)
        assert again[0]._recorder.record.comparable() == rows, saved.path.name
        # an average takes the weights' place at the very end, so these move then without training
        moved.append(name != "averaged" and check_moved(full, saved))
        before += saved.weights.numel() == full.saved[0].weights.numel()
        after += saved.weights.numel() == full.weights.numel()
    assert any(moved) == (name != "averaged")
    assert after
    assert before or name == "a stream"
