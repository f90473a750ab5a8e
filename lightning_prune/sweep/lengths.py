"""How long a training is, so that all of an arm together takes the steps it may take."""

import math


def rounds_for(budget: float, fraction: float) -> int:
    """The number of cuts of about ``fraction`` of the remaining weights each that leaves ``budget``; at least 1."""
    return max(1, round(math.log(budget) / math.log(1 - fraction)))


def fraction_for(budget: float, rounds: int) -> float:
    """What each of ``rounds`` cuts takes of the remaining weights so that ``budget`` is left: ``1 - budget^(1/R)``."""
    return 1 - budget ** (1 / rounds)


def split_rounds(steps: int, rounds: int, rewind: float) -> tuple[int, int]:
    """The length of one training and its rewinding point, so that all rounds together have ``steps`` steps.

    With rewinding point ``k`` the rounds have ``T + R (T - k)`` steps; ``rewind = 0`` is also the length without any
    rewinding, where every round has ``T``.

    Args:
        steps: Of all rounds together.
        rounds: Cuts, ``R``.
        rewind: ``k / T`` as nearly as whole steps allow, in [0, 1).

    Returns:
        ``T`` and ``k``. The sum differs from ``steps`` by at most ``R / 2`` where ``k > 0``, by at most ``R`` else.
    """
    length = max(1, round(steps / (1 + rounds * (1 - rewind))))
    if rewind == 0:
        return max(1, steps // (rounds + 1)), 0
    point = round((length * (rounds + 1) - steps) / rounds)
    return length, min(max(point, 1), length - 1)


def split_rounds_after(steps: int, rounds: int, point: int) -> int:
    """The length ``T`` where the rewinding point is ``point`` steps: ``T + R (T - k) = steps``."""
    return max(point + 1, round((steps + rounds * point) / (rounds + 1)))


def total_steps(length: int, rounds: int, point: int) -> int:
    """Steps of all rounds together."""
    return length + rounds * (length - point)
