"""Masks of a fixed pattern: of every ``m`` neighbours the ``n`` of highest score stay."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, SelectionError


def parse_pattern(granularity: str) -> tuple[int, int] | None:
    """``"2:4"`` as (2, 4); None for ``"element"``.

    Raises:
        ConfigError: Anything else, or a pattern that keeps all or nothing.
    """
    if granularity == "element":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", str(granularity))
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ConfigError(
            f"granularity={granularity!r} is unknown; choose 'element', or how many of how many neighbours stay, such "
            "as '2:4'."
        )
    return int(found[1]), int(found[2])


def keep_pattern(scores: Mapping[str, Tensor], earlier: Mapping[str, Tensor], n: int, m: int) -> dict[str, Tensor]:
    """Keep the ``n`` highest scores of every ``m`` neighbours along axis 1 (inputs of a layer), in every tensor.

    Of equal scores the later position leaves first. Entries that ``earlier`` pruned stay pruned.

    Raises:
        SelectionError: A tensor without such an axis, one whose length is no multiple of ``m``, or NaN among scores.
    """
    masks = {}
    for name in scores:
        score = scores[name].detach()
        if score.dim() < 2 or score.shape[1] % m:
            raise SelectionError(
                f"{n}:{m} needs tensors whose axis 1 (the inputs of a layer) is a multiple of {m}; {name!r} has shape "
                f"{tuple(score.shape)}. Leave it out of the scores."
            )
        if score.is_floating_point() and bool(score.isnan().any()):
            raise SelectionError(f"the scores of {name!r} hold NaN.")
        blocks = score.movedim(1, -1).unflatten(-1, (-1, m))
        before = earlier.get(name)
        if before is None:
            order = blocks.argsort(dim=-1, descending=True, stable=True)
        else:  # what is kept comes first, then by score
            old = before.to(score.device).movedim(1, -1).unflatten(-1, (-1, m))
            order = blocks.argsort(dim=-1, descending=True, stable=True)
            pruned = (~old).gather(-1, order).to(torch.uint8)
            order = order.gather(-1, pruned.argsort(dim=-1, stable=True))
        mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[..., :n], True)
        mask = mask.flatten(-2).movedim(-1, 1).contiguous()
        masks[name] = mask if before is None else mask & before.to(score.device)
    return masks
