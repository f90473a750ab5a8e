"""What Lightning's checkpoints leave out: random-number state, the position in the data, metrics, a pending stop.

Lightning saves weights, optimizers, schedulers, callbacks and its loops' counters. A fit that is resumed from such a
checkpoint shuffles, augments and drops out anew, skips a validation or an epoch's end that the checkpoint interrupted,
and loses a step of a plateau scheduler. :class:`ResumeState` saves the rest and puts the fit back at the very point
at which the checkpoint was written.

**The promise.** A fit resumed with ``trainer.fit(ckpt_path=...)`` from a completed checkpoint goes on bit for bit, on
a CPU, as the one that was not interrupted: on the same machine and versions, with the same trainer arguments, model,
data, world size and number of workers. It holds for checkpoints written

- in ``on_train_epoch_end`` or between two epochs: any loader;
- in ``on_train_batch_end`` and in ``on_validation_end`` (``ModelCheckpoint`` writes nowhere else): loaders that give the
  same order of samples when their iterator is drawn again under the same generators. The epoch's earlier batches are
  loaded once more and thrown away.

Generators that are followed: the global ones of torch (CPU, and CUDA once it is in use), Python and NumPy, those of
worker processes, and any ``generator=`` of a loader or its samplers. Accumulated training metrics (``self.log``,
torchmetrics in the module) go on as well.

**Outside the promise**, each with a warning when such a checkpoint is resumed:

- the middle of a gradient accumulation (the accumulated gradients are not in the checkpoint);
- checkpoints written within a batch or within a validation (``save_on_exception``, a signal): that batch or validation
  is repeated;
- mid-epoch: loaders without a length that augment in the main process, ``training_step(dataloader_iter)``, several
  loaders of different length (the shorter ones are drawn again at an unknown time);
- persistent workers that draw random numbers, after the first epoch;
- what a LightningModule does in its own ``on_train_batch_end`` or ``on_validation_end``: Lightning calls it after the
  checkpoint is written;
- another number of workers, and between epochs another world size, batch size or length of the data.

and unnoticed: generators that a data set, sampler or model keeps for itself; samplers that draw from a global generator
after their first sample; ``on_train_start`` runs once more; time-based limits; ``ModelCheckpoint`` may write the step
that it resumes from once more if a second trigger falls on it. Loaders with ``state_dict`` are positioned by their own
state alone, and are as exact as that is; at the end of an epoch it has to describe the next one's start.
"""

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_prune.errors import ConfigError, ResumeError

_VERSION = 1
_BETWEEN_EPOCHS = "between epochs"
_BATCH_END = "on_train_batch_end"
_VALIDATION_END = "on_validation_end"
_INSIDE_BATCH = "inside a batch"
_INSIDE_VALIDATION = "inside a validation"


