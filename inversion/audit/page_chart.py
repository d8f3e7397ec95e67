"""Draws the report's chart of leakage per image as SVG that takes its colours from the page."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from inversion.audit.verdict import CLEAR_DIFFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours of the drawing → names of the page's colours, which differ between light and dark.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--bar)",
    "#030303": "var(--band)",
    "#040404": "var(--line)",
    "#050505": "var(--paper)",
}
INK, BAR, BAND, LINE, PAPER = COLOURS
#: Shapes of the attacks beside the one that the verdict rests on.
MARKERS = ("D", "^", "s", "v")
#: Up to so many images each has its number below the axis.
NUMBERED = 32


def leakage_chart(part: Mapping, others: Sequence[Mapping], metric: str, name: str) -> str:
    """Return an SVG of how far each image stands above everything made without the update.

    part: the entry of audit.json's `parts` that the verdict rests on, with `leakage`; others: the
    remaining ones, drawn as small marks. metric: a key of `leakage`, with the numbers of the
    images in it. name: what tells its ids from those of other charts of the page. The band spans
    the controls' means, with the best control at 0. The same input gives the same bytes.
    """
    import matplotlib  # not above: it takes a second
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "hatch.linewidth": 0}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 2.05))
        FigureCanvasSVG(figure)
        figure.subplots_adjust(left=0.06, right=0.995, top=0.86, bottom=0.2)
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        _draw(axes, part, others, metric)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _embedded(stream.getvalue().decode())


def _draw(axes: "Axes", part: Mapping, others: Sequence[Mapping], metric: str) -> None:
    leakage = part["leakage"][metric]
    heights = [_height(value) for value in leakage["images"]]
    count = len(heights)
    lowest = _band(part["controls"], metric)
    axes.axhspan(lowest, 0, facecolor=BAND, edgecolor="none", label="made without the update")
    axes.axhline(0, color=LINE, linewidth=0.8)
    axes.axhline(
        CLEAR_DIFFERENCE[metric], color=INK, linewidth=0.9, linestyle=(0, (4, 3)),
        label="clear on average",
    )  # fmt: skip
    found = set(part["identified"])
    for known, label in ((True, "identified"), (False, "not identified")):
        places = [i for i in range(count) if (i in found) is known]
        axes.bar(
            places, [heights[i] for i in places], width=0.62, edgecolor=BAR, linewidth=1,
            facecolor=BAR if known else PAPER, label=f"image, {label}" if places else None,
        )  # fmt: skip
    for other, marker in zip(others, MARKERS, strict=False):
        values = [_height(value) for value in other["leakage"][metric]["images"]]
        axes.plot(
            range(len(values)), values, linestyle="none", marker=marker, markersize=4.5,
            markerfacecolor=PAPER, markeredgecolor=INK, label=str(other["short"]),
        )  # fmt: skip
    _draw_mean(axes, leakage, count + 0.4)
    axes.set_xlim(-0.7, count + 1.0)
    axes.set_ylabel(f"{metric.upper()} above controls" + (", dB" if metric == "psnr" else ""))
    axes.set_xlabel("number of the image in the batch", labelpad=2)
    shown = range(count) if count <= NUMBERED else range(0, count, math.ceil(count / NUMBERED))
    axes.set_xticks([*shown, count + 0.4], [*map(str, shown), "mean"])
    axes.tick_params(length=2.5)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(LINE)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False, borderpad=0,
        handlelength=1.4, columnspacing=1.2, handletextpad=0.5, fontsize=8.5,
    )  # fmt: skip
    for artist in axes.get_children():
        artist.set_clip_on(False)


def _draw_mean(axes: "Axes", leakage: Mapping, place: float) -> None:
    """Draw the mean with its interval, where it has one, to the right of the images."""
    mean = _height(leakage["mean"])
    ends = [leakage["low"], leakage["high"]]
    if all(end is not None and math.isfinite(end) for end in ends):
        axes.plot([place, place], ends, color=INK, linewidth=1.6, solid_capstyle="butt")
    axes.plot([place], [mean], linestyle="none", marker="o", markersize=5, color=INK)


def _height(value: float | None) -> float:
    """Return what can be drawn of a value: NaN where there is none or it is not finite."""
    return value if value is not None and math.isfinite(value) else math.nan


def _band(controls: Mapping | None, metric: str) -> float:
    """Return how far the mean of the worst control lies below that of the best one, as ≤ 0."""
    means = [_height((control or {}).get(metric)) for control in (controls or {}).values()]
    means = [mean for mean in means if not math.isnan(mean)]
    return min(means) - max(means) if means else 0.0


def _embedded(svg: str) -> str:
    """Return the drawing for a page: without prologue, ids and addresses, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    for element in ("metadata", "style"):
        svg = re.sub(rf"<{element}\b.*?</{element}>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    for drawn, named in COLOURS.items():
        svg = svg.replace(drawn, named)
    return svg
