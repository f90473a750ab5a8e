"""Scores under canonical names, as a selection reads them: one tensor after the other, of a sharded one its part."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_prune.errors import SelectionError
from lightning_prune.prunable import canonical_name
from lightning_prune.scores import MagnitudeScores
from lightning_prune.sharding import local


class NamedScores(Mapping[str, Tensor]):
    """Scores under canonical names; nothing is read before it is asked for."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        if not isinstance(scores, Mapping) or not scores:
            raise SelectionError(f"scores must be a mapping from names to tensors, with at least one; got {scores!r}.")
        self._scores = scores
        self._original: dict[str, str] = {}
        for name in scores:
            if not isinstance(name, str) or canonical_name(name) in self._original:
                raise SelectionError(
                    f"scores are named by strings, each parameter once; got {name!r} twice or no string."
                )
            self._original[canonical_name(name)] = name

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[self._original[name]]

    def like(self, name: str) -> Any:
        """A tensor of the shape, type and layout of these scores."""
        scores = self._scores
        return scores.like(self._original[name]) if isinstance(scores, MagnitudeScores) else self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)

    def parts(self) -> Mapping[str, Tensor]:
        """This process's parts of all of them, each read when asked for."""
        return self._scores.parts() if isinstance(self._scores, MagnitudeScores) else _Parts(self)


class _Parts(Mapping[str, Tensor]):
    """This process's parts of scores, read when asked for."""

    def __init__(self, scores: NamedScores) -> None:
        self._scores = scores

    def __getitem__(self, name: str) -> Tensor:
        return local(self._scores[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)
