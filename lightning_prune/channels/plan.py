"""Removal plans: which channels leave, by parameter and axis; JSON that a fresh model replays without inputs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_prune.channels.plan_checks import check_content
from lightning_prune.channels.surgery import carry_out, check_fits
from lightning_prune.errors import FileFormatError
from lightning_prune.wrappers import bare, uncompiled

VERSION = 1


@dataclass
class RemovalPlan:
    """Which positions of which axes stay, and which module attributes change with them.

    Attributes:
        keep: For each parameter or buffer that shrinks: axis -> indices that stay, in their new order.
        shapes: Shape before removal of each tensor in ``keep``.
        reads: The (name, axis) pairs that read channels: the masked parent has zeros there.
        attributes: New values of module attributes, by module name.
        groups: One entry a group: name, size before, size after.
        costs: ``channels``, ``params`` and ``macs``: (before, after). MACs at the traced example inputs. With a latency
            budget ``latency``: nanoseconds.
        latency: With a latency budget what was measured: ratio and interval against the original, candidates, device.
        training: Whether the check must also run the branches that only training takes.
        replaced: Modules that are replaced by ones with a free inner width before channels leave: name -> kind.
        statistics: Operations that average over channels of which some leave: module, which of the module's, ``axis``
            from the end, indices that stay. Empty unless the graph was traced with ``approximate=True``.
        unseen: Parameters that the traced pass did not use. Code that chooses its path by values may use them later.
        without_effect: Parameters on which no output depended in the traced pass; the check cannot see them.
        left: Residual blocks that leave whole: their name, the module and its additions, and what stands for each
            module that leaves. ``shapes`` then has the tensors that leave with them.
    """

    keep: dict[str, dict[int, list[int]]]
    shapes: dict[str, list[int]]
    reads: list[tuple[str, int]] = field(default_factory=list)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, tuple[int, int]] = field(default_factory=dict)
    training: bool = False
    replaced: dict[str, str] = field(default_factory=dict)
    statistics: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, Any] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    left: list[dict[str, Any]] = field(default_factory=list)

    @property
    def removes(self) -> bool:
        """Whether anything leaves."""
        return bool(self.keep or self.left)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON content."""
        content = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        content["keep"] = {n: {str(a): i for a, i in axes.items()} for n, axes in self.keep.items()}
        return {"version": VERSION, **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | str) -> "RemovalPlan":
        """Read what :meth:`to_json` gave (content, or its text).

        Raises:
            FileFormatError: Not a plan, or one of a later version.
        """
        try:
            data = dict(json.loads(content) if isinstance(content, str) else content)
            version = data.pop("version")
            if not isinstance(version, int) or version > VERSION:
                raise FileFormatError(
                    f"the plan has version {version!r}, this library reads up to {VERSION}; upgrade lightning-prune."
                )
            data["keep"] = {n: {int(a): list(i) for a, i in axes.items()} for n, axes in data["keep"].items()}
            data["reads"] = [(str(n), int(a)) for n, a in data["reads"]]
            data["costs"] = {k: (int(v[0]), int(v[1])) for k, v in data["costs"].items()}
            plan = cls(**data)
            check_content(plan)
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"this is not a removal plan ({type(error).__name__}: {error}).") from error

    def apply_(self, model: nn.Module) -> None:
        """Carry the plan out on a fresh model of the original shape, without a check of outputs.

        Raises:
            MaskMismatchError: The model is not of the architecture that the plan was made for.
        """
        model = bare(model)
        with uncompiled(model):
            check_fits(self, model)
            carry_out(self, model)

    def digest(self) -> str:
        """SHA-256 of the plan's content, as hexadecimal text: equal plans have equal digests."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
