"""Budgets of several passes, each a fraction of the original network."""

from collections.abc import Sequence
from itertools import pairwise

from lightning_prune.channels.budget import Budget
from lightning_prune.errors import ConfigError


def budgets_of_passes(budget: Budget | Sequence[Budget], passes: int) -> list[Budget]:
    """What each of several passes keeps of the original network.

    Args:
        budget: The last pass's budget, to which the passes go down geometrically (pass ``i`` of ``n`` keeps
            ``budget ** (i / n)``); or one budget a pass, none larger than the one before.
        passes: How many.

    Raises:
        ConfigError: Neither a budget nor a list of them, or a list that does not fit.
    """
    if isinstance(budget, Budget):
        steps = [budget.fraction ** (i / passes) for i in range(1, passes)]
        return [*(Budget(**{budget.what: fraction}) for fraction in steps), budget]
    budgets = list(budget) if isinstance(budget, Sequence) else [budget]
    if not all(isinstance(one, Budget) for one in budgets):
        raise ConfigError(f"budget={budget!r}: expected a Budget, such as Budget(macs=0.5), or a list of them.")
    if len(budgets) != passes:
        raise ConfigError(f"{len(budgets)} budgets for {passes} cuts: give one budget, or one for each time in at.")
    for first, second in pairwise(budgets):
        if first.what != second.what or second.fraction > first.fraction:
            raise ConfigError(
                f"{second} after {first}: each pass keeps a fraction of the original network, so budgets of one kind "
                "go down from pass to pass."
            )
    return budgets


def rest_of(budget: Budget, cost: tuple[int, int]) -> Budget:
    """A budget that is a fraction of the original, as a fraction of what is left of it.

    Args:
        budget: Of the original.
        cost: (now, of the original), in what the budget limits.
    """
    now, original = cost
    # A hair more, so that rounding cannot turn a limit that is a whole number into the number below it.
    fraction = budget.fraction * original / max(now, 1) * (1 + 1e-12)
    return Budget(**{budget.what: min(1.0, fraction)})
