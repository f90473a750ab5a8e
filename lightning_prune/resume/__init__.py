"""What Lightning's checkpoints leave out: random-number state, the position in the data, metrics, a pending stop.

Lightning saves weights, optimizers, schedulers, callbacks and its loops' counters. A fit that is resumed from such a
checkpoint shuffles, augments and drops out anew, skips a validation or an epoch's end that the checkpoint interrupted,
and loses a step of a plateau scheduler. :class:`ResumeState` saves the rest and puts the fit back at the very point
at which the checkpoint was written.

**The promise.** A fit resumed with ``trainer.fit(ckpt_path=...)`` from a completed checkpoint goes on bit for bit, on
a CPU, as the one that was not interrupted: on the same machine and versions, with the same trainer arguments, model,
data, world size and number of workers. It holds for checkpoints written

- in ``on_train_epoch_end`` or between two epochs: any loader;
- in ``on_train_batch_end`` and in ``on_validation_end`` (``ModelCheckpoint`` writes nowhere else, ``save_on_exception``
  apart): loaders that give the same order of samples when their iterator is drawn again under the same generators. The
  epoch's earlier batches are loaded once more and thrown away.

Generators that are followed: the global ones of torch (CPU, and CUDA once it is in use), Python and NumPy, those of
worker processes, and any torch ``generator`` that a training loader or its samplers hold. With several processes each
one's own buffers, such as BatchNorm's statistics, come back too: Lightning saves rank 0's. What a training epoch has
summed up so far goes on as well: values given to ``self.log`` and torchmetrics held by the module.

**Outside the promise**, each with a warning when such a checkpoint is resumed:

- the middle of a gradient accumulation (the accumulated gradients are not in the checkpoint);
- checkpoints written within a batch or within a validation (``save_on_exception``, a signal): that batch or validation
  is repeated;
- mid-epoch: loaders without a length that augment in the main process, ``training_step(dataloader_iter)``, several
  loaders of different length (the shorter ones are drawn again within an epoch);
- persistent workers that draw random numbers, after the first epoch;
- what a LightningModule does in its own ``on_train_batch_end`` or ``on_validation_end``: Lightning calls it after the
  checkpoint is written;
- another number of workers, and between epochs another world size, batch size, length of the data or seed of its
  ``DistributedSampler``, which is ``seed_everything``'s (in the middle of an epoch these are an error).

Unnoticed: generators that a data set, sampler or model keeps for itself; samplers that draw from a global generator
after their first sample; ``on_train_start`` runs once more; limits in wall-clock time; several triggers of one
``ModelCheckpoint`` on one step, which may write that step again. Loaders with ``state_dict`` are positioned by their
own state alone, and are as exact as that is; at the end of an epoch it has to describe the next one's start.
"""

from lightning_prune.resume.checkpoint_io import AtomicCheckpointIO, save_atomically
from lightning_prune.resume.generators import undisturbed
from lightning_prune.resume.state import ResumeState

__all__ = ["AtomicCheckpointIO", "ResumeState", "save_atomically", "undisturbed"]
