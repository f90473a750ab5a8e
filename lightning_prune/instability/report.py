"""Measured lines as a table and as pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.errors import ConfigError
from lightning_prune.reports.pictures import check_pictures, make_figure, write_figure
from lightning_prune.reports.rounds import Estimate

STABLE = 0.02
"""Barrier under which Frankle et al. (arXiv:1912.05671, section 3) call a network stable."""

Line = dict[str, Any]


def grouped(lines: Sequence[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    """Lines that share a key, in the order of the key."""
    return {value: [line for line in lines if key(line) == value] for value in sorted({key(line) for line in lines})}


def by_seed(lines: Sequence[Line], value: Callable[[Line], float]) -> Estimate:
    """Mean over seeds, each seed's pairs of copies averaged first."""
    return Estimate.of([float(np.mean([value(line) for line in own])) for own in grouped(lines, _seed).values()])


def table(lines: Sequence[Line]) -> str:
    """A Markdown table with one row a point, ticket and treatment; numbers in points of error.

    Columns: step and density; mean error of the ends; barrier by split (mean over seeds, with the 95 % interval);
    height above the straight line; whether the mean barrier on the last split is under 2 points.

    Raises:
        ConfigError: No lines.
    """
    if not lines:
        raise ConfigError("no line was measured: no two copies of a point have finished.")
    splits = list(lines[0]["errors"])
    head = ["from step", "weights left", "BatchNorm", "seeds x lines"]
    head += [f"error of the ends, {split}" for split in splits] + [f"barrier, {split}" for split in splits]
    head += [f"above the line, {splits[-1]}", "stable (< 2)"]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (step, density, aligned, batch_norm), own in grouped(lines, _row).items():
        seeds = grouped(own, _seed)
        cells = [f"{step:,}", f"{-100 * density:.2f} %", batch_norm + (", aligned" if aligned else "")]
        cells.append(f"{len(seeds)} x {len(own) // len(seeds)}")
        cells += [by_seed(own, _ends(split)).text(100) for split in splits]
        cells += [by_seed(own, _of("barriers", split)).text(100) for split in splits]
        cells.append(by_seed(own, _of("heights_above_line", splits[-1])).text(100))
        stable = by_seed(own, _of("barriers", splits[-1])).mean < STABLE
        rows.append("| " + " | ".join([*cells, "yes" if stable else "no"]) + " |")
    return "\n".join(rows)


def _seed(line: Line) -> int:
    return int(line["seed"])


def _row(line: Line) -> tuple[int, float, bool, str]:
    return line["step"], -line["density"], line["aligned"], line["batch_norm"]


def _treatment(line: Line) -> str:
    return str(line["batch_norm"]) + (", aligned" if line["aligned"] else "")


def _ends(split: str) -> Callable[[Line], float]:
    return lambda line: (line["errors"][split][0] + line["errors"][split][-1]) / 2


def _of(kind: str, split: str) -> Callable[[Line], float]:
    return lambda line: float(line[kind][split])


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Draw errors along the lines, and barriers against the step and against the weights left.

    Returns:
        Names of the files written.
    """
    check_pictures()
    split = list(lines[0]["errors"])[-1]
    written = ["lines.svg"]
    _draw_lines(lines, split, folder / written[0])
    for name, axis, label in (("step", "step", "branched at step"), ("density", "density", "weights left")):
        fixed = "density" if axis == "step" else "step"
        if any(len({line[axis] for line in own}) > 1 for own in _series(lines, fixed).values()):
            written.append(f"barrier-against-{name}.svg")
            _draw_barriers(lines, split, axis, label, folder / written[-1])
    return written


def _series(lines: Sequence[Line], fixed: str) -> dict[Any, list[Line]]:
    return grouped(lines, lambda line: (line[fixed], _treatment(line)))


def _draw_lines(lines: Sequence[Line], split: str, path: Path) -> None:
    """One panel a treatment, one curve a point or ticket: mean over all seeds and pairs, shaded from least to most."""
    panels = grouped(lines, _treatment)
    figure, axes = make_figure(len(panels))
    for axis, (title, own) in zip(axes, panels.items(), strict=True):
        for (step, density), curves in grouped(own, lambda line: (line["step"], -line["density"])).items():
            errors = 100 * np.array([line["errors"][split] for line in curves])
            label = f"step {step:,}" + ("" if density == -1 else f", {-100 * density:.1f} % of weights")
            (drawn,) = axis.plot(curves[0]["alphas"], errors.mean(0), label=label)
            axis.fill_between(curves[0]["alphas"], errors.min(0), errors.max(0), alpha=0.2, color=drawn.get_color())
        axis.set(title=f"BatchNorm: {title}", xlabel="place on the line", ylabel=f"error, {split} (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    write_figure(figure, path)


def _draw_barriers(lines: Sequence[Line], split: str, axis_name: str, label: str, path: Path) -> None:
    """One curve a ticket or step and treatment, with the 95 % interval over seeds."""
    figure, (axis,) = make_figure(1)
    fixed = "density" if axis_name == "step" else "step"
    for (value, title), own in _series(lines, fixed).items():
        places = grouped(own, lambda line: line[axis_name])
        if len(places) < 2:
            continue
        found = [by_seed(at, _of("barriers", split)) for at in places.values()]
        words = f"{100 * value:.1f} % of weights" if fixed == "density" else f"step {value:,}"
        widths = [100 * np.nan_to_num(estimate.half_width) for estimate in found]
        axis.errorbar(list(places), [100 * e.mean for e in found], widths, marker="o", label=f"{words}, {title}")
    axis.axhline(100 * STABLE, linestyle=":", color="grey")
    axis.set(xlabel=label, ylabel=f"barrier, {split} (points)")
    ticks = sorted({line[axis_name] for line in lines})
    if axis_name == "step":
        axis.set_xscale("symlog", linthresh=min(tick for tick in ticks if tick > 0))
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    else:
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{100 * tick:.3g} %" for tick in ticks])
        axis.invert_xaxis()
    axis.minorticks_off()
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    write_figure(figure, path)
