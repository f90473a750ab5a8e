"""The state, and the wrappers on Lightning's loops that take it up again."""

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.resume.buffers import get_own_buffers, set_own_buffers
from lightning_prune.resume.generators import find_generators, get_generators, set_generators
from lightning_prune.resume.limits import (
    BETWEEN_EPOCHS,
    INSIDE_BATCH,
    VALIDATION_END,
    check_data,
    describe_data,
    find_position,
    warn_of_limits,
)
from lightning_prune.resume.metrics import get_epoch_metrics, set_epoch_metrics

_VERSION = 1


class ResumeState:
    """Save and restore what Lightning's checkpoints leave out, so that a resumed fit goes on as if never interrupted.

    A callback owns one instance and delegates: ``setup`` (stage "fit") to :meth:`attach`, ``teardown`` and
    ``on_exception`` to :meth:`detach`, ``state_dict`` and ``load_state_dict`` to the methods of that name. The rest
    happens in wrappers on the methods of this trainer's own loops; other trainers are untouched. While nothing is
    resumed it only reads generators, so a fit gives the same weights with and without it. One instance acts for a
    trainer: further ones stand by.

    State saved: integers, strings, lists and tensors (``weights_only`` loading takes it), about 20 kB a process,
    and buffers that differ between processes (BatchNorm's statistics under DDP).

    Raises:
        ResumeError: On resuming: the state was written by a later version, or, in the middle of an epoch, with another
            world size, batch size or length of the training data.

    Limits:
        The docstring of :mod:`lightning_prune.resume` says how far the promise reaches. With several processes, saving
        is a collective: every rank must save.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._leader: ResumeState | None = None  # another callback's instance that acts for this trainer
        self._undo: list[Callable[[], None]] = []
        self._reset()

    def _reset(self) -> None:
        self._loaded: dict[str, Any] | None = None  # from load_state_dict to fit_loop.run
        self._pending: dict[str, Any] | None = None  # from fit_loop.run to where the fit truly goes on
        self._before_setup_iter: dict[str, Any] | None = None
        # generators before the epoch's iterator was drawn; before its first batch, where that is later and needed;
        # batches that Lightning counts but this iterator never gave
        self._epoch: dict[str, Any] = {"iter": None, "first": None, "offset": 0}
        self._skip_batches = 0

    @property
    def trainer(self) -> "pl.Trainer":
        """The trainer that this is attached to, or was last."""
        assert self._trainer is not None, "attach first"
        return self._trainer

    # what the owner calls

    def attach(self, trainer: "pl.Trainer") -> None:
        """Install the wrappers on this trainer's loops; without effect if they are installed already."""
        if self._undo:
            return
        self._trainer = trainer
        self._reset()
        fit_loop = trainer.fit_loop
        self._leader = getattr(fit_loop, "_lightning_prune_resume", None)
        if self._leader is not None:
            self._undo.append(lambda: setattr(self, "_leader", None))
            return
        fit_loop._lightning_prune_resume = self  # type: ignore[attr-defined]
        self._undo.append(lambda: delattr(fit_loop, "_lightning_prune_resume"))
        self._wrap(fit_loop, "run", self._run)
        self._wrap(fit_loop, "_load_combined_loader_states", self._load_loader_states)
        self._wrap(fit_loop, "on_advance_start", self._on_epoch_start)
        self._wrap(fit_loop.epoch_loop, "reset", self._reset_epoch_loop)
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
        fit_loop, batch = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress.current
        epoch: Any = fit_loop.epoch_progress.current
        position = find_position(trainer)
        between = position == BETWEEN_EPOCHS
        own: dict[str, Any] = {
            "now": self._generators(),
            "callback_metrics": {key: value.detach().cpu() for key, value in trainer.callback_metrics.items()},
            "buffers": get_own_buffers(trainer.lightning_module),
        }
        if epoch.processed == 0 and between:  # before the first batch
            own["iter"] = self._before_setup_iter
        elif not between:
            own |= {"iter": self._epoch["iter"], "first": self._epoch["first"], "epoch": get_epoch_metrics(trainer)}
        return {
            "version": _VERSION,
            "ranks": _gather(own),
            "position": position,
            "batches": batch.completed if position == INSIDE_BATCH else batch.ready,
            "offset": 0 if between else self._epoch["offset"],
            "data": describe_data(trainer),
            # in on_train_epoch_end: plateau schedulers are stepped after it
            "plateau": between
            and epoch.completed < epoch.processed
            and fit_loop.epoch_loop._num_ready_batches_reached(),
            "accumulating": not between and fit_loop._should_accumulate(),
            "stop": bool(trainer.should_stop),
            "reloads": [
                float(fit_loop._last_train_dl_reload_epoch),
                float(fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch),
            ],
            "skip_batches": self._skip_batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state; it acts when the fit runs.

        Raises:
            ResumeError: A later version wrote it.
        """
        if self._leader is not None:
            self._leader.load_state_dict(state)
        elif state:
            version = state.get("version")
            if not isinstance(version, int) or version > _VERSION:
                raise ResumeError(
                    f"the checkpoint's resume state has version {version!r}, this library reads up to {_VERSION}; "
                    "upgrade lightning-prune, or resume from a checkpoint that this version wrote."
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
            ConfigError: Negative or not an integer; or, when the epoch begins, not less than its length.
        """
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
            raise ConfigError(f"batches={batches!r}: give the number of batches to leave out, an integer >= 0.")
        target = self if self._leader is None else self._leader
        target._skip_batches = batches

    # wrappers on the loops

    def _wrap(self, loop: _Loop, name: str, wrapper: Callable[..., None]) -> None:
        original = getattr(loop, name)
        setattr(loop, name, lambda *args: wrapper(original, *args))
        self._undo.append(lambda: delattr(loop, name))

    def _run(self, original: Callable[[], None]) -> None:
        """``fit_loop.run``: everything is restored, nothing is decided yet."""
        if self.trainer.fit_loop.is_resuming:
            if self._loaded is not None:
                self._pending = self._loaded
                self._begin(self.trainer, self._pending)
            else:
                rank_zero_warn(
                    "The checkpoint holds no resume state (it was written without this callback): random numbers and "
                    "the order of the data start anew, so this run will not equal an uninterrupted one."
                )
        self._loaded = None
        original()

    def _begin(self, trainer: "pl.Trainer", state: dict[str, Any]) -> None:
        """Turn Lightning's counters into those of the point at which the checkpoint was written."""
        epoch_loop, device = trainer.fit_loop.epoch_loop, trainer.strategy.root_device
        metrics = self._own(state).get("callback_metrics", {})
        trainer.callback_metrics.update({key: value.to(device) for key, value in metrics.items()})
        set_own_buffers(trainer.lightning_module, self._own(state).get("buffers", {}))
        if state["position"] == BETWEEN_EPOCHS:
            if state["plateau"]:  # it counts epochs, so before `completed` is raised
                epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            epoch: Any = trainer.fit_loop.epoch_progress
            for counts in (epoch.total, epoch.current):
                counts.ready = counts.started = counts.completed = counts.processed
            _clear_restart(trainer.fit_loop)
            self._restore_stop(state)
            return
        batch: Any = epoch_loop.batch_progress
        for counts in (batch.total, batch.current):  # the interrupted batch is done with, or was never begun
            counts.completed = counts.completed if state["position"] == INSIDE_BATCH else counts.ready
            counts.ready = counts.started = counts.processed = counts.completed
        if epoch_loop.max_steps != -1 and epoch_loop.global_step >= epoch_loop.max_steps:
            # the last step is done, but its validation and the end of its epoch are not: do not stop before them
            state["max_steps"], epoch_loop.max_steps = epoch_loop.max_steps, epoch_loop.global_step + 1

    def _load_loader_states(self, original: Callable[[], None]) -> None:
        """``fit_loop._load_combined_loader_states``: called right before ``setup_data`` draws an iterator."""
        original()
        self._before_setup_iter = self._generators()

    def _on_epoch_start(self, original: Callable[[], None]) -> None:
        """``fit_loop.on_advance_start``: calls ``on_train_epoch_start``, unless resumed inside an epoch."""
        trainer, state = self.trainer, self._pending
        if state is not None:
            fit_loop = trainer.fit_loop
            check_data(trainer, state["data"], state["position"])
            train_reload, val_reload = state["reloads"]
            fit_loop._last_train_dl_reload_epoch = train_reload
            fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = val_reload
            if state["position"] == BETWEEN_EPOCHS:
                self._pending = None
                self._load_pending_loader_states()
                own = self._own(state)
                if trainer.current_epoch == 0 and own.get("iter") is not None:
                    self._draw_iterator(own["iter"], fresh=True)
                self._set_generators(own.get("now"))
        original()

    def _reset_epoch_loop(self, original: Callable[[], None]) -> None:
        """``epoch_loop.reset``: warns of loaders that cannot be resumed, which the replay makes untrue."""
        with warnings.catch_warnings():
            if self._pending is not None:
                message = "You're resuming from a checkpoint that ended before the epoch ended"
                warnings.filterwarnings("ignore", message=message)
            original()

    def _on_epoch_run_start(self, original: Callable[..., None], fetcher: _DataFetcher) -> None:
        """``epoch_loop.on_run_start``: draws the epoch's iterator; the first batch comes next."""
        if self._pending is not None:
            original(fetcher)
            self._continue_epoch(self._pending, fetcher)
            return
        before, iterator = self._generators(), fetcher.combined_loader._iterator
        original(fetcher)
        drawn = fetcher.combined_loader._iterator is not iterator  # else Lightning keeps the one of setup_data
        self._epoch = {
            "iter": before if drawn else self._before_setup_iter,
            "first": None if drawn else before,
            "offset": self.trainer.fit_loop.epoch_loop.batch_progress.current.ready,
        }
        if self._skip_batches:
            self._fast_forward(fetcher)

    def _fast_forward(self, fetcher: _DataFetcher) -> None:
        batches, self._skip_batches = self._skip_batches, 0
        given = _discard(fetcher, batches)
        if given < batches or fetcher.done:
            raise ConfigError(
                f"an epoch was to begin at its batch {batches}, but it has only {given} batches: "
                "choose a point before its last batch."
            )
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        current.ready = current.started = current.processed = current.completed = batches
        if self.trainer.lightning_module.automatic_optimization:
            # Lightning does so at an accumulation's first batch, which may be among those left out
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    # going on from a checkpoint

    def _continue_epoch(self, state: dict[str, Any], fetcher: _DataFetcher) -> None:
        """Go to the position in the data, restore the generators, and finish the interrupted batch's iteration."""
        trainer = self.trainer
        epoch_loop, own = trainer.fit_loop.epoch_loop, self._own(state)
        self._pending = None
        warn_of_limits(trainer, state, fetcher)
        self._epoch = {"iter": own.get("iter"), "first": own.get("first"), "offset": state["offset"]}
        if not epoch_loop.batch_progress.is_last_batch:  # else no further batch of this iterator is needed
            self._position_data(own, state["batches"], state["offset"], fetcher)
        self._set_generators(own.get("now"))
        if "max_steps" in state:
            epoch_loop.max_steps = state["max_steps"]
        self._restore_stop(state)
        if "epoch" in own:
            set_epoch_metrics(trainer, own["epoch"])
        trainer._logger_connector._first_loop_iter = False  # else the first log resets what the epoch has summed up
        _clear_restart(trainer.fit_loop)
        if state["position"] != INSIDE_BATCH:
            epoch_loop._skip_next_val = state["position"] == VALIDATION_END
            epoch_loop.on_advance_end(fetcher)
            epoch_loop._skip_next_val = False

    def _position_data(self, own: dict[str, Any], batches: int, offset: int, fetcher: _DataFetcher) -> None:
        if any(isinstance(loader, _Stateful) for loader in fetcher.combined_loader.flattened):
            if self._load_pending_loader_states():
                iter(fetcher)
                fetcher.fetched = batches
            return
        fresh = own.get("first") is not None  # drawn in setup_data, where workers are new
        self._draw_iterator(own.get("iter"), fresh)
        self._set_generators(own.get("first"))
        given = _discard(fetcher, batches - offset)
        if given < batches - offset:
            raise ResumeError(
                f"the checkpoint was written after {batches} batches of an epoch, but the training data now gives only "
                f"{given + offset}: resume with the same data, or from a checkpoint written at the end of an epoch."
            )
        fetcher.fetched += offset

    def _draw_iterator(self, generators: dict[str, Any] | None, fresh: bool) -> None:
        fetcher = self.trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if fresh:
            fetcher.combined_loader.reset()  # ends persistent workers
        self._set_generators(generators)
        iter(fetcher)

    def _load_pending_loader_states(self) -> bool:
        """Load states of loaders that Lightning did not load: it passes over them at an epoch's end, for one."""
        fit_loop = self.trainer.fit_loop
        states, fit_loop._combined_loader_states_to_load = fit_loop._combined_loader_states_to_load, []
        if not states or fit_loop._combined_loader is None:
            return False
        fit_loop._combined_loader._load_state_dicts(states)
        return True

    def _restore_stop(self, state: dict[str, Any]) -> None:
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if state["stop"] and not any(isinstance(callback, Timer) for callback in callbacks):
            self.trainer.should_stop = True

    # generators of this trainer

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part; empty for ranks that there were none of."""
        rank, ranks = self.trainer.global_rank, state["ranks"]
        return ranks[rank] if rank < len(ranks) else {}

    def _explicit(self) -> list[torch.Generator]:
        combined = self.trainer.fit_loop._combined_loader
        return find_generators(combined.flattened) if combined is not None else []

    def _generators(self) -> dict[str, Any]:
        return get_generators(self._explicit(), self.trainer.strategy.root_device)

    def _set_generators(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            set_generators(state, self._explicit(), self.trainer.strategy.root_device)


def _gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return ranks


def _clear_restart(loop: _Loop) -> None:
    """Let the loop and its children go on as ones that were never reloaded."""
    loop.on_iteration_done()
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _clear_restart(child)


def _discard(fetcher: _DataFetcher, batches: int) -> int:
    """Throw batches away; how many there were."""
    source = getattr(fetcher, "iterator_wrapper", fetcher)  # of a fetcher that hands its iterator to training_step
    given = 0
    while given < batches and next(source, None) is not None:  # a loop over `source` would draw its iterator again
        given += 1
    return given
