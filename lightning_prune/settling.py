"""When masks settle: how far apart two are, and whether the newest of a few is close to all the others."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning_prune.masks import MaskSet


def mask_distance(one: MaskSet, other: MaskSet) -> float:
    """The part of the kept entries that two masks exchange: their Hamming distance over what both keep.

    ``|A xor B| / (|A| + |B|)``; of masks that keep equally many, the part of one's kept entries that the other does not
    keep. Masks that each remove the same fraction of the same entries at random have that fraction as their expected
    distance.

    Paper: You et al. 2020, arXiv:1909.11957, and its code. Deviation: they divide the Hamming distance by *all*
    entries. Where half is kept the two agree; else theirs is this one times twice the kept fraction.

    Args:
        one: Masks.
        other: Masks of the same tensors. Sharded masks: a collective, and the distance is of the whole.

    Returns:
        In [0, 1]; 0 for two sets that keep nothing.

    Raises:
        MaskMismatchError: Other names or shapes.

    Example:
        >>> import torch
        >>> a = MaskSet({"weight": torch.tensor([True, True, False, False])})
        >>> b = MaskSet({"weight": torch.tensor([True, False, True, False])})
        >>> mask_distance(a, b)
        0.5
    """
    both = one.kept + other.kept
    return (both - 2 * (one & other).kept) / both if both else 0.0


class MaskWindow:
    """The newest few of a sequence of masks, and how far the newest is from the others.

    Args:
        size: How many, at least 2. Each takes one byte an entry.
    """

    def __init__(self, size: int) -> None:
        self._masks: deque[MaskSet] = deque(maxlen=size)

    @property
    def is_full(self) -> bool:
        """Whether there are as many masks as it holds."""
        return len(self._masks) == self._masks.maxlen

    def push(self, masks: MaskSet) -> float | None:
        """Take the newest masks up; the oldest leave once the window is full.

        Returns:
            The largest distance (:func:`mask_distance`) between them and the others; ``None`` for the first.
        """
        self._masks.append(masks)
        return max((mask_distance(masks, earlier) for earlier in list(self._masks)[:-1]), default=None)

    def clear(self) -> None:
        """Forget all."""
        self._masks.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """The masks, one bit an entry."""
        return [masks.state_dict() for masks in self._masks]

    def load_state_dict(self, state: list[Mapping[str, Any]]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            FileFormatError: It holds something else than states of masks.
        """
        self._masks.clear()
        self._masks.extend(MaskSet.from_state_dict(masks) for masks in state)
