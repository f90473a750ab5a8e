"""One row of a run's record."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_prune.counted import Counted
from lightning_prune.errors import ConfigError
from lightning_prune.record.content import decode, encode, to_plain

UNITS = ("weights", "channels", "blocks")
"""What a round may count."""


@dataclass(frozen=True)
class Round(Counted):
    """One row of the record: one trained network, before the next event cuts it.

    Args:
        round: Index; 0 is the dense network.
        step: ``trainer.global_step`` at the round's end.
        epoch: ``trainer.current_epoch`` at the round's end, counted over the whole fit.
        steps: Optimizer steps at the round's end counted within one training, between the rewinding point and ``T``.
        kept: Weights (or channels, see ``unit``) left, of the prunable ones.
        total: Prunable weights (channels) of the dense network: the denominator of ``density`` and ``sparsity``.
        digest: Digest of the masks, or of the removal plans, under which this round was trained.
        per_layer: ``{name: (kept, total)}`` for every masked tensor.
        removed: Weights that the event at the round's start removed; 0 for the dense round.
        metrics: ``{name: value}`` at the round's end.
        learning_rates: At the round's end, one for each parameter group, optimizers in their order.
        best: The round's best point by a monitored value: ``step``, ``epoch``, ``monitor``, ``value``, ``metrics``.
        best_checkpoint: Its checkpoint, relative to the run folder.
        ticket: The ticket from which this round was trained, relative to the run folder.
        stopped_early: Whether the round ended before its last step.
        unit: What ``kept``, ``total``, ``removed`` and ``per_layer`` count: ``"weights"`` (of masked tensors),
            ``"channels"`` (of groups that can leave) or residual ``"blocks"`` that can.
        start_metrics: ``{name: value}`` right after the event that opened the round, before training, where measured.
        costs: ``{"channels" | "params" | "macs": (now, of the dense network)}`` where channels are removed: prunable
            channels, all parameters, multiply-adds at the example inputs. Where whole blocks are removed ``"blocks"``
            instead of channels.
        mask_distances: ``(steps, distance)`` of each check whether the masks of the coming cut have settled; ``steps``
            counted as above, ``distance`` as in :class:`EarlyBird`.

    Raises:
        ConfigError: Counts that contradict each other, or a value of the wrong type.
    """

    round: int
    step: int
    epoch: int
    steps: int
    kept: int
    total: int
    digest: str
    per_layer: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    removed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    best: Mapping[str, Any] | None = None
    best_checkpoint: str | None = None
    ticket: str | None = None
    stopped_early: bool = False
    unit: str = "weights"
    start_metrics: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    mask_distances: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        where = f"round {self.round!r:.80} of the record"
        for name in ("round", "step", "epoch", "steps", "kept", "total", "removed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{where}: {name}={value!r:.80} must be a whole number of at least 0.")
        if self.kept > self.total:
            raise ConfigError(f"{where}: kept={self.kept} is more than total={self.total}.")
        if not isinstance(self.digest, str):
            raise ConfigError(f"{where}: digest={self.digest!r:.80} must be text.")
        if self.unit not in UNITS:
            raise ConfigError(f"{where}: unit={self.unit!r:.80} must be one of {', '.join(UNITS)}.")
        try:  # tensors and tuples become plain numbers and one order here, so that equality and JSON need no care
            plain = {
                "per_layer": {str(k): (int(kept), int(total)) for k, (kept, total) in self.per_layer.items()},
                "metrics": {str(k): float(v) for k, v in self.metrics.items()},
                "start_metrics": {str(k): float(v) for k, v in self.start_metrics.items()},
                "learning_rates": tuple(float(v) for v in self.learning_rates),
                "best": None if self.best is None else to_plain(self.best, f"{where}, best"),
                "stopped_early": bool(self.stopped_early),
                "costs": {str(k): (int(now), int(dense)) for k, (now, dense) in self.costs.items()},
                "mask_distances": tuple((int(steps), float(distance)) for steps, distance in self.mask_distances),
            }
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{where}: a count, metric or learning rate is no number ({error!s:.120}).") from error
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON content; ``density`` and ``sparsity`` stand in it for readers without this library."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        return encode(content | {"density": self.density, "sparsity": self.sparsity})

    @classmethod
    def from_json(cls, content: Any) -> "Round":
        """Undo :meth:`to_json`.

        Raises:
            ConfigError: ``content`` is no row.
        """
        if not isinstance(content, dict):
            raise ConfigError(f"a row of the record must be a JSON object, got {type(content).__name__}.")
        try:
            return cls(**{k: v for k, v in decode(content).items() if k not in ("density", "sparsity")})
        except TypeError as error:
            raise ConfigError(f"a row of the record has missing or unknown fields: {error}.") from error
