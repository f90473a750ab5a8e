"""Sparsity training of network slimming: an L1 penalty on channel scales that enters once per optimizer step."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks.company import loss_scale, require_whole_network
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.examples import early_inputs, find_module, inputs_of
from lightning_prune.channels.gates import Gates, gated_groups
from lightning_prune.channels.slimming import (
    Clusters,
    add_subgradient_,
    batch_norm_parameters,
    count_near_zero,
    couple,
    soft_threshold_,
)
from lightning_prune.channels.trace import trace_channels
from lightning_prune.errors import ConfigError
from lightning_prune.prunable import matching
from lightning_prune.resume import undisturbed
from lightning_prune.wrappers import bare, uncompiled


class SlimmingRegularizer(Callback):
    """Push BatchNorm scales to zero while training: ``loss + strength * sum |scale|``, for network slimming.

    ``update="subgradient"``: ``strength * sign(scale)`` is added to the scales' gradients once per optimizer step,
    after gradients were accumulated, averaged over processes and unscaled, and before they are clipped: what autograd
    would give for the whole loss. ``update="proximal"``: gradients are left alone; after the step each scale moves
    towards 0 by learning rate times ``strength`` and stops at exactly 0. Adaptive optimizers (Adam) divide a
    sub-gradient by its own size, so that its strength is lost: use the proximal update with them. It takes ``strength``
    times the sum of the learning rates off a scale; SGD with momentum 0.9 takes ten times as much by the same number.

    Acts in: ``on_before_optimizer_step``, or after each optimizer step (proximal). Changes in place: gradients of the
    scales, or the scales. After the last cut of a pruner beside it it is off: fine-tuning goes without a penalty.
    Logs ``prune/scales_near_zero`` each epoch: the fraction of scales below 1 % of the largest.

    Paper: Liu et al. 2017, arXiv:1708.06519, Eq. 1. Deviations: BatchNorm of any dimension; the authors' code has 2d
    only. ``coupled="group"`` and the proximal update are not in the paper. Shifts are not penalised, and weight decay
    acts on scales as on all else, as in the authors' code.

    Args:
        strength: Weight of the penalty, above 0. The paper's 1e-4 (VGG) and 1e-5 (ResNet, DenseNet) are for SGD.
        update: ``"subgradient"`` or ``"proximal"``.
        coupled: Scales of channels that only leave together (a residual stage). ``"each"``: every scale for itself, as
            in the paper. ``"group"``: those of one channel by their common norm, so that they fall to zero together;
            needs a trace of the network.
        gates: Scale channels that no BatchNorm scales (hidden units of an MLP, attention heads) by :class:`Gates`, so
            that they can be slimmed too. The factors are folded into the weights that read these channels after every
            step: the network and its ``state_dict`` stay plain. Needs a trace. Gates always take the proximal step, and
            follow plain gradient descent at the optimizer's learning rate, whatever the optimizer.
        exclude: BatchNorms to leave alone, by name or pattern.
        module: Name of the submodule to regularise. Default: the LightningModule if it defines ``forward``, else its
            only child with parameters.
        example_inputs: For the trace; as for :class:`ChannelPruner`.

    State saved: how many cuts it has seen, and the gates.

    Raises:
        ConfigError: An argument out of range; in ``on_fit_start``: no BatchNorm with a trainable scale, scales that no
            optimizer steps, or LBFGS (several evaluations a step); after the first epoch: manual optimisation that
            never reached ``on_before_optimizer_step``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import SlimmingRegularizer
        >>> trainer = Trainer(callbacks=[SlimmingRegularizer(1e-4)], logger=False, enable_checkpointing=False)

    Limits:
        Layers whose scale has no gradient in a step are left alone in that step.
    """

    def __init__(
        self,
        strength: float = 1e-4,
        update: Literal["subgradient", "proximal"] = "subgradient",
        coupled: Literal["each", "group"] = "each",
        gates: bool = False,
        exclude: Sequence[str] = (),
        module: str | None = None,
        example_inputs: Any = None,
    ) -> None:
        if isinstance(strength, bool) or not isinstance(strength, float | int) or not 0 < strength < float("inf"):
            raise ConfigError(f"strength={strength!r}: expected a number above 0, such as 1e-4.")
        if update not in ("subgradient", "proximal"):
            raise ConfigError(f"update={update!r} is unknown; choose 'subgradient' or 'proximal'.")
        if coupled not in ("each", "group"):
            raise ConfigError(f"coupled={coupled!r} is unknown; choose 'each' or 'group'.")
        if isinstance(exclude, str):
            raise ConfigError(f"exclude={exclude!r}: expected a list of names; write exclude=[{exclude!r}].")
        self.strength, self.update, self.coupled = float(strength), update, coupled
        self.with_gates = gates
        self.exclude, self.module, self.example_inputs = tuple(exclude), module, example_inputs
        self.round = 0
        self._saved_gates: Mapping[str, Tensor] | None = None
        self._reset()

    def _reset(self) -> None:
        self._target: nn.Module | None = None
        self._scales: dict[str, nn.Parameter] = {}
        self._numbers: dict[str, Tensor] | None = None  # of coupled scales
        self.gates: Gates | None = None
        self._traced = False
        self._inputs: Any = None
        self._last_round: int | None = None  # in which there is no penalty
        self._plans: dict[int, tuple[list[nn.Parameter], Clusters | None]] = {}  # by optimizer
        self._handles: list[RemovableHandle] = []
        self._batches = self._steps = 0

    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave, for the record."""
        return {
            "strength": self.strength,
            "update": self.update,
            "coupled": self.coupled,
            "gates": self.with_gates,
            "exclude": list(self.exclude),
        }

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin with no cut seen."""
        if stage == "fit":
            require_whole_network(trainer, "so its scales cannot be regularised")
            self.round, self._saved_gates = 0, None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the scales, and refuse what cannot work."""
        self._release()
        self._reset()
        name = find_module(pl_module, self.module)
        self._target = bare(pl_module.get_submodule(name))
        self._scales = self._find_scales(name)
        self._check_optimizers(trainer)
        rounds = [c.rounds for c in trainer.callbacks if getattr(c, "sends_prune_events", False)]  # type: ignore[attr-defined]
        self._last_round = rounds[0] if rounds else None
        if self.coupled == "group" or self.with_gates:
            if rounds:  # a resumed fit may cut before its first batch, and the pruner then asks for the gates
                _ = trainer.estimated_stepping_batches  # makes the loader, as the pruner would right after
            self._inputs = early_inputs(self.example_inputs, trainer, pl_module, self._target)
            if self._inputs is not None:
                self._trace(trainer)
        if self.update == "proximal" or self.with_gates:
            self._handles = [o.register_step_post_hook(self._after_step) for o in trainer.optimizers]

    def _find_scales(self, name: str) -> dict[str, nn.Parameter]:
        assert self._target is not None
        with uncompiled(self._target):
            found = batch_norm_parameters(self._target)
            names = list(found)
            if not found and not self.with_gates:
                raise ConfigError(
                    f"{type(self._target).__name__} has no BatchNorm with a trainable scale, so there is nothing to "
                    "regularise. Let gates scale its channels (gates=True), or use ChannelPruner with another "
                    "criterion ('l2', 'taylor')."
                )
            for pattern in self.exclude:
                for left_out in matching(pattern.removeprefix(f"{name}."), names, "exclude"):
                    found.pop(left_out, None)
        if not found and not self.with_gates:
            raise ConfigError(f"exclude={list(self.exclude)} leaves no BatchNorm to regularise.")
        return found

    def _check_optimizers(self, trainer: pl.Trainer) -> None:
        held: set[int] = set()
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise ConfigError(
                    "LBFGS evaluates gradients several times a step and searches along the loss without the penalty; "
                    "use another optimizer, such as SGD."
                )
            held |= {id(p) for group in optimizer.param_groups for p in group["params"]}
        stepped = [name for name, scale in self._scales.items() if id(scale) in held]
        if self._scales and not stepped:
            raise ConfigError(
                f"no optimizer steps the scales ({next(iter(self._scales))}, ...), so no penalty moves them."
            )
        self._scales = {name: self._scales[name] for name in stepped}
        adaptive = next((o for o in trainer.optimizers if not isinstance(o, SGD)), None)
        if self.update == "subgradient" and adaptive is not None and stepped:
            rank_zero_warn(
                f"{type(adaptive).__name__} may divide the penalty's sub-gradient by its own size, so that strength "
                f"{self.strength} does not mean what it does under SGD: use SlimmingRegularizer(update='proximal')."
            )

    def _trace(self, trainer: pl.Trainer) -> None:
        assert self._target is not None
        self._traced = True
        with undisturbed(trainer.strategy.root_device), uncompiled(self._target):
            graph = trace_channels(self._target, self._inputs)
            if self.coupled == "group" and self._scales:
                self._numbers = couple(graph.groups, graph.model, list(self._scales))
            if not self.with_gates:
                return
            groups = gated_groups(graph.groups, graph.model)
            if not groups and not self._scales:
                raise ConfigError(
                    f"no channel of {type(graph.model).__name__} that can leave can be scaled: it has neither a "
                    "BatchNorm nor layers that gates could act on. trace_channels(...).explain() says what stays."
                )
            self.gates = Gates(groups, graph.model)
            if self._saved_gates is not None:
                self.gates.load_state_dict(self._saved_gates)

    # ---------------------------------------------------------------- in rounds

    @property
    def active(self) -> bool:
        """Whether the penalty is on: always without a pruner, else until its last cut."""
        return self._last_round is None or self.round < self._last_round

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Trace with the first batch where nothing before it told what the network takes."""
        self._batches += 1
        if (self.coupled == "group" or self.with_gates) and not self._traced:
            assert self._target is not None
            self.see(trainer, inputs_of(batch, self._target))

    def see(self, trainer: pl.Trainer, inputs: Any) -> None:
        """Trace with these inputs, if nothing before them told what the network takes."""
        if (self.coupled == "group" or self.with_gates) and not self._traced:
            self._inputs = inputs
            self._trace(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the sub-gradient to what this step moves."""
        self._steps += 1
        if self.gates is not None and self.active:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            self.gates.take_gradients(parameters, loss_scale(trainer, optimizer))
        if self.update != "subgradient" or not self.active:
            return
        scales, clusters = self._of(optimizer)
        if clusters is not None and any(scale.grad is None for scale in scales):
            kept = [i for i, scale in enumerate(scales) if scale.grad is not None]
            if not kept:
                return
            parts = clusters.numbers.split([scale.numel() for scale in scales])
            clusters = Clusters(torch.cat([parts[i] for i in kept]))
            scales = [scales[i] for i in kept]
        if scales:
            add_subgradient_(scales, self.strength * loss_scale(trainer, optimizer), clusters)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.active:
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        if self.gates is not None:
            self.gates.step(rates, self.strength)
        scales, clusters = self._of(optimizer)
        if scales and self.update == "proximal":
            soft_threshold_(scales, [self.strength * rates[id(scale)] for scale in scales], clusters)

    def _of(self, optimizer: Optimizer) -> tuple[list[nn.Parameter], Clusters | None]:
        """The scales that an optimizer steps, and which belong together."""
        if id(optimizer) not in self._plans:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            mine = {name: scale for name, scale in self._scales.items() if id(scale) in held}
            clusters = None
            if self._numbers is not None and mine:
                joined = torch.cat([self._numbers[name] for name in mine])
                _, numbers, sizes = torch.unique(joined, return_inverse=True, return_counts=True)
                if int(sizes.max()) > 1:  # the norm of one scale is its absolute value, which is cheaper to take
                    clusters = Clusters(numbers.to(next(iter(mine.values())).device))
            self._plans[id(optimizer)] = (list(mine.values()), clusters)
        return self._plans[id(optimizer)]

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Follow channels that left."""
        self.round = event.round
        self._plans = {}
        if self.gates is not None and event.plan is not None:
            self.gates.follow(event.plan.keep)
        if self._numbers is not None and event.plan is not None:
            name = find_module(pl_module, self.module)
            prefix = f"{name}." if name else ""
            self._numbers = {n: event.slice(prefix + n, numbers) for n, numbers in self._numbers.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how many scales are near zero; see that a step was seen."""
        if self._batches and self._steps == 0 and not pl_module.automatic_optimization and self.update == "subgradient":
            raise ConfigError(
                "an epoch of manual optimisation never reached on_before_optimizer_step, so the penalty never entered: "
                "step the optimizers that self.optimizers() gives, not those of configure_optimizers."
            )
        scales = {name: scale.detach().abs() for name, scale in self._scales.items()}
        near, count = count_near_zero(scales | dict(self._gate_values() or {}))
        pl_module.log("prune/scales_near_zero", near / count)

    def _gate_values(self) -> Mapping[str, Tensor] | None:
        """The gates, also where a resumed fit has not come to its first batch yet."""
        return self._saved_gates if self.gates is None else self.gates.state_dict()

    # ----------------------------------------------------------------- clean up

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks."""
        if stage == "fit":
            self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """How many cuts it has seen, and the gates."""
        gates = self._gate_values()
        return {"round": self.round} | ({} if gates is None else {"gates": dict(gates)})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up where a checkpoint stands."""
        self.round = int(state_dict["round"])
        self._saved_gates = state_dict.get("gates")
