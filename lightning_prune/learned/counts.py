"""How many entries a density keeps: one meaning for every kind of learned mask."""

from fractions import Fraction
from typing import Any

from lightning_prune.errors import ConfigError, SelectionError


def check_density(density: Any) -> Fraction:
    """``density`` as an exact number, read as it was written: 0.1 is one tenth.

    Raises:
        ConfigError: It is no number in (0, 1].
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ConfigError(
            f"density={density!r}: expected the fraction of each layer's weights that is kept, in (0, 1]."
        )
    return Fraction(str(density))


def count_kept(density: float, total: int) -> int:
    """``round(density * total)``, half to even: what :func:`lightning_prune.select` keeps of a tensor.

    Args:
        density: In (0, 1].
        total: Entries of the tensor.

    Raises:
        ConfigError: ``density`` out of range.
        SelectionError: Nothing would be kept.

    Example:
        >>> count_kept(0.25, 10), count_kept(0.35, 10)
        (2, 4)
    """
    kept = round(check_density(density) * total)
    if kept == 0:
        raise SelectionError(
            f"density={density} of {total} weights keeps none of them, so nothing passes that layer. Choose a higher "
            "density, or exclude it."
        )
    return kept
