"""What keeps a resumed fit from being equal to an uninterrupted one: refused, or said in a warning."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_prune.errors import ResumeError

# where a checkpoint was written
BETWEEN_EPOCHS = "between epochs"
BATCH_END = "on_train_batch_end"
VALIDATION_END = "on_validation_end"
INSIDE_BATCH = "inside a batch"
INSIDE_VALIDATION = "inside a validation"


def find_position(trainer: "pl.Trainer") -> str:
    """Where in the fit this is: one of this module's constants."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if epoch.started == epoch.processed:
        return BETWEEN_EPOCHS
    if batch.ready != batch.processed:
        return INSIDE_BATCH
    if batch.completed != batch.ready:
        return BATCH_END
    return VALIDATION_END if trainer.lightning_module._current_fx_name == "on_validation_end" else INSIDE_VALIDATION


def describe_data(trainer: "pl.Trainer") -> dict[str, Any]:
    """What the order of the training data depends on; -1 for an unknown batch size or length."""
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    sizes = [getattr(loader, "batch_size", None) for loader in loaders]
    lengths = [sized_len(loader) for loader in loaders]
    return {
        "world size": trainer.world_size,
        "batch size": [size if isinstance(size, int) else -1 for size in sizes],
        "batches an epoch": [length if length is not None else -1 for length in lengths],
        "data workers": [int(getattr(loader, "num_workers", 0)) for loader in loaders],
        "seed of the sampler": [_seed(loader) for loader in loaders],
    }


def _seed(loader: Any) -> int:
    """Of a sampler that shuffles by a seed of its own, as ``DistributedSampler`` does; -1 where there is none."""
    seed = getattr(getattr(loader, "sampler", None), "seed", None)
    return seed if isinstance(seed, int) else -1


def check_data(trainer: "pl.Trainer", then: dict[str, Any], position: str) -> None:
    """Compare the training data's settings with those a checkpoint was written with.

    Raises:
        ResumeError: They differ, and the checkpoint's place inside an epoch cannot be found any more.
    """
    now = describe_data(trainer)
    differences = {
        name: f"{name}: {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]
    }
    if not differences:
        return
    listing = "; ".join(differences.values())
    if position != BETWEEN_EPOCHS and differences.keys() != {"data workers"}:
        raise ResumeError(
            f"the checkpoint was written in the middle of an epoch, and its place in the data is lost ({listing}). "
            "Resume with the same settings, or from a checkpoint written at the end of an epoch."
        )
    rank_zero_warn(
        f"This run will not equal an uninterrupted one: the checkpoint was written with other settings ({listing}). "
        "Resume with the same settings for equal results."
    )


def warn_of_limits(trainer: "pl.Trainer", state: dict[str, Any], fetcher: _DataFetcher) -> None:
    """Say what is outside the promise for a checkpoint written in the middle of an epoch."""
    position, loaders = state["position"], fetcher.combined_loader.flattened
    lengths = {sized_len(loader) for loader in loaders}
    reasons = []
    if state["accumulating"]:
        reasons.append("it was written between two optimizer steps, and the gradients accumulated so far are lost")
    if position in (INSIDE_BATCH, INSIDE_VALIDATION):
        reasons.append(f"it was written {position}, which is repeated")
    elif is_overridden(position, trainer.lightning_module):
        reasons.append(f"it was written before the LightningModule's own {position}, which is not called again")
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        reasons.append("training_step takes batches from dataloader_iter itself")
    elif len(lengths) > 1:
        reasons.append("the training loaders differ in length, and the shorter ones are drawn again within an epoch")
    elif lengths == {None} and not all(getattr(loader, "num_workers", 0) for loader in loaders):
        reasons.append("the training data has no length, so its next batch was loaded ahead of the checkpoint")
    if trainer.current_epoch > 0 and any(getattr(loader, "persistent_workers", False) for loader in loaders):
        reasons.append("random numbers of persistent workers are lost")
    if reasons:
        rank_zero_warn(
            "This run may not equal an uninterrupted one, as the checkpoint was written in the middle of an epoch: "
            + "; ".join(reasons)
            + ". Resume from a checkpoint written at the end of an epoch for equal results."
        )
