"""The picture of a sweep: how near the images come, against the defence, beside the controls."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inversion.audit.sweep.row import Row
from inversion.audit.sweep.table import verdict_cell
from inversion.audit.verdict import NOT_SHOWN
from utils.files import whole_file

#: Colours that stay apart for colour-blind eyes (Okabe & Ito): attack, identified images, controls.
ATTACK, IDENTIFIED, CONTROLS = "#0072B2", "#D55E00", "#999999"
#: Smallest ratio of the highest to the lowest value that gets a logarithmic axis.
LOGARITHMIC = 5


def save_sweep(
    parameter: str, values: Sequence[str], rows: Sequence[Row], path: str | Path
) -> None:
    """Plot every image's similarity against the value of the swept parameter.

    values: in order; those without a row that is done are left out. The band spans the best
    controls of all images of a value, a line is their mean. SSIM is drawn, or PSNR of images that
    are too small for it. Numbers that span a wide range have a logarithmic axis, on which 0 and
    "none" stand apart on the left.
    """
    done = {value: [row for row in rows if row.value == value and row.reason is None]
            for value in values}  # fmt: skip
    shown = [value for value in values if done[value]]
    every = [v for value in shown for row in done[value] for v in row.scores["ssim"]]
    metric = "psnr" if any(math.isnan(v) for v in every) else "ssim"
    places, split = positions(shown)
    figure = Figure(figsize=(_width(places), 4.4), layout="constrained")
    axis = figure.add_subplot()
    connected = split is not None
    best = [[v for row in done[value] for v in row.controls[metric]] for value in shown]
    _draw_controls(axis, places, best, connected=connected)
    _draw_attacks(axis, places, [done[value] for value in shown], metric, connected=connected)
    if split:
        axis.axvline(split, color="black", linewidth=0.8, linestyle=":")
    _label(axis, parameter, places, [f"{_wrapped(v)}\n{_short(done[v])}" for v in shown], metric)
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


def _width(places: Sequence[float]) -> float:
    """Return a width in inches at which the labels of neighbours do not meet."""
    gaps = np.diff(sorted(places))
    span = 1.0 if not len(gaps) else (max(places) - min(places)) / max(gaps.min(), 0.25)
    return min(16.0, max(7.0, 2.6 + 1.15 * span))


def _draw_controls(
    axis: Axes, places: Sequence[float], best: Sequence[Sequence[float]], *, connected: bool
) -> None:
    """Draw where the best controls of all images of a value lie, and their mean."""
    for i, (place, values) in enumerate(zip(places, best, strict=True)):
        if not values:
            continue
        half = 0.36
        axis.fill_between(
            [place - half, place + half], min(values), max(values), color=CONTROLS, alpha=0.3,
            linewidth=0, label="best control of each image: range, mean" if not i else None,
        )  # fmt: skip
        if not connected:
            axis.hlines(np.mean(values), place - half, place + half, color=CONTROLS, linewidth=1.5)
    if connected:
        order = np.argsort(places)
        means = [np.mean(best[i]) if best[i] else math.nan for i in order]
        axis.plot(np.array(places)[order], means, color=CONTROLS, linewidth=1.5, linestyle="--")


def _draw_attacks(
    axis: Axes, places: Sequence[float], rows: Sequence[Sequence[Row]], metric: str, *,
    connected: bool,
) -> None:  # fmt: skip
    """Draw every image as a dot, those that are identified one by one as diamonds, and the mean."""
    dots: dict[bool, tuple[list[float], list[float]]] = {False: ([], []), True: ([], [])}
    means = []
    for place, of_value in zip(places, rows, strict=True):
        images = [
            (value, i in row.identified)
            for row in of_value
            for i, value in enumerate(row.scores[metric])
        ]
        means.append(float(np.mean([value for value, _ in images])))
        for k, (value, identified) in enumerate(images):
            x, y = dots[identified]
            x.append(place + 0.22 * ((k + 0.5) / len(images) - 0.5) * 2)
            y.append(value)
    for identified, marker, colour, label in (
        (False, "o", ATTACK, "image"),
        (True, "D", IDENTIFIED, "image, identified among its decoys"),
    ):
        x, y = dots[identified]
        axis.scatter(x, y, s=16, marker=marker, color=colour, alpha=0.75, linewidth=0, label=label)
    order = np.argsort(places)
    if connected:
        axis.plot(np.array(places)[order], np.array(means)[order], color=ATTACK, linewidth=1)
    axis.scatter(places, means, s=260, marker="_", color=ATTACK, linewidth=2.5, label="mean")


def _label(
    axis: Axes, parameter: str, places: Sequence[float], names: Sequence[str], metric: str
) -> None:
    axis.set_xticks(list(places), names, fontsize=8)
    axis.set_xlim(min(places) - 0.6, max(places) + 0.6)
    axis.set_xlabel(f"{parameter}, with the strongest verdict of its batches")
    axis.set_ylabel("SSIM with the true image" if metric == "ssim" else "PSNR in dB")
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False,
        columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip


def _wrapped(value: str, width: int = 15) -> str:
    """Break a defence's name before its amounts where it is long."""
    name, colon, amounts = value.partition(":")
    return value if len(value) <= width or not colon else f"{name}\n{amounts}"


def _short(rows: Sequence[Row]) -> str:
    """Write the verdict cell on two lines, without what all verdicts of leakage share."""
    text = verdict_cell(rows).removeprefix("leakage: ").replace(NOT_SHOWN, "none shown")
    return text.replace(" (", "\n(")
