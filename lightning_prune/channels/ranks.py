"""Ranks of many small matrices at once, as ``torch.linalg.matrix_rank`` gives them in float32.

A singular value decomposition of every map costs far more than knowing the rank. Most ranks follow from cheaper
certificates in float64, which separate singular values from the threshold with a wide margin; the decomposition decides
only where one lies near it.

The Gram matrix ``G = A A^T`` of a map has the squared singular values as eigenvalues. ``trace(G)`` and ``||G||_F``
bound the largest, hence the threshold, from both sides. Rows of zeros are put aside. If ``G`` minus a shift well above
the threshold has a Cholesky factorisation, all other rows count; if not, columns are tried, of which fewer may be
nonzero. Where both fail, elimination without pivoting counts the eigenvalues above a shift by the signs of its pivots
(Sylvester's law of inertia): once well above the threshold, once well below, with a bound on its own rounding errors.
Equal counts leave no singular value in between.
"""

import torch
from torch import Tensor

from lightning_prune.errors import MeasurementError

_ABOVE, _BELOW = 1.5, 0.5  # the window around the threshold in which the reference decides, as multiples of it
_TINY = 1e-15  # maps whose largest entry is smaller are left to the reference, whose float32 may underflow
_ENTRIES = 1 << 17  # of the maps that are worked on at once: 1 MB in float64
_WIDEST = 24  # wider maps go from Cholesky's certificate to the reference: elimination costs as much there


def matrix_ranks(maps: Tensor) -> Tensor:
    """The rank of each map: how many singular values exceed ``max(H, W) * eps * (the largest)``, eps of float32.

    Equal to ``torch.linalg.matrix_rank(maps.float())``: certificates decide where no singular value lies between 0.5
    and 1.5 times the threshold, the reference decides elsewhere.

    Args:
        maps: Matrices, of any floating type; taken as float32.

    Shape:
        maps: (B, H, W). Returns (B,) int64, on the maps' device.

    Raises:
        MeasurementError: An entry is infinite or NaN.
    """
    maps = maps.detach().float()
    if maps.shape[1] > maps.shape[2]:
        maps = maps.mT
    ranks = torch.zeros(len(maps), dtype=torch.int64, device=maps.device)
    if maps.numel() == 0:
        return ranks
    flat = maps.reshape(len(maps), -1)
    largest = torch.maximum(flat.amax(1), -flat.amin(1))
    if not bool(torch.isfinite(largest).all()):
        raise MeasurementError("a feature map has entries that are infinite or NaN; its rank has no meaning.")
    alive = (largest >= _TINY).nonzero().flatten()
    whole = len(alive) == len(maps)
    step = max(1, _ENTRIES // flat.shape[1])
    space = maps.new_empty((min(step, len(alive)), *maps.shape[1:]), dtype=torch.float64)
    left = []
    for first in range(0, len(alive), step):
        part = alive[first : first + step]
        ranks[part], failed = _certified(maps[first : first + step] if whole else maps[part], space[: len(part)])
        left.append(part[failed])
    if left and maps.shape[1] <= _WIDEST:
        parts = torch.cat(left).split(step * 2)
        left = [part[~_count(maps[part], ranks, part)] for part in parts]
    tiny = ((largest > 0) & (largest < _TINY)).nonzero().flatten()
    unsure = torch.cat([tiny, *left])
    if len(unsure):
        ranks[unsure] = torch.linalg.matrix_rank(maps[unsure])
    return ranks


def _certified(maps: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of nonzero maps by Cholesky's certificate, and the numbers of those that it leaves open."""
    wide = space.copy_(maps)  # memory that is used again costs a third of what new memory costs
    ranks, left = _full(wide)
    if len(left) == 0 or maps.shape[1] != maps.shape[2]:
        return ranks, left
    narrow = ((maps[left] != 0).any(1).sum(1) < ranks[left]).nonzero().flatten()
    if len(narrow) == 0:
        return ranks, left
    ranks[left[narrow]], failed = _full(wide[left[narrow]].mT)
    still = torch.ones(len(left), dtype=torch.bool, device=maps.device)
    still[narrow] = False
    still[narrow[failed]] = True
    return ranks, left[still]


def _full(wide: Tensor) -> tuple[Tensor, Tensor]:
    """How many rows are not zero, and the numbers of the maps where it is not certain that this is the rank."""
    gram = wide @ wide.mT
    norm = torch.linalg.vector_norm(gram, dim=(1, 2))  # at least the largest eigenvalue
    diagonal = gram.diagonal(dim1=1, dim2=2)
    rows = diagonal > 0
    shift = _ABOVE**2 * _threshold(wide) * norm[:, None]
    diagonal.copy_(torch.where(rows, diagonal - shift, norm[:, None]))
    return rows.sum(1), torch.linalg.cholesky_ex(gram)[1].nonzero().flatten()


def _threshold(maps: Tensor) -> float:
    """Square of the threshold, relative to the square of the largest singular value."""
    return float((max(maps.shape[1:]) * torch.finfo(torch.float32).eps) ** 2)


def _count(maps: Tensor, ranks: Tensor, places: Tensor) -> Tensor:
    """Write ranks by the signs of pivots into their places; which are certain.

    Errors: the factors are those of a matrix that differs by at most ``gamma |L||D||L^T|``, of which the trace is
    summed up on the way; the rounding of the Gram matrix comes on top.
    """
    wide = maps.double()
    gram = wide @ wide.mT
    norm, trace = torch.linalg.vector_norm(gram, dim=(1, 2)), gram.diagonal(dim1=1, dim2=2).sum(1)
    size = gram.shape[1]
    # the largest eigenvalue lies between norm**2 / trace and norm
    shifts = torch.cat([_ABOVE**2 * norm, _BELOW**2 * norm.square() / trace]) * _threshold(maps)
    pivots = gram.permute(1, 2, 0).repeat(1, 1, 2)  # maps last: each step runs along memory
    pivots.diagonal().sub_(shifts[:, None])
    positive = torch.zeros(len(shifts), dtype=torch.int64, device=maps.device)
    growth = trace.repeat(2)
    for k in range(size):
        pivot, row = pivots[k, k], pivots[k, k + 1 :]
        factor = row / pivot
        positive += pivot > 0
        growth += pivot.abs() + (row * factor).abs_().sum(0)
        pivots[k + 1 :, k + 1 :].addcmul_(factor[:, None], row[None], value=-1)
    error = 2 * (size + 2) * torch.finfo(torch.float64).eps * growth
    above, all_above = positive.chunk(2)
    ranks[places] = above
    return (above == all_above) & (torch.maximum(*error.chunk(2)) < shifts.chunk(2)[1])