class ResumeState:
    """Save and restore what Lightning's checkpoints leave out, so that a resumed fit goes on as if never interrupted.

    A callback owns one instance and delegates: ``setup`` (stage "fit") to :meth:`attach`, ``teardown`` and
    ``on_exception`` to :meth:`detach`, ``state_dict`` and ``load_state_dict`` to the methods of that name. Everything
    else happens in wrappers on the methods of this trainer's own loops; other trainers are untouched. While nothing
    is resumed it only reads generators, so a fit gives the same weights with and without it. One instance acts for a
    trainer: further ones stand by.

    State saved: integers, strings, lists and tensors (``weights_only`` loading takes it), about 20 kB a process.

    Raises:
        ResumeError: On resuming: the state was written by a later version, or, in the middle of an epoch, another
            world size, batch size or length of the training data.

    Limits:
        See the module's docstring. With several processes, saving is a collective: every rank must save.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._leader: ResumeState | None = None  # another callback's instance that acts for this trainer
        self._undo: list[Callable[[], None]] = []
        self._loaded: dict[str, Any] | None = None
        self._resuming: dict[str, Any] | None = None  # the loaded state, from fit_loop.run to the true continuation
        self._before_setup_iter: dict[str, Any] | None = None
        self._epoch: dict[str, Any] = {"iter": None, "first": None, "offset": 0}
        self._skip_batches = 0

    # ------------------------------------------------------------------ what the owner calls

    def attach(self, trainer: "pl.Trainer") -> None:
        """Install the wrappers on this trainer's loops; without effect if they are installed already."""
        if self._undo or self._leader is not None:
            return
        self._trainer = trainer
        self._loaded = self._resuming = self._before_setup_iter = None
        self._epoch = {"iter": None, "first": None, "offset": 0}
        self._skip_batches = 0
        leader = getattr(trainer.fit_loop, "_lightning_prune_resume", None)
        if leader is not None:
            self._leader = leader
            self._undo.append(lambda: setattr(self, "_leader", None))
            return
        fit_loop = trainer.fit_loop
        fit_loop._lightning_prune_resume = self  # type: ignore[attr-defined]
        self._undo.append(lambda: delattr(fit_loop, "_lightning_prune_resume"))
        self._wrap(fit_loop, "run", self._run)
        self._wrap(fit_loop, "_load_combined_loader_states", self._load_loader_states)
        self._wrap(fit_loop, "on_advance_start", self._on_epoch_start)
        self._wrap(fit_loop.epoch_loop, "reset", self._reset_epoch)
        self._wrap(fit_loop.epoch_loop, "on_run_start", self._on_epoch_run_start)

    def detach(self) -> None:
        """Remove the wrappers; without effect if there are none."""
        while self._undo:
            self._undo.pop()()

    def state_dict(self) -> dict[str, Any]:
        """The state at this point of the fit; empty before :meth:`attach` and where another instance acts."""
        trainer = self._trainer
        if trainer is None or self._leader is not None:
            return {}
        fit_loop = trainer.fit_loop
        position = _position(trainer)
        progress = fit_loop.epoch_loop.batch_progress
        batches = progress.current.completed if position == _INSIDE_BATCH else progress.current.ready
        between = position == _BETWEEN_EPOCHS
        own = {"now": _generators(trainer)}
        if not between or trainer.fit_loop.epoch_progress.current.processed == 0:
            own["iter"], own["first"] = self._epoch["iter"] or self._before_setup_iter, self._epoch["first"]
        return {
            "version": _VERSION,
            "world_size": trainer.world_size,
            "ranks": _gather(own),
            "position": position,
            "batches": batches,
            "offset": 0 if between else self._epoch["offset"],
            "loaders": _describe_loaders(trainer),
            "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "plateau": between and _plateau_is_pending(trainer),
            "accumulating": not between and fit_loop._should_accumulate(),
            "stop": bool(trainer.should_stop),
            "reloads": [float(fit_loop._last_train_dl_reload_epoch),
                        float(fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch)],
            "skip_batches": self._skip_batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state; it acts when the fit runs."""
        if not state:
            return
        if self._leader is not None:
            self._leader.load_state_dict(state)
            return
        if not isinstance(state.get("version"), int) or state["version"] > _VERSION:
            raise ResumeError(
                f"the checkpoint's resume state has version {state.get('version')!r}, this library reads up to "
                f"{_VERSION}; upgrade lightning-prune, or resume from a checkpoint that this version wrote."
            )
        self._loaded = state
        self._skip_batches = state["skip_batches"]

    def fast_forward_next_epoch(self, batches: int) -> None:
        """Let the next epoch begin at its batch ``batches``.

        The epoch's iterator is drawn as always, that many batches are loaded and thrown away, and Lightning's counters
        are set, so that ``batch_idx``, the boundaries of accumulation, ``val_check_interval`` and the last batch are
        those of a whole epoch. Call it before the epoch's first batch: in ``on_train_epoch_start`` at the latest.

        Args:
            batches: How many batches are left out, from 0 to the epoch's length - 1.

        Raises:
            ConfigError: Negative; or, when the epoch begins, not less than its length.
        """
        if self._leader is not None:
            self._leader.fast_forward_next_epoch(batches)
            return
        if not isinstance(batches, int) or batches < 0:
            raise ConfigError(f"batches={batches!r}: give the number of batches to leave out as an integer >= 0.")
        self._skip_batches = batches

    # ------------------------------------------------------------------ wrappers on the loops

    def _wrap(self, loop: _Loop, name: str, wrapper: Callable[..., None]) -> None:
        original = getattr(loop, name)
        setattr(loop, name, lambda *args: wrapper(original, *args))
        self._undo.append(lambda: delattr(loop, name))

    def _run(self, original: Callable[[], None]) -> None:
        """``fit_loop.run``: everything is restored, nothing is decided yet."""
        assert self._trainer is not None
        if self._loaded is not None and self._trainer.fit_loop.is_resuming:
            self._resuming, self._loaded = self._loaded, None
            self._begin(self._trainer, self._resuming)
        elif self._trainer.fit_loop.is_resuming:
            rank_zero_warn(
                "The checkpoint holds no resume state (it was written without this callback): random numbers and the "
                "order of the data start anew, so this run will not equal an uninterrupted one."
            )
        original()

    def _begin(self, trainer: "pl.Trainer", state: dict[str, Any]) -> None:
        """Turn Lightning's counters into those of the point at which the checkpoint was written."""
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        trainer.callback_metrics.update({k: v.to(trainer.strategy.root_device) for k, v in state["metrics"].items()})
        epoch, batch = fit_loop.epoch_progress, epoch_loop.batch_progress
        if state["position"] == _BETWEEN_EPOCHS:
            if state["plateau"]:  # counts epochs, so before `completed` is raised
                epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            for counts in (epoch.total, epoch.current):
                counts.ready = counts.started = counts.completed = counts.processed
            _clear_restart(fit_loop)
            self._restore_stop(trainer, state)
            return
        for counts in (batch.total, batch.current):  # the interrupted batch is finished, or was never begun
            done = counts.completed if state["position"] == _INSIDE_BATCH else counts.ready
            counts.ready = counts.started = counts.processed = counts.completed = done
        if epoch_loop.max_steps != -1 and epoch_loop.global_step >= epoch_loop.max_steps:
            # the last step is done, its validation and its epoch's end are not: do not stop before them
            state["max_steps"], epoch_loop.max_steps = epoch_loop.max_steps, epoch_loop.global_step + 1

    def _load_loader_states(self, original: Callable[[], None]) -> None:
        """``fit_loop._load_combined_loader_states``: called right before the iterator of ``setup_data`` is drawn."""
        original()
        assert self._trainer is not None
        self._before_setup_iter = _generators(self._trainer)

    def _on_epoch_start(self, original: Callable[[], None]) -> None:
        """``fit_loop.on_advance_start``: calls ``on_train_epoch_start``."""
        trainer, state = self._trainer, self._resuming
        assert trainer is not None
        if state is not None:
            _check_same_data(trainer, state)
            fit_loop = trainer.fit_loop
            fit_loop._last_train_dl_reload_epoch, fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = state["reloads"]
            if state["position"] == _BETWEEN_EPOCHS:
                self._resuming = None
                own = _own(trainer, state)
                if trainer.fit_loop._combined_loader_states_to_load:
                    self._load_pending_loader_states(trainer)
                if trainer.current_epoch == 0 and own.get("iter") is not None:  # saved before the first batch
                    self._draw_iterator(trainer, own, batches=0)
                _set_generators(trainer, own.get("now"))
        original()

    def _reset_epoch(self, original: Callable[[], None]) -> None:
        """``epoch_loop.reset``: warns of loaders that cannot be resumed, which is what the replay is for."""
        if self._resuming is None:
            original()
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            original()

    def _on_epoch_run_start(self, original: Callable[..., None], fetcher: _DataFetcher) -> None:
        """``epoch_loop.on_run_start``: draws the epoch's iterator; the first batch comes next."""
        trainer, state = self._trainer, self._resuming
        assert trainer is not None
        if state is not None:
            original(fetcher)
            self._continue_epoch(trainer, state, fetcher)
            return
        before, iterator = _generators(trainer), fetcher.combined_loader._iterator
        original(fetcher)
        if fetcher.combined_loader._iterator is not iterator:
            self._epoch = {"iter": before, "first": None}
        else:  # Lightning keeps the iterator that setup_data drew
            self._epoch = {"iter": self._before_setup_iter, "first": before}
        self._epoch["offset"] = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self._skip_batches:
            self._fast_forward(trainer, fetcher)

    def _fast_forward(self, trainer: "pl.Trainer", fetcher: _DataFetcher) -> None:
        batches, self._skip_batches = self._skip_batches, 0
        for count in range(batches):
            if not _discard(fetcher):
                raise ConfigError(
                    f"an epoch was to begin at its batch {batches}, but it has only {count} batches: "
                    "choose a point inside the epoch."
                )
        if fetcher.done:
            raise ConfigError(
                f"an epoch was to begin at its batch {batches}, which is its end: begin the next epoch instead."
            )
        current = trainer.fit_loop.epoch_loop.batch_progress.current
        current.ready = current.started = current.processed = current.completed = batches

    # ------------------------------------------------------------------ going on inside an epoch

    def _continue_epoch(self, trainer: "pl.Trainer", state: dict[str, Any], fetcher: _DataFetcher) -> None:
        """Go to the position in the data, restore the generators, and finish the interrupted batch's iteration."""
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._resuming = None
        own = _own(trainer, state)
        _warn_of_limits(trainer, state, fetcher)
        self._epoch = {"iter": own.get("iter"), "first": own.get("first"), "offset": state["offset"]}
        if not epoch_loop.batch_progress.is_last_batch:  # else no batch of this iterator is needed any more
            self._position_data(trainer, own, state["batches"] - state["offset"])
        _set_generators(trainer, own.get("now"))
        if "max_steps" in state:
            epoch_loop.max_steps = state["max_steps"]
        self._restore_stop(trainer, state)
        _clear_restart(fit_loop)
        trainer._logger_connector._first_loop_iter = False  # else the first log resets what the epoch has summed
        if state["position"] == _INSIDE_BATCH:
            return
        epoch_loop._skip_next_val = state["position"] == _VALIDATION_END
        epoch_loop.on_advance_end(fetcher)
        epoch_loop._skip_next_val = False

    def _position_data(self, trainer: "pl.Trainer", own: dict[str, Any], batches: int) -> None:
        fit_loop = trainer.fit_loop
        loader, fetcher = fit_loop._combined_loader, fit_loop._data_fetcher
        assert loader is not None
        assert fetcher is not None
        if any(isinstance(part, _Stateful) for part in loader.flattened):
            if fit_loop._combined_loader_states_to_load:
                self._load_pending_loader_states(trainer)
                iter(fetcher)
                fetcher.fetched = batches
            return
        self._draw_iterator(trainer, own, batches)
        fetcher.fetched += fit_loop.epoch_loop.batch_progress.current.ready - batches

    def _draw_iterator(self, trainer: "pl.Trainer", own: dict[str, Any], batches: int) -> None:
        """Draw the interrupted epoch's iterator again and throw away the batches that were trained on."""
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if own.get("first") is not None:  # it was drawn from fresh workers, in setup_data
            fetcher.combined_loader.reset()
        _set_generators(trainer, own.get("iter"))
        iter(fetcher)
        _set_generators(trainer, own.get("first"))
        for count in range(batches):
            if not _discard(fetcher):
                raise ResumeError(
                    f"the checkpoint was written after {batches} batches of an epoch, but the training data now has "
                    f"only {count}: resume with the same data, or from a checkpoint written at the end of an epoch."
                )

    @staticmethod
    def _load_pending_loader_states(trainer: "pl.Trainer") -> None:
        """Load the states of loaders where Lightning did not: it skips them at the end of an epoch."""
        fit_loop = trainer.fit_loop
        assert fit_loop._combined_loader is not None
        fit_loop._combined_loader._load_state_dicts(fit_loop._combined_loader_states_to_load)
        fit_loop._combined_loader_states_to_load = []

    @staticmethod
    def _restore_stop(trainer: "pl.Trainer", state: dict[str, Any]) -> None:
        if state["stop"] and not any(isinstance(callback, Timer) for callback in trainer.callbacks):
            trainer.should_stop = True


# ---------------------------------------------------------------------- where a checkpoint was written


def _position(trainer: "pl.Trainer") -> str:
    epoch = trainer.fit_loop.epoch_progress.current
    batch = trainer.fit_loop.epoch_loop.batch_progress.current
    if epoch.started == epoch.processed:
        return _BETWEEN_EPOCHS
    if batch.ready != batch.processed:
        return _INSIDE_BATCH
    if batch.completed != batch.ready:
        return _BATCH_END
    hook = trainer.lightning_module._current_fx_name
    return _VALIDATION_END if hook == "on_validation_end" else _INSIDE_VALIDATION


def _plateau_is_pending(trainer: "pl.Trainer") -> bool:
    """Whether the checkpoint is written in ``on_train_epoch_end``, before plateau schedulers are stepped."""
    epoch = trainer.fit_loop.epoch_progress.current
    return epoch.completed < epoch.processed and trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def _clear_restart(loop: _Loop) -> None:
    """Let the loop and its children go on as ones that were never reloaded."""
    loop.on_iteration_done()
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _clear_restart(child)


def _discard(fetcher: _DataFetcher) -> bool:
    source: Iterator = getattr(fetcher, "iterator_wrapper", fetcher)
    try:
        next(source)
    except StopIteration:
        return False
    return True


def _own(trainer: "pl.Trainer", state: dict[str, Any]) -> dict[str, Any]:
    ranks = state["ranks"]
    return ranks[trainer.global_rank] if trainer.global_rank < len(ranks) else {}


# ---------------------------------------------------------------------- limits of the promise


def _describe_loaders(trainer: "pl.Trainer") -> list[dict[str, Any]]:
    combined = trainer.fit_loop._combined_loader
    descriptions = []
    for loader in combined.flattened if combined is not None else []:
        batch_size = getattr(loader, "batch_size", None)
        try:
            length = len(loader)
        except (TypeError, NotImplementedError):
            length = -1
        descriptions.append(
            {
                "workers": int(getattr(loader, "num_workers", 0)),
                "batch size": batch_size if isinstance(batch_size, int) else -1,
                "batches": length,
            }
        )
    return descriptions


def _check_same_data(trainer: "pl.Trainer", state: dict[str, Any]) -> None:
    then: dict[str, Any] = {"world size": state["world_size"], "number of training loaders": len(state["loaders"])}
    loaders = _describe_loaders(trainer)
    now: dict[str, Any] = {"world size": trainer.world_size, "number of training loaders": len(loaders)}
    workers_then, workers_now = ([d["workers"] for d in ds] for ds in (state["loaders"], loaders))
    for name in ("batch size", "batches"):
        then[name], now[name] = ([d[name] for d in ds] for ds in (state["loaders"], loaders))
    differences = [f"{name}: {then[name]} then, {now[name]} now" for name in then if then[name] != now[name]]
    if differences and state["position"] != _BETWEEN_EPOCHS:
        raise ResumeError(
            "the checkpoint was written in the middle of an epoch, whose place in the data is lost now ("
            + "; ".join(differences)
            + "). Resume with the same settings, or from a checkpoint written at the end of an epoch."
        )
    if workers_then != workers_now:
        differences.append(f"workers of the training loaders: {workers_then} then, {workers_now} now")
    if differences:
        rank_zero_warn(
            "This run will not equal an uninterrupted one: settings differ from those the checkpoint was written with ("
            + "; ".join(differences)
            + "). Resume with the same settings for equal results."
        )


def _warn_of_limits(trainer: "pl.Trainer", state: dict[str, Any], fetcher: _DataFetcher) -> None:
    combined, position = fetcher.combined_loader, state["position"]
    lengths = {d["batches"] for d in state["loaders"]}
    hook = position if position in (_BATCH_END, _VALIDATION_END) else None
    reasons = []
    if state["accumulating"]:
        reasons.append("it was written between two optimizer steps and gradients accumulated so far are lost")
    if position in (_INSIDE_BATCH, _INSIDE_VALIDATION):
        reasons.append(f"it was written {position}, which is repeated")
    if hook is not None and is_overridden(hook, trainer.lightning_module):
        reasons.append(f"it was written before the LightningModule's own {hook}, which is not called for that batch")
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        reasons.append("training_step takes batches from dataloader_iter itself")
    elif len(lengths) > 1:
        reasons.append("the training loaders differ in length, and shorter ones are drawn again within an epoch")
    elif lengths == {-1} and any(not getattr(loader, "num_workers", 0) for loader in combined.flattened):
        reasons.append("the training data has no length, so the next batch was loaded before the checkpoint was written")
    if trainer.current_epoch > 0 and any(getattr(loader, "persistent_workers", False) for loader in combined.flattened):
        reasons.append("random numbers of persistent workers are lost")
    if reasons:
        rank_zero_warn(
            "This run may not equal an uninterrupted one, for the checkpoint was written in the middle of an epoch: "
            + "; ".join(reasons)
            + ". Resume from a checkpoint written at the end of an epoch for equal results."
        )


# ---------------------------------------------------------------------- generators


def _gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return ranks


def _generators(trainer: "pl.Trainer") -> dict[str, Any]:
    """The state of every generator that the fit draws from, as tensors, integers and lists."""
    version, python, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  (the global generator is what users' data sets draw from)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(python), gauss],
        "loaders": [generator.get_state() for generator in _loader_generators(trainer)],
    }
    if isinstance(numpy, dict) and numpy["bit_generator"] == "MT19937":  # the default; no other can be set by legacy calls
        keys, position = numpy["state"]["key"], numpy["state"]["pos"]
        state["numpy"] = [torch.from_numpy(keys.astype(np.int64)), int(position), int(numpy["has_gauss"]), float(numpy["gauss"])]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state(trainer.strategy.root_device)
    return state


def _set_generators(trainer: "pl.Trainer", state: dict[str, Any] | None) -> None:
    if state is None:
        return
    torch.set_rng_state(state["torch"].cpu())
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python.tolist()), gauss))
    if "numpy" in state:
        keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu(), trainer.strategy.root_device)
    generators = _loader_generators(trainer)
    if len(generators) == len(state["loaders"]):
        for generator, saved in zip(generators, state["loaders"], strict=True):
            generator.set_state(saved.cpu())


def _loader_generators(trainer: "pl.Trainer") -> list[torch.Generator]:
    """The explicit ``generator=`` of training loaders and their samplers, each once."""
    found: dict[int, torch.Generator] = {}
    combined = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else []:
        batch_sampler = getattr(loader, "batch_sampler", None)
        holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        for holder in holders:
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
