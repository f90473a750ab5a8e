"""Several copies of one small network trained in one fit: their operations run as one, batched over the copies."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_prune.callbacks import IterativeMagnitudePruner
from lightning_prune.callbacks.enforce import ENTRY_BY_ENTRY
from lightning_prune.checkpoint import Ticket
from lightning_prune.errors import ConfigError, EqualityError, FileFormatError
from lightning_prune.experiments.classifier import ImageClassifier
from lightning_prune.masks import MaskSet

_NAME = re.compile(r"(^|\.)copies\.(\d+)\.")


class Copies(nn.Module):
    """Several networks of one architecture, computed as one by ``torch.vmap`` over their stacked parameters.

    Each stays an ordinary module with parameters of its own (``copies.0.fc1.weight``), which optimizers, pruners,
    rewinders and checkpoints see; they are stacked anew in each forward pass, and gradients come back to each.

    Args:
        networks: At least two; parameters of the same names, shapes and types, values as each one's own.

    Shape:
        input: (N, ...), the same for all copies; or a list of one such tensor a copy. output: (copies, N, ...).

    Raises:
        ConfigError: Fewer than two, different architectures, shared parameters, buffers (BatchNorm's statistics would
            have to change within ``vmap``) or dropout (its numbers would be others than one after the other); in the
            forward pass: an operation that cannot be batched, or draws random numbers.

    Example:
        >>> networks = Copies([nn.Linear(4, 2) for _ in range(3)])
        >>> networks(torch.zeros(5, 4)).shape
        torch.Size([3, 5, 2])
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(networks) < 2:
            raise ConfigError(f"Copies of {len(networks)} network(s): expected at least two; one is trained as it is.")
        _require_same(networks)
        _require_plain(networks[0])
        self.copies = nn.ModuleList(networks)
        self._template = (deepcopy(networks[0]).to("meta"),)  # in a tuple: it is no part of this module
        self._names = [name for name, _ in networks[0].named_parameters()]

    def stacked(self) -> dict[str, Tensor]:
        """The parameters of all copies by their name in one, shape (copies, ...); gradients go through."""
        each = [[parameter for _, parameter in network.named_parameters()] for network in self.copies]
        return {name: torch.stack(values) for name, values in zip(self._names, zip(*each, strict=True), strict=True)}

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """All copies' outputs."""
        (template,) = self._template
        template.train(self.training)

        def one(parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
            return functional_call(template, dict(parameters), (inputs,))

        own = not isinstance(images, Tensor)
        if own and len(images) != len(self.copies):
            raise ConfigError(f"{len(images)} batches for {len(self.copies)} copies: expected one for all or one each.")
        inputs = images if isinstance(images, Tensor) else torch.stack(tuple(images))
        try:
            return torch.vmap(one, in_dims=(0, 0 if own else None))(self.stacked(), inputs)
        except RuntimeError as error:
            raise ConfigError(
                f"{type(self.copies[0]).__name__} cannot be computed for several copies at once: {error!s:.300} Train "
                "them one after the other."
            ) from error


class TogetherClassifier(ImageClassifier):
    """Train several copies of one network to classify images, in one fit; each as it would be trained alone.

    Each copy has its own loss, gradients and optimizer state; nothing couples them, so each ends where it would have
    ended alone on the same batches, up to the order of sums. With ``IterativeMagnitudePruner(scope="layer")`` and the
    rewinders beside it each copy is cut and rewound by itself; a ticket then holds all copies, and
    :func:`split_ticket` makes ordinary ones of it. What is decided by a metric (ModelCheckpoint's best, EarlyStopping,
    EarlyBird) is decided for all.

    Logged: as :class:`ImageClassifier`, means over the copies, and each copy's beside it (``val_acc_0``, ...).

    Args: as :class:`ImageClassifier`; ``network`` is a :class:`Copies`.

    Shape:
        batch: images (N, C, H, W) and labels (N,) for all copies; or a list of such pairs, one a copy, as
        ``CombinedLoader([loader] * copies, mode="min_size")`` gives them: then each has its own order.

    Raises:
        ConfigError: ``network`` is no :class:`Copies`; in ``on_fit_start``: what would couple the copies (gradient
            clipping, an optimizer that looks beyond single entries, a reduce-on-plateau schedule, a pruner whose
            selection is over all copies, or which removes channels).
        EqualityError: At the first batch, a copy computed with the others gives something else than alone.
    """

    def __init__(self, network: nn.Module, **options: Any) -> None:
        if not isinstance(network, Copies):
            raise ConfigError(f"network is a {type(network).__name__}: expected Copies([...]), or ImageClassifier.")
        super().__init__(network, **options)
        self._compared = False

    def setup(self, stage: str) -> None:
        """See that the trainer and its callbacks do not couple the copies."""
        super().setup(stage)
        if stage != "fit":
            return
        if self.trainer.gradient_clip_val:
            raise ConfigError(
                f"gradient_clip_val={self.trainer.gradient_clip_val} would clip all copies by a norm over all of them. "
                "Train without it, or one copy at a time."
            )
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, IterativeMagnitudePruner):
                if callback.scope != "layer":
                    raise ConfigError(
                        f"IterativeMagnitudePruner(scope={callback.scope!r}) would select over the weights of all "
                        "copies. Use scope='layer', by which each tensor of each copy loses its own part."
                    )
            elif getattr(callback, "sends_prune_events", False):
                raise ConfigError(
                    f"{type(callback).__name__} prunes networks one at a time. Beside TogetherClassifier only "
                    "IterativeMagnitudePruner(scope='layer') can."
                )

    def on_fit_start(self) -> None:
        """See that optimizers and schedules do not couple the copies."""
        self._compared = False
        for optimizer in self.trainer.optimizers:
            if type(optimizer) not in ENTRY_BY_ENTRY:
                raise ConfigError(
                    f"{type(optimizer).__name__} may look at several parameters at once, and copies would depend on "
                    f"each other. Choose one of {', '.join(kind.__name__ for kind in ENTRY_BY_ENTRY)}."
                )
        if any(config.reduce_on_plateau for config in self.trainer.lr_scheduler_configs):
            raise ConfigError("a reduce-on-plateau schedule would be driven by all copies at once. Choose another.")

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Logits (copies, N, num_classes)."""
        logits = self.network(images)
        if logits.dim() != 3 or logits.shape[2] != self.num_classes:
            raise ConfigError(
                f"the copies give outputs of shape {tuple(logits.shape)}; expected (copies, N, {self.num_classes}): "
                f"set each network's number of classes to num_classes={self.num_classes}."
            )
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the copies' cross-entropies, so that each has the gradient that it has alone."""
        images, labels = _images_and_labels(batch)
        if not self._compared:
            self._compare(images)
            self._compared = True
        losses = self._losses(self(images), labels, self.label_smoothing)
        if batch_idx == 0 or (self.global_step + 1) % self._log_every == 0:
            self.log("train_loss", losses.mean(), prog_bar=True)
        return losses.sum()

    def _losses(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Each copy's mean over the batch; labels are (N,) or (copies, N)."""
        each = F.cross_entropy(
            logits.flatten(0, 1), labels.expand(logits.shape[:2]).flatten(), reduction="none", label_smoothing=smoothing
        )
        return each.view(logits.shape[:2]).mean(1)

    def _compare(self, images: Tensor | Sequence[Tensor]) -> None:
        """Together and alone, on one batch."""
        assert isinstance(self.network, Copies)
        with torch.no_grad():
            together = self.network(images)
            for number, network in enumerate(self.network.copies):
                alone = network(images if isinstance(images, Tensor) else images[number])
                error = float((alone - together[number]).abs().max())
                if not error <= 1e-4 * max(1.0, float(alone.abs().max())):
                    raise EqualityError(
                        f"copy {number} of {type(network).__name__} gives other outputs together with the others than "
                        f"alone (by up to {error:.2g}): its forward pass depends on more than parameters and inputs."
                    )

    def _evaluate(self, batch: tuple[Tensor, Tensor], name: str, accuracy: Any) -> None:
        images, labels = batch
        logits = self(images)
        losses = self._losses(logits, labels)
        right = (logits.argmax(2) == labels).to(losses.dtype).mean(1)
        options: dict[str, Any] = {"on_epoch": True, "on_step": False, "add_dataloader_idx": False}
        values = {f"{name}_loss": losses.mean(), f"{name}_acc": right.mean()}
        values |= {f"{name}_loss_{i}": loss for i, loss in enumerate(losses)}
        values |= {f"{name}_acc_{i}": part for i, part in enumerate(right)}
        self.log_dict(values, batch_size=len(labels), sync_dist=True, **options)


def split_ticket(ticket: Ticket) -> list[Ticket]:
    """The ticket of a fit of :class:`TogetherClassifier` as one ordinary ticket a copy.

    Args:
        ticket: With names such as ``network.copies.0.fc1.weight``.

    Returns:
        In the order of the copies, with names such as ``network.fc1.weight``. ``info`` is the whole's, with the
        ``density`` of the copy, and its number as ``copy``.

    Raises:
        FileFormatError: A name that belongs to no copy.
    """
    masks, weights = _by_copy(ticket.masks), _by_copy(ticket.weights)
    if masks.keys() != weights.keys():
        raise FileFormatError("the ticket has masks and weights of different copies.")
    tickets = []
    for number in sorted(masks):
        own = MaskSet(masks[number])
        info = dict(ticket.info) | {"copy": number, "density": own.density, "digest": own.digest()}
        tickets.append(Ticket(own, weights[number], info))
    return tickets


def join_tickets(tickets: Sequence[Ticket]) -> Ticket:
    """Undo :func:`split_ticket`: tickets of several runs of one network as the ticket of a fit of all of them.

    Args:
        tickets: With names such as ``network.fc1.weight``.

    Raises:
        ConfigError: No tickets, or a name outside ``network``.
    """
    if not tickets:
        raise ConfigError("there are no tickets to join.")

    def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        whole = {}
        for number, part in enumerate(parts):
            for name, tensor in part.items():
                if not name.startswith("network."):
                    raise ConfigError(f"{name!r} of ticket {number} lies outside `network`, where copies are.")
                whole[f"network.copies.{number}.{name.removeprefix('network.')}"] = tensor
        return whole

    masks = MaskSet(joined([ticket.masks for ticket in tickets]))
    info = {k: v for k, v in tickets[0].info.items() if k not in ("digest", "copy")} | {"density": masks.density}
    return Ticket(masks, joined([ticket.weights for ticket in tickets]), info)


def _by_copy(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.search(name)
        if match is None:
            raise FileFormatError(f"{name!r} belongs to no copy: this ticket is not one of several networks together.")
        found.setdefault(int(match[2]), {})[_NAME.sub(r"\1", name, count=1)] = tensor
    return found


def _images_and_labels(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch[0], Tensor):
        return batch[0], batch[1]
    return [images for images, _ in batch], torch.stack([labels for _, labels in batch])


def _require_same(networks: Sequence[nn.Module]) -> None:
    first = {name: (tuple(p.shape), p.dtype) for name, p in networks[0].named_parameters()}
    for number, network in enumerate(networks[1:], 1):
        own = {name: (tuple(p.shape), p.dtype) for name, p in network.named_parameters()}
        if type(network) is not type(networks[0]) or own != first:
            odd = sorted(map(str, set(own.items()) ^ set(first.items())))
            raise ConfigError(
                f"network {number} is another than network 0 ({type(network).__name__}, {type(networks[0]).__name__}"
                + (f"; {odd[0]}" if odd else "")
                + "): copies have one architecture."
            )
    held = [id(p) for network in networks for p in network.parameters()]
    if len(set(held)) < len(held):
        raise ConfigError("two of the networks share parameters: give each its own (build each, or copy.deepcopy).")


def _require_plain(network: nn.Module) -> None:
    buffers = [name for name, _ in network.named_buffers()]
    if buffers:
        raise ConfigError(
            f"{type(network).__name__} has buffers ({buffers[0]!r}{', ...' if len(buffers) > 1 else ''}), which a "
            "forward pass may write to, as BatchNorm does: copies cannot be computed at once. Train them one after the "
            "other, or use a network without (GroupNorm, LayerNorm)."
        )
    for name, module in network.named_modules():
        if isinstance(getattr(module, "p", None), float) and module.p > 0 and "Dropout" in type(module).__name__:
            raise ConfigError(
                f"{name or type(module).__name__} drops activations at random: together the copies would draw other "
                "numbers than one after the other. Set p=0, or train them one after the other."
            )
