"""Lines between the ends of branches, measured once each."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.checkpoint import load_ticket
from lightning_prune.connectivity import ErrorPlane, ErrorRate, LinearPath, error_plane, linear_mode_connectivity
from lightning_prune.connectivity.batch_norm import tracked_norms
from lightning_prune.files import read_json, write_json
from lightning_prune.instability.analysis import Analysis, Unit
from lightning_prune.instability.share import Share
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


def measure(analysis: Analysis, share: Share | None = None) -> list[Line]:
    """Measure every line whose ends are there; lines measured before are read.

    Args:
        analysis: Whose branches have ended.
        share: The part of the lines that is measured here. The process that leads waits for the others' and returns
            all; the others return nothing.

    Returns:
        One entry a line: ``seed``, ``at``, ``step``, ``end``, ``round``, ``density``, ``copies``, ``batch_norm``,
        ``aligned``, ``same_noise``, and what :meth:`LinearPath.to_json` gives.
    """
    share, measuring = share or Share(), Measuring(analysis)
    jobs = _jobs(analysis, measuring.has_norms)
    own = share.of(jobs)
    with progress("lines between two copies", len(own)) as bar:
        for job in own:
            if job.found(analysis) is None:
                line = measuring.line(job.one, job.two, job.batch_norm, job.aligned)
                write_json(job.path(analysis), _entry(analysis, job, line))
            bar.advance()
    if not share.leads:
        return []
    share.wait(lambda: all(job.found(analysis) is not None for job in jobs), "lines that other processes measure")
    return [found for job in jobs if (found := job.found(analysis)) is not None]


@dataclass(frozen=True)
class _Job:
    """One line, and how it is measured."""

    one: Unit
    two: Unit
    batch_norm: str
    aligned: bool

    def path(self, analysis: Analysis) -> Path:
        """Where it is kept."""
        name = f"line{self.one.copy}-{self.two.copy}-{self.batch_norm}{'-aligned' if self.aligned else ''}.json"
        return analysis.path(self.one).parent / name

    def found(self, analysis: Analysis) -> Line | None:
        """The line, if it was measured at as many places and on the same data."""
        path, settings = self.path(analysis), analysis.settings
        if not path.exists():
            return None
        entry: Line = read_json(path, "a measured line")
        same = len(entry["alphas"]) == settings.points and list(entry["errors"]) == settings.splits
        return entry if same else None


def _jobs(analysis: Analysis, has_norms: bool) -> list[_Job]:
    """Every line; without BatchNorm there is nothing to estimate anew."""
    treatments = ("interpolate", "recalibrate") if has_norms else ("interpolate",)
    aligned = (False, True) if analysis.settings.align else (False,)
    return [_Job(one, two, norm, align) for one, two in pairs(analysis) for align in aligned for norm in treatments]


def _entry(analysis: Analysis, job: _Job, line: LinearPath) -> Line:
    one, two = job.one, job.two
    assert one.at is not None
    return {
        "seed": one.seed,
        "at": one.at,
        "step": analysis.step(one),
        "end": max(analysis.end(unit)[1] for unit in (one, two)),
        "round": one.round,
        "density": load_ticket(one.ticket).masks.density if one.ticket else 1.0,
        "copies": [one.copy, two.copy],
        "batch_norm": job.batch_norm,
        "aligned": job.aligned,
        "same_noise": analysis.settings.same_noise,
        **line.to_json(),
    }


class Measuring:
    """A network of the recipe and its data, which is read when it is first needed.

    Args:
        analysis: Whose ends are measured.

    Attributes:
        model: On the recipe's device.
        has_norms: Whether it keeps running statistics.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._built = analysis.build(analysis.settings.seeds[0])
        self.model = self._built.model
        trainer = self._built.trainer(analysis.folder, [])
        self.model.to(trainer.strategy.root_device)
        self._precision = trainer.precision_plugin
        self.has_norms = bool(tracked_norms(self.model))

    @cached_property
    def _data(self) -> Any:
        data = self._built.data
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        return data

    @cached_property
    def _rate(self) -> ErrorRate:
        splits, data = self.analysis.settings.splits, self._data
        loaders = {
            "train": getattr(data, "train_eval_dataloader", data.train_dataloader),
            "test": data.test_dataloader,
        }
        return ErrorRate({split: loaders[split]() for split in splits})

    def error(self, model: nn.Module) -> dict[str, float]:
        """The error on the splits that were asked for, in the recipe's precision, as Lightning would test."""
        with self._precision.forward_context():
            return self._rate(model)

    @cached_property
    def calibration(self) -> list[Any]:
        """The same batches of training data for every place."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return list(islice(self._data.train_dataloader(), self.analysis.settings.calibration_batches))

    def line(self, one: Unit, two: Unit, batch_norm: str, aligned: bool) -> LinearPath:
        """The line between two ends."""
        (state_a, _), (state_b, _) = self.analysis.end(one), self.analysis.end(two)
        return linear_mode_connectivity(
            self.model,
            state_a,
            state_b,
            self.error,
            points=self.analysis.settings.points,
            batch_norm=batch_norm,
            batches=self.calibration if batch_norm == "recalibrate" else None,
            masks=load_ticket(one.ticket).masks if one.ticket else None,
            differing_masks="union" if aligned else "error",
            align=aligned,
            example_inputs=_first(self.calibration[0]) if aligned else None,
        )

    def plane(self, one: Unit, two: Unit, side: int) -> ErrorPlane:
        """The plane through two ends and the network from which they branched."""
        (state_a, _), (state_b, _) = self.analysis.end(one), self.analysis.end(two)
        batches = self.calibration if self.has_norms else None
        return error_plane(self.model, state_a, state_b, self.analysis.start(one), self.error, side, batches=batches)


def _first(batch: Any) -> Any:
    """Two examples of a batch's inputs."""
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    return inputs[:2] if isinstance(inputs, Tensor) else inputs
