"""Iterative magnitude pruning: all rounds of a lottery-ticket experiment in one fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.collapse import tell_collapse
from lightning_prune.callbacks.company import (
    compare_masks,
    gradients_may_change,
    require_known_parts,
    rewinding_point,
)
from lightning_prune.callbacks.enforce import MaskEnforcer
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.origins import CriterionScores, Origins
from lightning_prune.callbacks.pruner import RoundPruner
from lightning_prune.callbacks.rounds import RoundSchedule
from lightning_prune.checkpoint import load_ticket
from lightning_prune.counting import RULES
from lightning_prune.errors import ConfigError, MaskMismatchError, ResumeError
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import close_names, matching, prunable_parameters, untouched_parameters
from lightning_prune.scores import CRITERIA, MagnitudeScores, score_quantiles, score_weights
from lightning_prune.selection import select
from lightning_prune.sharding import any_sharded, part_like, reshard, spread_like

CONTROLS = (None, "random_pruning")


class IterativeMagnitudePruner(RoundPruner):
    """Train, remove the smallest weights (or those of lowest score), train on: ``rounds`` times in one ``fit``.

    The Trainer's ``max_epochs``/``max_steps`` is the length ``T`` of *one* training; build schedules for that. The
    limit is raised to hold all rounds: ``T + rounds * (T - k)`` with the rewinding point ``k`` read from
    :class:`WeightRewind` and :class:`LRRewind` beside it, ``T + rounds * T`` without them. A cut happens at the start
    of the next round's first epoch, so validation, checkpoints and the record see the trained network before it.
    Each cut removes ``round(fraction * remaining)`` weights (half to even), exactly, those of smallest final magnitude
    (or lowest score by another ``criterion``); of equal ones the later in the network leaves first.

    Acts in: ``on_train_epoch_start`` (cut), ``on_after_backward`` (gradients of pruned entries are zeroed, so they
    weigh in no norm and no moment), after a step only where an optimizer could move a zero. Changes in place:
    weights, gradients, optimizer state. ``state_dict`` keys never change. ModelCheckpoint keeps its best per round and
    carries the round in its file names; EarlyStopping ends the round, not the fit.

    Paper: Frankle & Carbin 2019, arXiv:1803.03635, and, by the rewinders beside it, Frankle et al. 2019,
    arXiv:1903.01611 and Renda et al. 2020, arXiv:2003.02389. Deviations: counts are exact (the references remove one
    more, and all ties); pruned weights are held at zero by their gradients instead of being multiplied in the forward
    pass. ``counting`` brings the references' rules back.

    Args:
        fraction: Of the weights that remain, the part that each cut removes; in (0, 1). Default 0.2 (paper).
        rounds: Number of cuts, at least 1; the fit holds ``rounds + 1`` trainings.
        criterion: What weights are kept by: ``"large_final"`` (magnitude), or another name of :func:`score_weights`
            (Zhou et al. 2019, arXiv:1905.01067). Initial weights are those at the start of the fit, also with a later
            rewinding point; ``snip`` and ``grad`` take the gradient of the first optimizer step. The two criteria with
            quantiles compare weights of different tensors by their rank within each.
        scope: ``"global"``: all weights compete; ``"layer"``: each tensor loses ``fraction`` of its own.
        exclude: Parameters (names, names of modules, or patterns such as ``"*.fc.weight"``) that are never pruned.
            Biases, normalisation and embeddings never are.
        include: Parameters to prune beside the default set, in the same form.
        rates: Tensors with a fraction of their own, by name or pattern, such as ``{"fc3.weight": 0.1}``: the paper
            prunes its output layer at half the rate.
        counting: ``"exact"``, or a reference's own rule by name; see :func:`select`.
        round_length: Length of one training (``"10ep"``, ``"5000st"``) where it should differ from the Trainer's.
        control: ``"random_pruning"``: each tensor loses as many weights as it would by magnitude, at random places.
        masks_from: Folder of an earlier run's tickets: its masks are used, round by round, instead of selected ones
            (with ``WeightRewind(reinit=True)`` the random re-initialisation control of the papers). Or one ticket, such
            as :class:`LearnedSupermask` writes, for a single cut.
        monitor: Validation metric shown and recorded per round, and by which a round's best step is chosen. Default:
            what a ModelCheckpoint or EarlyStopping of the trainer watches.
        mode: ``"max"`` or ``"min"``, for ``monitor``. Default: as the callback watching it has it, else ``"max"``.
        dirpath: Folder of ``record.json`` and ``rounds.csv``. Default: the run folder; without a logger none.
        seed: Seeds the random control.
        verbose: Print one line after each round.

    Sharded parameters (``ModelParallelStrategy``: FSDP2, tensor parallelism, or both) are pruned where they lie, with
    the masks that one process would choose: only counts travel at a cut (:func:`select`). Each process masks its own
    part; the bits, one a weight, go to process 0 for the digest, the checkpoint and the ticket.

    State saved: masks (1 bit a weight), position, record, generators and data position; initial weights or first
    gradients where the criterion needs them.

    Raises:
        ConfigError: An argument out of range; in ``setup``: callbacks that cannot work together; in ``on_fit_start``:
            nothing to prune, a pattern that matches nothing, a rewinding point or a schedule that does not fit.
        SelectionError: Weights that are NaN at a cut.
        CollapseWarning: A cut removes the last weights of a tensor.
        ResumeError: A checkpoint of another configuration, one that was written without this callback, or without what
            the criterion needs.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import IterativeMagnitudePruner, LRRewind, WeightRewind
        >>> callbacks = [IterativeMagnitudePruner(fraction=0.2, rounds=10), WeightRewind("3%"), LRRewind("3%")]
        >>> trainer = Trainer(max_epochs=30, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        fraction: float = 0.2,
        rounds: int = 10,
        scope: str = "global",
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        rates: Mapping[str, float] | None = None,
        counting: str = "exact",
        round_length: str | None = None,
        control: str | None = None,
        masks_from: str | Path | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
        verbose: bool = True,
        criterion: str = "large_final",
    ) -> None:
        _check_fraction("fraction", fraction)
        for pattern, rate in (rates or {}).items():
            _check_fraction(f"rates[{pattern!r}]", rate, zero=True)
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ConfigError(f"rounds={rounds!r}: expected the number of cuts, an integer of at least 1.")
        if scope not in ("global", "layer"):
            raise ConfigError(f"scope={scope!r} is unknown; choose 'global' or 'layer'.")
        if counting != "exact" and counting not in RULES:
            raise ConfigError(f"counting={counting!r} is unknown{close_names(str(counting), ['exact', *RULES])}")
        if criterion not in CRITERIA:
            raise ConfigError(f"criterion={criterion!r} is unknown{close_names(str(criterion), CRITERIA)}")
        if masks_from is not None and criterion != "large_final":
            raise ConfigError(f"criterion={criterion!r} selects masks, masks_from takes an earlier run's: give one.")
        if masks_from is not None and Path(masks_from).is_file() and rounds != 1:
            raise ConfigError(f"masks_from={str(masks_from)!r} is one ticket, for one cut, and rounds={rounds}.")
        if control not in CONTROLS:
            raise ConfigError(f"control={control!r} is unknown; choose None or 'random_pruning'.")
        for name, value in (("exclude", exclude), ("include", include)):
            if isinstance(value, str):
                raise ConfigError(f"{name}={value!r}: expected a list of names; write {name}=[{value!r}].")
        super().__init__(rounds, round_length, monitor, mode, dirpath, verbose)
        self.fraction, self.scope = fraction, scope
        self.exclude, self.include = tuple(exclude), tuple(include)
        self.rates = dict(rates or {})
        self.counting, self.criterion = counting, criterion
        self.control = control
        self.masks_from = None if masks_from is None else Path(masks_from)
        self.seed = seed
        self.masks: MaskSet | None = None
        """The masks in force: all kept in round 0; ``None`` before a fit."""
        self._enforcer = MaskEnforcer()
        self._origins = Origins((criterion,), type(self).__name__)
        self._parameters: dict[str, nn.Parameter] = {}
        self._frozen: list[dict[str, Any]] = []

    def make_schedule(self, trainer: pl.Trainer) -> RoundSchedule:
        """Every round is a training of full length, from the rewinding point on."""
        require_known_parts(trainer, "among which no global selection can be made")
        self.masks = None
        self._origins = Origins((self.criterion,), type(self).__name__)
        return RoundSchedule(self.rounds, self.round_length, rewinding_point(trainer))

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what to prune; masks keep everything at first."""
        reshard(pl_module)
        self._parameters = prunable_parameters(pl_module, exclude=self.exclude, include=self.include)
        self._frozen = untouched_parameters(pl_module, self._parameters, self.exclude)
        for pattern in self.rates:
            matching(pattern, self._parameters, "rates")
        if self.criterion != "large_final" and any_sharded(self._parameters.values()):
            raise ConfigError(
                f"criterion={self.criterion!r} compares whole tensors, and parameters are sharded between processes. "
                "Use criterion='large_final', or strategy='ddp'."
            )
        self._enforcer.attach(
            self._parameters,
            trainer.optimizers,
            every_step=gradients_may_change(trainer, pl_module),
            manual=not pl_module.automatic_optimization,
        )
        if self._loaded is None:
            self.masks = MaskSet.dense_like(self._parameters)
        else:
            self._check_masks_fit()

    def _check_masks_fit(self) -> None:
        assert self.masks is not None
        ours = {name: tuple(p.shape) for name, p in self._parameters.items()}
        theirs = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        if ours != theirs:
            odd = sorted(set(ours.items()) ^ set(theirs.items()))[0]
            raise ResumeError(
                f"the checkpoint's masks do not fit this network: {odd[0]!r} of shape {odd[1]} is on one side only. "
                "Resume with the same network, exclude and include."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume, put masks back."""
        super().on_train_start(trainer, pl_module)
        self._origins.keep(self._parameters, trainer.global_step)
        if self._loaded is not None:
            assert self.masks is not None
            self._check_masks_fit()  # a strategy may load a checkpoint only after begin()
            reshard(pl_module)
            self.masks = self.masks.placed_like(self._parameters)
            self._enforcer.set_masks(self.masks, resumed=True)

    def candidate(self, pl_module: pl.LightningModule) -> MaskSet:
        """The masks that a cut would choose if it came now. Nothing changes; sharded parameters: a collective."""
        assert self.masks is not None
        reshard(pl_module)  # what is written to shards from here on must be seen by the next forward pass
        return self._choose(self.masks, self._running.round + 1)

    def decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> MaskSet:
        """Select what stays."""
        masks = self.candidate(pl_module)
        compare_masks(masks)
        masks.digest()  # a collective where masks are sharded; from now on every process knows it, and the counts
        assert self.masks is not None
        tell_collapse(self.masks, masks, self._running.round + 1)
        return masks

    def quantiles(self) -> dict[str, tuple[float, ...]]:
        """Of the magnitudes of what is left; none where masks are another run's, or sharded."""
        if self.masks_from is not None or self.masks is None or self.masks.is_sharded:
            return {}
        scores = MagnitudeScores(self._parameters)
        return {name: score_quantiles(scores[name], mask) for name, mask in self.masks.items()}

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: MaskSet) -> PruneEvent:
        """Let the new masks hold."""
        assert self.masks is not None
        removed, self.masks = self.masks.kept - decision.kept, decision
        return PruneEvent(self._running.round, trainer.global_step, decision, removed, self._running.rewound)

    def after_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Apply the masks to weights, gradients and optimizer state."""
        assert event.masks is not None
        self._enforcer.set_masks(event.masks)

    def frozen(self) -> list[dict[str, Any]]:
        """Parameters that no mask covers."""
        return self._frozen

    def counts(self) -> dict[str, Any]:
        """Weights kept."""
        masks = self.masks
        assert masks is not None
        return {
            "kept": masks.kept,
            "total": masks.total,
            "digest": masks.digest(),
            "per_layer": masks.kept_per_tensor(),
        }

    def _choose(self, before: MaskSet, round: int) -> MaskSet:  # noqa: A002
        if self.masks_from is not None:
            return self._masks_of_ticket(before, round)
        by_density = self.counting != "exact" and RULES[self.counting].takes == "density"
        masks = select(
            self._scores(before, round),
            density=(1 - self.fraction) ** round if by_density else None,
            fraction=None if by_density else self.fraction,
            scope=self.scope,
            within=before,
            rates=self.rates or None,
            counting=self.counting,
        )
        if self.control == "random_pruning":
            kept, now = before.kept_per_tensor(), masks.kept_per_tensor()
            remove = {name: kept[name][0] - now[name][0] for name in masks}
            scores = self._random_scores(round)
            on_cpu = before if any_sharded(scores.values()) else before.to("cpu")
            masks = select(scores, remove=remove, scope="layer", within=on_cpu).placed_like(self._parameters)
        return masks

    def _random_scores(self, round: int) -> dict[str, Tensor]:  # noqa: A002
        """The same on any number of processes: each draws the whole of one tensor at a time, and keeps its part."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + round)
        scores = {}
        for name, parameter in self._parameters.items():
            whole = score_weights("random", None, torch.empty(parameter.shape), generator=generator)
            scores[name] = spread_like(part_like(whole, parameter).clone(), parameter)
        return scores

    def _scores(self, before: MaskSet, round: int) -> Mapping[str, Tensor]:  # noqa: A002
        if self.criterion == "large_final":
            return MagnitudeScores(self._parameters)
        seed = self.seed * 1000 + round
        return CriterionScores(self.criterion, self._parameters, self._origins, before, seed)

    def _masks_of_ticket(self, before: MaskSet, round: int) -> MaskSet:  # noqa: A002
        assert self.masks_from is not None
        path = self.masks_from
        if not path.is_file():
            path = self.masks_from / f"round-{round:02d}.safetensors"
        if not path.exists() and (self.masks_from / "tickets").is_dir():
            path = self.masks_from / "tickets" / path.name
        masks = load_ticket(path).masks
        if {n: m.shape for n, m in masks.items()} != {n: m.shape for n, m in before.items()}:
            raise MaskMismatchError(
                f"{path} holds masks of another network: {', '.join(sorted(masks))}; "
                f"expected {', '.join(sorted(before))}."
            )
        return masks.placed_like(before)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Zero the gradients of pruned entries."""
        self._enforcer.mask_gradients()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep the first step's gradients, where the criterion needs them."""
        self._origins.take_gradients(pl_module, trainer.global_step)

    def release(self, trainer: pl.Trainer) -> None:
        """Take the hooks off the optimizers too."""
        self._enforcer.detach()
        super().release(trainer)

    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave."""
        return {
            "fraction": self.fraction,
            "scope": self.scope,
            "exclude": list(self.exclude),
            "include": list(self.include),
            "rates": dict(self.rates),
            "counting": self.counting,
            "criterion": self.criterion,
            "round_length": None if self.round_length is None else str(self.round_length),
            "control": self.control,
            "masks_from": None if self.masks_from is None else str(self.masks_from),
            "seed": self.seed,
        }

    def own_state(self) -> dict[str, Any]:
        """The masks, 1 bit a weight, and what the criterion needs."""
        return {"masks": None if self.masks is None else self.masks.state_dict(), "origins": self._origins.state_dict()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take up the masks."""
        self.masks = MaskSet.from_state_dict(state["masks"])
        self._origins.load_state_dict(state.get("origins", {}))


def _check_fraction(name: str, value: Any, zero: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (0 <= value < 1) or (value == 0 and not zero):
        low = "[0, 1)" if zero else "(0, 1)"
        raise ConfigError(
            f"{name}={value!r}: expected the fraction of the remaining weights that a cut removes, in {low}."
        )
