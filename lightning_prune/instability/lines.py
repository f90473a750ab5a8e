"""Lines between the ends of branches, measured once each."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checkpoint import load_ticket
from lightning_prune.connectivity import ErrorRate, LinearPath, linear_mode_connectivity
from lightning_prune.connectivity.batch_norm import tracked_norms
from lightning_prune.errors import ConfigError
from lightning_prune.files import read_json, write_json
from lightning_prune.instability.analysis import Analysis, Unit
from lightning_prune.progress import progress

Line = dict[str, Any]


def pairs(analysis: Analysis) -> Iterator[tuple[Unit, Unit]]:
    """Copies of one point, two by two, as far as both have finished."""
    families: dict[tuple[int, str, int], list[Unit]] = {}
    for unit in analysis.units():
        if unit.at is not None and analysis.is_done(unit):
            families.setdefault((unit.seed, unit.at, unit.round), []).append(unit)
    for units in families.values():
        yield from combinations(units, 2)


def measure(analysis: Analysis) -> list[Line]:
    """Measure every line whose ends are there; lines measured before are read.

    Returns:
        One entry a line: ``seed``, ``at``, ``step``, ``end``, ``round``, ``density``, ``copies``, ``batch_norm``,
        ``aligned``, ``same_noise``, and what :meth:`LinearPath.to_json` gives.
    """
    found: list[Line] = []
    measuring: list[_Measuring] = []  # made when the first line is missing
    treatments = list(product((False, True) if analysis.settings.align else (False,), ("interpolate", "recalibrate")))
    ends = list(pairs(analysis))
    with progress("lines between two copies", len(ends) * len(treatments)) as bar:
        for (one, two), (aligned, batch_norm) in product(ends, treatments):
            entry = _line(analysis, measuring, one, two, batch_norm, aligned)
            found += [] if entry is None else [entry]
            bar.advance()
    return found


def _line(
    analysis: Analysis, measuring: list["_Measuring"], one: Unit, two: Unit, batch_norm: str, aligned: bool
) -> Line | None:
    """One line, read or measured; ``None`` where the treatment makes no difference to this network."""
    name = f"line{one.copy}-{two.copy}-{batch_norm}{'-aligned' if aligned else ''}.json"
    path = analysis.path(one).parent / name
    entry = read_json(path, "a measured line") if path.exists() else None
    if entry is not None and _fits(entry, analysis):
        return dict(entry)
    if not measuring:
        measuring.append(_Measuring(analysis))
    line = measuring[0].line(one, two, batch_norm, aligned)
    if line is None:
        return None
    entry = _entry(analysis, one, two, batch_norm, aligned, line)
    write_json(path, entry)
    return entry


def _fits(entry: Line, analysis: Analysis) -> bool:
    settings = analysis.settings
    return len(entry["alphas"]) == settings.points and list(entry["errors"]) == settings.splits


def _entry(analysis: Analysis, one: Unit, two: Unit, batch_norm: str, aligned: bool, line: LinearPath) -> Line:
    assert one.at is not None
    return {
        "seed": one.seed,
        "at": one.at,
        "step": analysis.step(one),
        "end": max(analysis.end(unit)[1] for unit in (one, two)),
        "round": one.round,
        "density": load_ticket(one.ticket).masks.density if one.ticket else 1.0,
        "copies": [one.copy, two.copy],
        "batch_norm": batch_norm,
        "aligned": aligned,
        "same_noise": analysis.settings.same_noise,
        **line.to_json(),
    }


class _Measuring:
    """A network of the recipe and its data, for lines."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        settings = analysis.settings
        built = analysis.build(settings.seeds[0])
        self.model = built.model
        device = built.trainer(analysis.folder, []).strategy.root_device
        self.model.to(device)
        data = built.data
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        whole = getattr(data, "train_eval_dataloader", data.train_dataloader)
        loaders = {"train": whole, "test": data.test_dataloader}
        unknown = [split for split in settings.splits if split not in loaders]
        if unknown or not settings.splits:
            raise ConfigError(f"splits={settings.splits}: choose from 'train' and 'test'.")
        self.error = ErrorRate({split: loaders[split]() for split in settings.splits})
        self.has_norms = bool(tracked_norms(self.model))
        self._train: Iterable[Any] = data.train_dataloader()
        self._batches: list[Any] | None = None

    def line(self, one: Unit, two: Unit, batch_norm: str, aligned: bool) -> LinearPath | None:
        """The line between two ends; ``None`` where the treatment makes no difference to this network."""
        if batch_norm == "recalibrate" and not self.has_norms:
            return None
        (state_a, _), (state_b, _) = self.analysis.end(one), self.analysis.end(two)
        masks = load_ticket(one.ticket).masks if one.ticket else None
        inputs = self._calibration()[0] if aligned else None
        return linear_mode_connectivity(
            self.model,
            state_a,
            state_b,
            self.error,
            points=self.analysis.settings.points,
            batch_norm=batch_norm,
            batches=self._calibration() if batch_norm == "recalibrate" else None,
            masks=masks,
            differing_masks="union" if aligned else "error",
            align=aligned,
            example_inputs=None if inputs is None else _first(inputs),
        )

    def _calibration(self) -> Sequence[Any]:
        """The same batches of training data for every line."""
        if self._batches is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                source = iter(self._train)
                self._batches = [
                    b for _, b in zip(range(self.analysis.settings.calibration_batches), source, strict=False)
                ]
        return self._batches


def _first(batch: Any) -> Any:
    """Two examples of a batch's inputs."""
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    return inputs[:2] if isinstance(inputs, Tensor) else inputs
