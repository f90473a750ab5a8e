"""Measures what pruning saves while it happens: parameters, multiply-adds and latency at every prune event."""

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.callbacks.company import decided_once, require_whole_network
from lightning_prune.callbacks.events import PruneEvent, send_costs
from lightning_prune.callbacks.examples import find_module, given_inputs, inputs_of, samples, to_batch
from lightning_prune.callbacks.folders import tries_out
from lightning_prune.callbacks.logs import add_companions, log_numbers
from lightning_prune.callbacks.screen import LiveTable
from lightning_prune.costs import Costs, RunAs, count_costs, measure_savings
from lightning_prune.costs.savings import HEADER, Savings
from lightning_prune.errors import ConfigError, PruneError
from lightning_prune.resume import undisturbed
from lightning_prune.running import copy_model, map_tensors
from lightning_prune.wrappers import bare


class CostProfiler(Callback):
    """Count and time the network at fit start, at each prune event and at the end; put both speed-ups side by side.

    The *theoretical* speed-up is multiply-adds of the dense network over those that remain if zeros are skipped; the
    *measured* one is the ratio of latencies, the dense network and the pruned one timed by turns
    (:func:`compare_latency`). They differ, and by how much is what this callback shows.

    Acts in: ``on_train_start``, the prune event (after rewinding, with the event's masks), ``on_fit_end``. Between them
    there is no hook. Rank 0 measures while the others wait, without spinning. Changes nothing: modes, random-number
    state and weights come back. Results go to the trainer's loggers (``prune/num_params``, ``prune/num_macs``,
    ``prune/theoretical_speedup``, ``prune/measured_speedup``, ``prune/latency_ms``), to every callback that defines
    ``record_costs(trainer, row)`` (the pruner's record, W&B's tables and histograms) and to the screen.

    Args:
        latency: Whether to measure latency; counts alone take two forward passes.
        seconds: How long each comparison takes samples.
        batch_size: Of the inputs; 1 gives figures an example.
        channels_last: Time both with channels last.
        compiled: Time both compiled by ``torch.compile``; each event compiles anew.
        module: Name of the submodule to measure. Default: the LightningModule if it defines ``forward``, else its only
            child with parameters.
        example_inputs: A tuple of arguments, a dict of keyword arguments, or the one argument of ``forward``. Default:
            ``example_input_array``, else samples of the training data, else what the first forward pass gets.
        timeout: Seconds that other processes wait for rank 0.
        verbose: Print a line at each measurement.

    State saved: the measurements.

    Raises:
        ConfigError: An argument out of range; in ``setup``: a network that cannot be copied (a copy of the dense one is
            kept to be timed by turns), or a strategy that shards it.
        MeasurementError: At the start: the network cannot be run or timed. Later that is a warning, and training goes
            on.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import Budget, ChannelPruner, CostProfiler
        >>> callbacks = [ChannelPruner("l2", Budget(macs=0.5), at="50%"), CostProfiler()]
        >>> trainer = Trainer(max_epochs=30, callbacks=callbacks, logger=False, enable_checkpointing=False)

    Limits:
        Latency is that of evaluation on the training device, in the Trainer's precision. The copy of the dense network
        lies in the CPU's memory and moves to the device while it is timed.
    """

    prune_order = 3

    def __init__(
        self,
        latency: bool = True,
        seconds: float = 1.0,
        batch_size: int = 1,
        channels_last: bool = False,
        compiled: bool = False,
        module: str | None = None,
        example_inputs: Any = None,
        timeout: float = 600.0,
        verbose: bool = True,
    ) -> None:
        for name, value in (("seconds", seconds), ("timeout", timeout)):
            if not value > 0:
                raise ConfigError(f"{name}={value!r}: expected seconds, more than 0.")
        self._how = RunAs(batch_size)  # refuses a batch size out of range
        self.latency, self.seconds, self.timeout, self.verbose = latency, seconds, timeout, verbose
        self.channels_last, self.compiled = channels_last, compiled
        self.module, self.example_inputs = module, example_inputs
        self.rows: list[dict[str, Any]] = []
        """The measurements so far, as JSON content."""
        self._dense: nn.Module | None = None
        self._dense_costs: Costs | None = None
        self._inputs: Any = None
        self._hook: Any = None
        self._group: Any = None
        self._round = 0
        self._table = LiveTable(verbose)

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep a copy of the dense network: a resumed run's checkpoint has not been loaded yet."""
        if stage != "fit":
            return
        require_whole_network(trainer, "so no process can time the network")
        add_companions(trainer)
        self.rows, self._inputs, self._dense, self._dense_costs = [], None, None, None
        self._round = 0
        self._table = LiveTable(self.verbose)
        if next(pl_module.parameters(), None) is not None:  # else configure_model() will build it
            self._keep_dense(pl_module)

    def _keep_dense(self, pl_module: pl.LightningModule) -> None:
        target = self._target(pl_module)
        try:
            self._dense = copy_model(target).cpu()
        except Exception as error:
            raise ConfigError(
                f"{type(target).__name__} cannot be copied ({type(error).__name__}: {error}), and the dense network "
                "must be kept to be timed beside the pruned one. Name the network within it with module='...', or use "
                "CostProfiler(latency=False)."
            ) from error

    def _target(self, pl_module: pl.LightningModule) -> nn.Module:
        return bare(pl_module.get_submodule(find_module(pl_module, self.module)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the dense network, or get ready to see what the first forward pass gets."""
        if self._dense is None:
            self._keep_dense(pl_module)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        self._inputs = self._find_inputs(trainer, pl_module)
        if self._inputs is None:
            self._hook = self._target(pl_module).register_forward_pre_hook(self._take_inputs, with_kwargs=True)
        elif not self.rows:
            self._measure(trainer, pl_module, "dense", must=True)

    def _find_inputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        inputs = given_inputs(self.example_inputs, trainer, pl_module)
        if inputs is None:
            with undisturbed(trainer.strategy.root_device):
                batch = samples(trainer)
                if batch is None:
                    return None
                inputs = inputs_of(to_batch(batch, trainer, pl_module), self._target(pl_module))
        return self._how.inputs(inputs)

    def _take_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hook.remove()
        self._hook = None
        if args and kwargs:
            raise ConfigError(
                f"{type(module).__name__} is called with positional and keyword arguments: give CostProfiler "
                "example_inputs, or set self.example_input_array on the LightningModule."
            )
        self._inputs = self._how.inputs(map_tensors(torch.clone, args or kwargs))

    # ----------------------------------------------------------------- measuring

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Measure the pruned network."""
        self._round = event.round
        self._measure(trainer, pl_module, f"round {event.round}", self._masks(pl_module, event))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the network that was trained."""
        if self._inputs is None and self._hook is None:  # resumed from the last checkpoint of all: nothing was trained
            self._inputs = self._find_inputs(trainer, pl_module)
        self._measure(trainer, pl_module, "end")
        self._release()

    def _masks(self, pl_module: pl.LightningModule, event: PruneEvent) -> dict[str, Tensor] | None:
        if event.masks is None:
            return None
        name = find_module(pl_module, self.module)
        prefix = f"{name}." if name else ""
        return {n.removeprefix(prefix): mask for n, mask in event.masks.items() if n.startswith(prefix)}

    def _measure(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        label: str,
        masks: dict[str, Tensor] | None = None,
        must: bool = False,
    ) -> None:
        if self._inputs is None:
            rank_zero_warn(f"CostProfiler: nothing has run through the network yet; {label!r} is not measured.")
            return

        def measure() -> tuple[dict[str, Any], str, dict[str, float]]:
            found = self._savings(trainer, pl_module, masks, dense=label == "dense")
            return found.to_json(), found.text(label), found.numbers()

        try:
            content, line, numbers = self._once(measure)
        except PruneError as error:
            if must:
                raise
            rank_zero_warn(f"CostProfiler: {label!r} is not measured: {error}")
            return
        row = {"label": label, "round": self._round, "step": trainer.global_step} | content
        self.rows.append(row)
        log_numbers(trainer, {f"prune/{name}": value for name, value in numbers.items()})
        send_costs(trainer, row)
        self._table.print(trainer, lambda: HEADER, line)

    def _once(self, measure: Callable[[], Any]) -> Any:
        try:
            return decided_once(measure, self._group)
        except RuntimeError as error:
            if self._group is None or isinstance(error, PruneError):
                raise
            raise PruneError(
                f"rank 0 did not measure within timeout={self.timeout} s ({error}). Raise CostProfiler's timeout."
            ) from error

    def _savings(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: dict[str, Tensor] | None, dense: bool
    ) -> Savings:
        target = self._target(pl_module)
        own = next(target.parameters())
        assert self._dense is not None
        with ExitStack() as stack:
            stack.enter_context(undisturbed(trainer.strategy.root_device))
            stack.enter_context(trainer.precision_plugin.forward_context())
            reference = self._dense.to(own.device, own.dtype)
            stack.callback(self._dense.cpu)
            if self._dense_costs is None:
                self._dense_costs = count_costs(reference, self._inputs)
            return measure_savings(
                target,
                self._inputs,
                None if dense else reference,
                None if dense else self._dense_costs,
                masks,
                latency=self.latency,
                seconds=0.01 if tries_out(trainer) else self.seconds,
                channels_last=self.channels_last,
                compiled=self.compiled,
            )

    # -------------------------------------------------------------------- state

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self._group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._group)
        self._hook, self._group, self._dense = None, None, None

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far."""
        return {"rows": list(self.rows), "round": self._round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up; what was measured after the checkpoint is forgotten."""
        self.rows, self._round = list(state_dict["rows"]), state_dict["round"]
