"""Carry a plan out on a model, checked, or leave the model bit for bit as it was."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.channels.approximate import Moved, moved, outputs_of
from lightning_prune.channels.equality import TOLERANCE, compare, masked, rounding_error
from lightning_prune.channels.fold import Fold, Folded, apply_, find_folds, own_constants
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.surgery import carry_out, check_fits, check_optimizers, named_tensors, substituted
from lightning_prune.errors import ConfigError, EqualityError
from lightning_prune.wrappers import bare, uncompiled

AMPLIFIED = 100
"""A difference below this many times what changes in the last bits do to outputs shows nothing."""


@dataclass
class CompactReport:
    """What a removal did.

    Attributes:
        costs: ``channels``, ``params``, ``macs``: (before, after).
        error: Largest relative difference between the masked parent and the compact model.
        dtype: Precision of that comparison.
        check_seconds: Time of the equality check.
        surgery_seconds: Time of the removal itself.
        groups: One entry a group: name, size before, size after.
        moved: By how much outputs moved, where normalisations lost channels (``approximate=True``); else None.
        folded: Where constants of leaving channels went, with ``fold=True``; else None.
    """

    costs: dict[str, tuple[int, int]]
    error: float
    dtype: str
    check_seconds: float
    surgery_seconds: float
    groups: list[dict[str, Any]] = field(default_factory=list)
    moved: Moved | None = None
    folded: Folded | None = None

    def kept(self, what: str) -> float:
        """Fraction kept of ``"channels"``, ``"params"`` or ``"macs"``."""
        before, after = self.costs[what]
        return after / before if before else 1.0


def compact(
    model: nn.Module,
    plan: RemovalPlan,
    example_inputs: Any,
    optimizers: Iterable[Optimizer] | Optimizer = (),
    precision: torch.dtype = torch.float64,
    fold: bool = False,
) -> CompactReport:
    """Remove the plan's channels in place, after proving that nothing else changes.

    Before anything is touched, stand-in random weights are put in the place of the model's own and the masked
    parent (leaving channels zero where each consumer reads them) is compared with the compact child; every parameter of
    the plan must influence the outputs there. Then the same ``Parameter`` objects shrink, with their gradients and
    optimizer state.

    Args:
        model: The model that was traced, or a fresh one of the same architecture; the module inside DDP's or
            ``torch.compile``'s wrapper is changed. A DDP wrapper has to be built anew afterwards.
        plan: What leaves.
        example_inputs: As for :func:`trace_channels`.
        optimizers: Optimizers over the model's parameters; their per-element state is sliced along.
        precision: Of the check: ``torch.float64`` (allows 1e-9 of the outputs' scale) or the cheaper ``torch.float32``
            (1e-4).
        fold: A channel whose BatchNorm scale is 0 still emits its shift. False silences it, which is the papers' rule.
            True gives leaving channels a scale of 0 and folds the constant that follows from their shift into what
            reads them: exactly, wherever that is possible; ``report.folded`` says where it was not. The parent of the
            check then has these constants; where a scale was 0 already, the model computes what it did.

    Returns:
        Costs before and after, and the error of the check.

    Raises:
        EqualityError: The outputs differ by more than 1e-9 of their scale (1e-4 in float32, or where the forward code
            insists on that), or the check cannot see a branch. The model is as it was.
        MaskMismatchError: The plan belongs to another model.
        PruneError: Optimizer state that cannot be sliced.
        ConfigError: Another precision.
    """
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    model = bare(model)
    with uncompiled(model):
        check_fits(plan, model)
        check_optimizers(plan, model, optimizers)
        start = time.perf_counter()
        folds = find_folds(model, plan, example_inputs) if fold else None
        constants = own_constants(model, folds, example_inputs) if folds else None
        error, dtype = verify(model, plan, example_inputs, precision, fold=folds)
        checked = time.perf_counter()
        before = _outputs_before(model, plan, example_inputs) if plan.statistics else None
        ready = time.perf_counter()
        carry_out(plan, model, optimizers)
        if constants:
            apply_(model, plan, constants[0])
        done = time.perf_counter()
        report = CompactReport(dict(plan.costs), error, dtype, checked - start, done - ready, list(plan.groups))
        if constants:
            report.folded = constants[1]
        if before is not None:
            report.moved = moved(plan, *before, outputs_of(model, example_inputs))
    remember(model, plan)
    return report


def _outputs_before(model: nn.Module, plan: RemovalPlan, example_inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the model as it is, and of its masked parent with whole statistics."""
    dense = outputs_of(model, example_inputs)
    with substituted(model, masked(plan, named_tensors(model))):
        return dense, outputs_of(model, example_inputs)


_PLANS = "_lightning_prune_plans"


def plans_of(model: nn.Module) -> list[RemovalPlan]:
    """The plans carried out on this model so far, in order."""
    return list(vars(bare(model)).get(_PLANS, ()))


def remember(model: nn.Module, plan: RemovalPlan) -> None:
    """Note on the model that a plan was carried out; a plain attribute that copies along and is no state."""
    vars(bare(model))[_PLANS] = [*plans_of(model), plan]


def verify(
    model: nn.Module,
    plan: RemovalPlan,
    example_inputs: Any,
    precision: torch.dtype = torch.float64,
    seeds: Sequence[int] = range(12),
    fold: Fold | None = None,
) -> tuple[float, str]:
    """Run the equality check, again with other random weights where an output did not depend on a branch.

    A narrow ReLU may be off, and weights may amplify rounding until it hides everything: a dozen draws at most,
    and the outputs must agree under each in which rounding alone does not explain why they do not.

    Returns:
        The error and the precision.

    Raises:
        EqualityError: See :func:`compact`.
    """
    if precision not in TOLERANCE:
        raise ConfigError(f"precision={precision}: the check runs in torch.float64 or torch.float32.")
    blind: set[str] | None = None
    worst = 0.0
    for seed in seeds:
        try:
            found = compare(model, plan, example_inputs, precision=precision, seed=seed, fold=fold)
        except EqualityError as error:
            raise EqualityError(f"{error} {_advice(plan)}") from error
        if not found.error <= TOLERANCE[found.dtype]:
            if found.error <= AMPLIFIED * rounding_error(model, plan, example_inputs, found.dtype, seed):
                continue
            raise EqualityError(
                f"the compact model differs from its masked parent by {found.error:.3g} of the outputs' scale, "
                f"allowed is {TOLERANCE[found.dtype]:.0e} in {found.dtype}. {_advice(plan)}"
            )
        worst = max(worst, found.error)
        blind = set(found.blind) - set(plan.without_effect) if blind is None else blind & set(found.blind)
        if not blind:
            return worst, str(found.dtype).removeprefix("torch.")
    if blind is None:
        raise EqualityError(
            "this network amplifies rounding errors so much that outputs cannot be compared, whatever its weights. "
            f"Trace a part of it. {_advice(plan)}"
        )
    names = sorted(blind)
    raise EqualityError(
        f"no output depends on {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} with these example inputs, "
        "so the check cannot see whether removal there is right. Give inputs that use these layers, or leave them out. "
        f"{_advice(plan)}"
    )


def _advice(plan: RemovalPlan) -> str:
    names = [g["name"] for g in plan.groups if g["kept"] < g["size"]]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    unseen = ""
    if plan.unseen:
        unseen = (
            f" The traced pass did not use {plan.unseen[0]}"
            + (f" and {len(plan.unseen) - 1} more" if len(plan.unseen) > 1 else "")
            + "; where code chooses its path by values, give example inputs that take every path."
        )
    return f"Groups of the plan: {shown}.{unseen} The model is as it was."
