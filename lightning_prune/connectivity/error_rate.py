"""The error that the paper measures: the fraction of examples whose highest output is not their label."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_prune.channels.recording import call_model, map_tensors
from lightning_prune.errors import ConfigError
from lightning_prune.prunable import canonical_name

Batches = Iterable[Any]


class ErrorRate:
    """Top-1 error, in [0, 1], of a classifier on one or several splits of data.

    Paper: Frankle et al. 2020, arXiv:1912.05671, section 2: the error of classification, not the loss.

    Args:
        splits: ``{name: batches}``, or batches alone, which are then the split ``"error"``. A batch is ``(inputs,
            labels)``; inputs that are a tuple hold positional arguments, a dict keyword arguments. Batches must be
            iterable again and again (a list, a DataLoader).
        keep_bytes: Batches of a split are held in memory after their first reading if they take no more than this;
            every point of a line then sees the same augmentation. 0: read anew each time.
        points_per_pass: So many points of a line are evaluated while the data is read once; their states are held in
            memory together. Pays where reading costs more than evaluating.
        vectorize: Evaluate the points of a pass as one batched computation (``torch.func.vmap``). Pays for small
            networks on a GPU and, slightly, for linear layers; convolutions on a CPU are slower so.

    Raises:
        ConfigError: No split, no batch, a count below 1, or an iterator.

    Example:
        >>> rate = ErrorRate([(torch.eye(3), torch.tensor([0, 1, 1]))])
        >>> round(rate(nn.Identity())["error"], 4)
        0.3333
    """

    def __init__(
        self,
        splits: Mapping[str, Batches] | Batches,
        keep_bytes: int = 2**30,
        points_per_pass: int = 1,
        vectorize: bool = False,
    ) -> None:
        self.splits: dict[str, Batches] = dict(splits) if isinstance(splits, Mapping) else {"error": splits}
        if not self.splits:
            raise ConfigError("splits is empty: give at least one set of batches to measure errors on.")
        for name, batches in self.splits.items():
            if iter(batches) is batches:
                raise ConfigError(f"split {name!r} is an iterator, which ends after one point; give a list or loader.")
        if points_per_pass < 1:
            raise ConfigError(f"points_per_pass={points_per_pass}: expected a number of points, at least 1.")
        self.keep_bytes, self.points_per_pass, self.vectorize = keep_bytes, points_per_pass, vectorize
        self._held: dict[str, list[Any]] = {}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The error of the model as it stands, by split."""
        return self._measure(model, lambda inputs: [call_model(model, inputs)], 1)[0]

    def of_states(self, model: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
        """The errors under several states, reading the data once.

        Args:
            model: The network; its own tensors are not touched.
            states: Parameters and buffers by canonical name.
        """
        names = {canonical_name(name): name for name in model.state_dict(keep_vars=True)}
        own = [{names[name]: value for name, value in state.items()} for state in states]
        if not self.vectorize:
            return self._measure(model, lambda x: [_call(model, s, x) for s in own], len(own))
        stacked = {name: torch.stack([state[name] for state in own]) for name in own[0]}
        together = vmap(lambda state, x: _call(model, state, x), in_dims=(0, None))
        return self._measure(model, lambda x: list(together(stacked, x)), len(own))

    @torch.no_grad()
    def _measure(
        self, model: nn.Module, outputs_of: Callable[[Any], list[Tensor]], count: int
    ) -> list[dict[str, float]]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        found: list[dict[str, float]] = [{} for _ in range(count)]
        for name in self.splits:
            wrong, total = torch.zeros(count, dtype=torch.int64, device=device), 0
            for inputs, labels in self._batches(name, device):
                for index, output in enumerate(outputs_of(inputs)):
                    wrong[index] += (output.argmax(1) != labels).sum()
                total += labels.numel()
            if not total:
                raise ConfigError(f"split {name!r} has no examples to measure the error on.")
            for index, number in enumerate(wrong.tolist()):
                found[index][name] = number / total
        return found

    def _batches(self, name: str, device: torch.device) -> Iterable[tuple[Any, Tensor]]:
        if name in self._held:
            yield from self._held[name]
            return
        kept: list[Any] | None = []
        size = 0
        for batch in self.splits[name]:
            inputs, labels = map_tensors(lambda tensor: tensor.to(device), (batch[0], batch[1]))
            size += _bytes(inputs) + _bytes(labels)
            if size > self.keep_bytes:
                kept = None
            if kept is not None:
                kept.append((inputs, labels))
            yield inputs, labels
        if kept is not None:
            self._held[name] = kept


def _call(model: nn.Module, state: dict[str, Tensor], inputs: Any) -> Tensor:
    if isinstance(inputs, dict):
        return functional_call(model, state, (), inputs)
    return functional_call(model, state, inputs if isinstance(inputs, tuple) else (inputs,))


def _bytes(item: Any) -> int:
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.numel() * tensor.element_size()), item)
    return sum(sizes)
