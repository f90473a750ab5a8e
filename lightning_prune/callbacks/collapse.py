"""Tell when a cut leaves a layer nothing: a network that was broken without a word is found by its accuracy only."""

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_prune.errors import CollapseWarning
from lightning_prune.masks import MaskSet

_SHOWN = 5


def tell_collapse(before: MaskSet, after: MaskSet, cut: int) -> None:
    """Warn of tensors that lose their last weights, layer-collapse of Tanaka et al. 2020 (arXiv:2006.05467).

    Args:
        before: The masks until now.
        after: Those that a cut has chosen, of the same network.
        cut: Its number, for the message.
    """
    had = before.kept_per_tensor()
    empty = [name for name, (kept, _) in after.kept_per_tensor().items() if had[name][0] > 0 == kept]
    if not empty:
        return
    more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
    rank_zero_warn(
        f"cut {cut} removes the last weights of {', '.join(empty[:_SHOWN])}{more}: nothing of the input passes there "
        "any more. Where that is not meant, exclude it (exclude=), give it a rate of its own (rates=), or let each "
        "tensor lose its own share (scope='layer').",
        category=CollapseWarning,
    )
