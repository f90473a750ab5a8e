"""What criteria compare trained weights with: the weights at the start of the fit, and the first step's gradients."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name
from lightning_prune.scores import CRITERIA, score_weights


class Origins:
    """Copies of a network's first weights and gradients, on the CPU, as far as some criteria need them.

    Args:
        criteria: Names in :data:`CRITERIA`.
        whole: Keep the first weights whatever the criteria.
        owner: Name of the callback, for messages.
    """

    def __init__(self, criteria: tuple[str, ...], owner: str, whole: bool = False) -> None:
        needs = {need for criterion in criteria for need in CRITERIA[criterion]}
        self._weights_needed, self._grads_needed = whole or "initial" in needs, "grad" in needs
        self._owner = owner
        self.initial: dict[str, Tensor] | None = None
        """By the names that were given; ``None`` before the start and where nobody needs them."""
        self.grads: dict[str, Tensor] = {}
        """By canonical name."""

    def keep(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """At the start of training, copy the weights; once resumed, see that they are there.

        Args:
            tensors: Parameters (and buffers) by name.
            step: ``trainer.global_step``.

        Raises:
            ResumeError: Training is under way, and what the criteria need is not known.
        """
        if step > 0 and self._weights_needed and self.initial is None:
            raise ResumeError(
                f"the checkpoint was written without this {self._owner}, so the network's initial weights are not in "
                "it. Resume with the same criteria and actions, or start a new run."
            )
        if step > 0 and self._grads_needed and not self.grads:
            raise ResumeError(
                f"the checkpoint was written without this {self._owner}, so the first step's gradients are not in it. "
                "Resume with the same criteria, or start a new run."
            )
        if self._weights_needed and self.initial is None:
            self.initial = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    def take_gradients(self, module: nn.Module, step: int) -> None:
        """Before an optimizer step: copy the first step's gradients."""
        if step == 0 and self._grads_needed:
            self.grads |= {
                canonical_name(name): parameter.grad.detach().to("cpu", copy=True)
                for name, parameter in module.named_parameters()
                if parameter.grad is not None
            }

    def score(
        self,
        criterion: str,
        name: str,
        final: Tensor,
        *,
        mask: Tensor | None,
        generator: torch.Generator | None,
        gated: str = "last",
    ) -> Tensor:
        """:func:`score_weights` of one tensor, from what is kept here; on the device of ``final``.

        Raises:
            ConfigError: The first step had no gradient of this tensor.
        """
        initial = None if self.initial is None else {canonical_name(n): t for n, t in self.initial.items()}.get(name)
        grad = self.grads.get(name)
        if grad is None and "grad" in CRITERIA[criterion]:
            raise ConfigError(
                f"criterion {criterion!r} needs a gradient of {name!r}, which the first step did not have: exclude "
                "that parameter from pruning, or choose another criterion."
            )
        return score_weights(
            criterion,
            None if initial is None else initial.to(final.device),
            final,
            grad=None if grad is None else grad.to(final.device),
            generator=generator,
            gated=gated,
            mask=mask,
        )

    def state_dict(self) -> dict[str, Any]:
        """The copies."""
        return {"initial": self.initial, "grads": dict(self.grads)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up; a state without them leaves nothing."""
        self.initial, self.grads = state.get("initial"), dict(state.get("grads", {}))


class CriterionScores(Mapping[str, Tensor]):
    """Scores of parameters by a criterion, computed when asked for.

    Args:
        criterion: A name in :data:`CRITERIA`.
        parameters: Trained, by canonical name.
        origins: What the criterion compares them with.
        within: The masks under which they were trained.
        seed: Of the criterion ``random``: the same for one tensor whenever it is asked for.
    """

    def __init__(
        self,
        criterion: str,
        parameters: Mapping[str, Tensor],
        origins: Origins,
        within: MaskSet,
        seed: int,
    ) -> None:
        self._criterion, self._parameters, self._origins, self._within = criterion, parameters, origins, within
        self._seeds = {name: seed * 10_007 + number for number, name in enumerate(parameters)}

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(self._seeds[name]) if self._criterion == "random" else None
        final = self._parameters[name].detach()
        return self._origins.score(self._criterion, name, final, mask=self._within[name], generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
