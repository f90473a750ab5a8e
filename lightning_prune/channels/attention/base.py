"""What every replacement of an attention module offers: an inner width of its own, and sizes that stay true."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Size = Callable[[Tensor, int], int]


class FreeWidth:
    """Mixed into a subclass of an attention module whose forward code takes its inner width from its input.

    A module is replaced by assigning ``__class__``, so it stays the same object with the same parameters, hooks and
    ``state_dict`` keys; assigning the original class takes the replacement back. The forward code of the subclass takes
    the number of heads from an attribute that surgery keeps true and every width from the weights.

    Attributes:
        weights: Parameters whose shapes the original's code would misread once heads have left, by dotted name.
        can_thin: Whether its heads may lose places, all the same ones.
        score_scale: What scores are multiplied by; None is the usual root of the width. It is set, to what it was, when
            heads lose places: removal does not rescale.
    """

    weights: tuple[str, ...] = ()
    can_thin = True
    score_scale: float | None = None

    def true_sizes(self, size: Size, thinned: bool) -> dict[str, Any]:
        """New values of size attributes.

        Args:
            size: Length of a parameter's axis after the removal.
            thinned: Whether places of every head leave, instead of whole heads.
        """
        raise NotImplementedError
