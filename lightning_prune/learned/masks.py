"""Masks of a whole module, learned as trainable scores in the place of its weights; without a Trainer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_prune.errors import ConfigError, MaskMismatchError, SelectionError
from lightning_prune.learned.counts import check_density, count_kept
from lightning_prune.learned.frozen import INITS, frozen_weight, popup_scores
from lightning_prune.learned.layers import put_in, take_out
from lightning_prune.learned.popup import Passing, pass_top
from lightning_prune.learned.stochastic import Levels, check_stochastic_density, sampled_weight, shift_logits_
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name, close_names, matching, prunable_parameters
from lightning_prune.selection import select

METHODS = ("edge_popup", "stochastic")
_TRAINING, _EVALUATION, _INITIAL = 0, 1, 2


@dataclass(frozen=True)
class MaskSettings:
    """How masks are learned.

    Args:
        method: ``"edge_popup"``: the weights of highest ``|score|`` pass (:func:`popup_weight`). ``"stochastic"``: each
            weight passes with the probability ``sigmoid(score)``, drawn anew for every batch (:func:`sampled_weight`).
        density: Fraction of every tensor's weights that is kept, ``round(density * entries)``. Edge-popup keeps so many
            at all times. Stochastic masks keep so many in expectation while they are learned, and exactly so many in
            the result. ``None`` (stochastic only): nothing holds the density; those with a probability above 0.5 are
            kept in the result.
        init: What weights are frozen at: a name of :func:`frozen_weight`.
        scale_fan: Multiply the fan of the Kaiming initialisations by the density.
        rescale: Dynamic weight rescaling: multiply a layer's weights by entries / kept entries. Stochastic only.
        start: First probability of stochastic masks without a ``density``, in (0, 1).
        seed: Seeds initialisations, first scores and every draw.

    Raises:
        ConfigError: A value out of range, or two that do not go together.
    """

    method: str = "edge_popup"
    density: float | None = 0.5
    init: str = "keep"
    scale_fan: bool = False
    rescale: bool = False
    start: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r} is unknown{close_names(str(self.method), METHODS)}")
        if self.init not in INITS:
            raise ConfigError(f"init={self.init!r} is unknown{close_names(str(self.init), INITS)}")
        if self.density is None and self.method == "edge_popup":
            raise ConfigError("edge_popup needs density=, the fraction of each layer's weights that is kept.")
        if self.density is not None:
            (check_density if self.method == "edge_popup" else check_stochastic_density)(self.density)
        if self.rescale and self.method == "edge_popup":
            raise ConfigError(
                "rescale=True is for stochastic masks; edge_popup keeps a fixed part: use scale_fan=True."
            )
        if self.scale_fan and (self.density is None or not self.init.startswith("kaiming")):
            raise ConfigError(
                "scale_fan=True needs density= and an init with a fan ('kaiming_constant' or '..._normal')."
            )
        if isinstance(self.start, bool) or not isinstance(self.start, float) or not 0 < self.start < 1:
            raise ConfigError(f"start={self.start!r}: expected the first probability of a weight to pass, in (0, 1).")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed!r}: expected an integer from 0 to 4294967295.")


class MaskLearner:
    """Freeze a module's weights and put trainable scores in their place, until :meth:`finish`.

    In the module, every masked weight is computed from the frozen one and its scores whenever it is read; so any code
    that uses the layer is served. Parameters, buffers and ``state_dict`` keys keep their names: ``state_dict`` shows
    the weights under their present mask and no scores, so that a checkpoint loads without this library. What is not
    masked is frozen as it is, unless ``train`` names it; BatchNorm loses its scale and shift (1 and 0).

    Args:
        module: Changed in place.
        settings: How masks are learned.
        exclude: Parameters that get no mask, as for :func:`prunable_parameters`.
        include: Parameters that get one beside the default set.
        train: Names or patterns of parameters without a mask that go on being trained.
        affine: Leave BatchNorm its scale and shift, frozen unless ``train`` names them.

    Raises:
        ConfigError: Nothing to mask, a pattern that matches nothing, ``train`` names a masked weight.
        SelectionError: A density that keeps nothing of a tensor.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> learner = MaskLearner(network, MaskSettings(density=0.5))
        >>> optimizer = torch.optim.SGD(learner.scores.values(), lr=0.1)
        >>> network(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> masks = learner.finish()
        >>> masks, int(network[0].weight.count_nonzero())
        (MaskSet(2 tensors, 24 of 48 entries kept), 16)

    Limits:
        Assigning ``module.weight`` or loading a ``state_dict`` meanwhile is refused or has no effect. A module cannot
        be pickled meanwhile.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: MaskSettings,
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        train: Sequence[str] = (),
        affine: bool = False,
    ) -> None:
        self.settings = settings
        self.draw = 0
        """Number of the present draw of stochastic masks: a batch's, in training."""
        self.sample: int | None = None
        """In evaluation, the number of the mask that is drawn; ``None``: the mask of the result."""
        self._module = module
        self._weights = prunable_parameters(module, exclude=exclude, include=include)
        trained = self._trained(train)
        for weight in self._weights.values():
            if settings.density is not None:
                count_kept(settings.density, weight.numel())
        self._were_trained = {id(p): p.requires_grad for p in module.parameters()}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(parameter.requires_grad and canonical_name(name) in trained)
        if not affine:
            _make_plain(module)
        self.scores = {}
        for number, (name, weight) in enumerate(self._weights.items()):
            self._freeze(weight, number)
            self.scores[name] = nn.Parameter(self._first_scores(weight, number))
        self._layers = self._put_in()

    def _trained(self, train: Sequence[str]) -> set[str]:
        if isinstance(train, str):
            raise ConfigError(f"train={train!r}: expected a list of names; write train=[{train!r}].")
        names = [canonical_name(name) for name, _ in self._module.named_parameters(remove_duplicate=False)]
        trained: set[str] = set()
        for pattern in train:
            found = set(matching(pattern, names, "train")) - self._weights.keys()
            if not found:
                raise ConfigError(f"train: {pattern!r} names weights that get a mask; exclude them to train them.")
            trained |= found
        return trained

    def _generator(self, number: int, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed * 1_000_003 + 2 * number + purpose)

    def _freeze(self, weight: nn.Parameter, number: int) -> None:
        settings = self.settings
        if settings.init == "keep":
            return
        density = settings.density if settings.scale_fan else None
        values = frozen_weight(weight, settings.init, density=density, generator=self._generator(number, 0))
        with torch.no_grad():
            weight.copy_(values)

    def _first_scores(self, weight: nn.Parameter, number: int) -> Tensor:
        if self.settings.method == "edge_popup":
            return popup_scores(weight, self._generator(number, 1))
        start = self.settings.start if self.settings.density is None else self.settings.density
        return torch.full_like(weight, math.log(start / (1 - start)), requires_grad=False)

    def _put_in(self) -> list[nn.Module]:
        numbers = {id(weight): number for number, weight in enumerate(self._weights.values())}
        scores = list(self.scores.values())
        computes = [self._compute(number, one.numel()) for number, one in enumerate(scores)]
        layers = []
        for layer in list(self._module.modules()):
            keys = [key for key, p in layer._parameters.items() if p is not None and id(p) in numbers]
            for key in keys:
                number = numbers[id(layer._parameters[key])]
                put_in(layer, key, scores[number], computes[number])
            layers += [layer] if keys else []
        return layers

    def _compute(self, number: int, total: int) -> Any:
        settings, passing = self.settings, Passing()
        kept = total if settings.density is None else count_kept(settings.density, total)

        def popup(frozen: Tensor, scores: Tensor, training: bool) -> Tensor:
            return pass_top(frozen, scores, kept, passing)

        def stochastic(frozen: Tensor, scores: Tensor, training: bool) -> Tensor:
            if not training and self.sample is None:
                mask = self._result(scores)
                return frozen.detach() * mask * (mask.numel() / max(1, int(mask.sum())) if settings.rescale else 1)
            draw, purpose = (self.draw, _TRAINING) if training else (self.sample, _EVALUATION)
            levels = Levels(settings.seed, draw or 0, number, purpose, scores.device)
            return sampled_weight(frozen, scores, levels, rescale=settings.rescale)

        return popup if settings.method == "edge_popup" else stochastic

    def _result(self, scores: Tensor) -> Tensor:
        """The mask of one tensor that its scores stand for."""
        if self.settings.density is None:
            if scores.detach().isnan().any():
                raise SelectionError("the logits of a mask hold NaN: lower the learning rate.")
            return scores.detach() > 0
        values = scores.detach().abs() if self.settings.method == "edge_popup" else scores.detach()
        return select({"": values}, density=self.settings.density)[""]

    @property
    def masks(self) -> MaskSet:
        """The masks that the scores stand for now."""
        return MaskSet({name: self._result(scores) for name, scores in self.scores.items()})

    @property
    def frozen(self) -> Mapping[str, Tensor]:
        """The frozen weights by name."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    @property
    def expected_density(self) -> float:
        """Expected fraction of weights that the next draw keeps; of edge-popup the fraction that is kept."""
        if self.settings.method == "edge_popup":
            return self.masks.density
        total = sum(scores.numel() for scores in self.scores.values())
        return sum(float(torch.sigmoid(scores.detach()).sum()) for scores in self.scores.values()) / total

    def factors(self, masks: MaskSet) -> dict[str, float]:
        """What the kept weights of the result are multiplied with, by name: 1 without rescaling."""
        kept = masks.kept_per_tensor()
        return {n: total / max(1, few) if self.settings.rescale else 1.0 for n, (few, total) in kept.items()}

    def hold_density(self) -> None:
        """After a step: let stochastic masks keep ``density`` of each tensor in expectation."""
        if self.settings.method == "stochastic" and self.settings.density is not None:
            for scores in self.scores.values():
                shift_logits_(scores, self.settings.density)

    def take_over(self, optimizers: Iterable[Optimizer]) -> None:
        """Let optimizers step scores where they stepped the weights, and nothing that is frozen; in place.

        Each score takes its weight's place in its parameter group, with the group's options.

        Raises:
            ConfigError: No optimizer stepped some masked weight, so nothing would move its scores.
        """
        places = {id(weight): self.scores[name] for name, weight in self._weights.items()}
        found: set[int] = set()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                kept = []
                for parameter in group["params"]:
                    scores = places.get(id(parameter))
                    state = optimizer.state.pop(parameter, None) if scores is not None else None
                    if scores is not None and state is not None:
                        optimizer.state[scores] = state
                    if scores is not None or parameter.requires_grad:
                        kept.append(parameter if scores is None else scores)
                        found.add(id(parameter))
                group["params"][:] = kept
        missed = [name for name, weight in self._weights.items() if id(weight) not in found]
        if missed:
            raise ConfigError(
                f"no optimizer steps {missed[0]!r}"
                + (f" and {len(missed) - 1} more" if len(missed) > 1 else "")
                + ", so its mask would not be learned: give it to an optimizer, or exclude it."
            )

    def finish(self) -> MaskSet:
        """Make the module plain again, with the weights under their masks; the masks."""
        masks = self.masks
        self.sample = None
        take_out(self._layers)
        self._layers = []
        for parameter in self._module.parameters():
            parameter.requires_grad_(self._were_trained.get(id(parameter), parameter.requires_grad))
        return masks

    def state_dict(self) -> dict[str, Any]:
        """Frozen weights, scores and the number of the draw; copies, on the CPU."""
        return {
            "frozen": {name: weight.to("cpu", copy=True) for name, weight in self.frozen.items()},
            "scores": {name: scores.detach().to("cpu", copy=True) for name, scores in self.scores.items()},
            "draw": self.draw,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            MaskMismatchError: Of another network, or with other weights excluded.
        """
        ours = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        theirs = {name: tuple(weight.shape) for name, weight in state["frozen"].items()}
        if ours != theirs:
            odd = sorted(set(ours.items()) ^ set(theirs.items()))[0]
            raise MaskMismatchError(
                f"these scores belong to another network: {odd[0]!r} of shape {odd[1]} is on one side only. "
                "Resume with the same network, exclude and include."
            )
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state["frozen"][name])
                self.scores[name].copy_(state["scores"][name])
        self.draw = int(state["draw"])


def _make_plain(module: nn.Module) -> None:
    """BatchNorm without scale and shift: they are there, and 1 and 0."""
    for part in module.modules():
        if isinstance(part, _NormBase) and part.affine and not _trains(part):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def _trains(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters(recurse=False))
