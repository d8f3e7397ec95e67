"""The picture of a sweep: how far the images stand above their controls, against the defence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inversion.audit.sweep.row import Row
from inversion.audit.sweep.table import verdict_cell, why_none
from utils.files import whole_file

#: Colours that stay apart for colour-blind eyes (Okabe & Ito): attack, identified images, controls.
ATTACK, IDENTIFIED, CONTROLS = "#0072B2", "#D55E00", "#777777"
#: Smallest ratio of the highest to the lowest value that gets a logarithmic axis.
LOGARITHMIC = 5
#: Inches between neighbouring values, at the least; above and below all of them; across.
GAP, MARGIN, WIDTH = 0.36, 1.15, 9.0
#: Half the height of a value's band, where its neighbour is 1 away.
HALF = 0.36


@dataclass(frozen=True)
class Panel:
    """Holds a sweep that is drawn."""

    parameter: str
    #: In order, from the top.
    values: Sequence[str]
    rows: Sequence[Row]
    #: Above the panel.
    title: str = ""


def save_sweeps(panels: Sequence[Panel], path: str | Path) -> None:
    """Plot every image's leakage against the value of the swept parameter, a panel per sweep.

    The leakage of an image is what the table says: how far it stands above the best of its own
    controls, in the metric of the verdict, so that 0 is no better than without the gradient. Dots
    are images, a bar is their mean. The band spans what the controls reach in comparison with the
    best one of the same image, which ends it at 0. Values stand from the top as in the table, with
    their verdict, or why there is none. Numbers that span a wide range have a logarithmic axis, on
    which 0 and "none" stand apart at the top.
    """
    heights = [MARGIN + GAP * (_steps(positions(panel.values)[0]) + 1) for panel in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel)
    handles: dict = {}
    for axis in axes:
        drawn, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    figure.legend(
        [*handles.values()], [*handles], fontsize=9, loc="outside upper center", ncols=3,
        frameon=False, columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def positions(values: Sequence[str]) -> tuple[list[float], float | None]:
    """Return where every value stands, and where 0 and "none" are set apart from the others.

    The second is None where the values are names or do not span a wide range, and 0 where they do
    and there is nothing to set apart.
    """
    even = [float(i) for i in range(len(values))]
    numbers = [_number(value) for value in values]
    positive = [n for n in numbers if n is not None and n > 0]
    if any(n is None for n in numbers) or len(set(positive)) < 2:
        return even, None
    if max(positive) < LOGARITHMIC * min(positive):
        return even, None
    step = math.log(max(positive) / min(positive)) / (len(positive) - 1)
    places = [math.log(n / min(positive)) / step if n else -1.0 for n in numbers if n is not None]
    return places, -0.5 if min(places) < 0 else 0.0


def _number(value: str) -> float | None:
    """Read a value as a number, "none" as 0; None where it is a name."""
    if value == "none":
        return 0.0
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _steps(places: Sequence[float]) -> float:
    """Return how many times the least gap the values span, at which labels do not meet."""
    gaps = np.diff(sorted(places))
    return (max(places) - min(places)) / max(gaps.min(), 0.25) if len(gaps) else 0.0


def _draw(axis: Axes, panel: Panel) -> None:
    """Draw one sweep."""
    places, split = positions(panel.values)
    of_values = [[row for row in panel.rows if row.value == value] for value in panel.values]
    gaps = np.diff(sorted(places))
    half = HALF * min([1.0, *gaps])
    for place, rows in zip(places, of_values, strict=True):
        below = [v for row in rows for v in row.lowest_control]
        if below:
            axis.fill_betweenx(
                [place - half, place + half], min(below), 0, color=CONTROLS, alpha=0.3, linewidth=0,
                label="controls, made without the gradient",
            )  # fmt: skip
    axis.axvline(
        0,
        color=CONTROLS,
        linewidth=1.5,
        label="best control of the image",
        zorder=1,
        linestyle="--",
    )
    _draw_attacks(axis, places, of_values, half, connected=split is not None)
    if split:
        axis.axhline(split, color="black", linewidth=0.8, linestyle=":")
    _label(axis, panel, places, of_values)


def _draw_attacks(
    axis: Axes, places: Sequence[float], of_values: Sequence[Sequence[Row]], half: float, *,
    connected: bool,
) -> None:  # fmt: skip
    """Draw every image as a dot, those that are identified one by one as diamonds, and the mean."""
    dots: dict[bool, tuple[list[float], list[float]]] = {False: ([], []), True: ([], [])}
    means = []
    for place, rows in zip(places, of_values, strict=True):
        images = [(v, i in row.identified) for row in rows for i, v in enumerate(row.leakage)]
        if not images:
            continue
        mean = float(np.mean([value for value, _ in images]))
        means.append((place, mean))
        axis.vlines(
            mean, place - half, place + half, color="black", linewidth=2, label="mean", zorder=3
        )
        for k, (value, identified) in enumerate(images):
            x, y = dots[identified]
            x.append(value)
            y.append(place + 1.4 * half * ((k + 0.5) / len(images) - 0.5))
    for identified, marker, colour, label in (
        (False, "o", ATTACK, "image"),
        (True, "D", IDENTIFIED, "image, identified among its decoys"),
    ):
        x, y = dots[identified]
        if x:
            axis.scatter(
                x, y, s=22, marker=marker, color=colour, alpha=0.8, linewidth=0, label=label,
                zorder=4,
            )  # fmt: skip
    if connected and means:
        line = np.array(sorted(means))
        axis.plot(line[:, 1], line[:, 0], color="black", linewidth=0.8, zorder=2)


def _label(
    axis: Axes, panel: Panel, places: Sequence[float], of_values: Sequence[Sequence[Row]]
) -> None:
    """Name the values on the left and their verdicts on the right, from the top."""
    metrics = dict.fromkeys(row.metric.upper() for row in panel.rows if row.metric is not None)
    for place, rows in zip(places, of_values, strict=True):
        why = why_none(rows)
        axis.text(
            1.01, place, verdict_cell(rows) if why is None else _shortened(why), va="center",
            fontsize=9, style="normal" if why is None else "italic",
            transform=axis.get_yaxis_transform(),
        )  # fmt: skip
    axis.set_yticks(list(places), list(panel.values), fontsize=9)
    axis.set_ylim(max(places) + 0.6, min(places) - 0.6)
    axis.set_ylabel(panel.parameter)
    unit = " / ".join(metrics) or "the verdict's metric"
    axis.set_xlabel(f"leakage: {unit} above the image's best control", fontsize=9)
    axis.tick_params(axis="x", labelsize=9)
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _shortened(text: str, width: int = 34) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
