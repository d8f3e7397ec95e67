"""Draws how far a layerwise attack comes, and how similar its images are, against their number."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from utils.pictures import save_figure

#: Colours of the picture's file, which a page shows: few make it small.
COLOURS = 64
#: Marker and colour of every side of the images, in pixels.
SIZES = {"32": ("o", "C0"), "64": ("s", "C1"), "224": ("^", "C3")}
#: What a row has that belongs to the curve, of whatever part: random weights, the first batch.
PLAIN = {"arch": "resnet18", "index": "0", "trained": "False", "head": "normal", "noise": "none",
         "classes_used": "0"}  # fmt: skip
#: Titles of the panels by `train_mode`.
MODES = {"False": "eval mode", "True": "train mode"}


def draw_curve(rows: Sequence[dict], path: Path) -> None:
    """Draw mean PSNR and the depth of the walk against the number of images, per side and mode.

    rows: of layerwise_large.csv; those of PLAIN settings count, means over seeds. Skipped ones are
    crosses at the bottom. The picture is 800 pixels wide. Without rows a line says so and nothing
    is drawn.
    """
    drawn = [row for row in rows if all(row[name] == value for name, value in PLAIN.items())]
    measured = [row for row in drawn if row["psnr"] != ""]
    if not measured:
        print("no picture: there are no measured rows of the curve's settings")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, 2, figsize=(8, 6), sharex=True, sharey="row", layout="constrained"
    )
    for (above, below), (mode, title) in zip(axes.T, MODES.items(), strict=True):
        here = [row for row in drawn if row["train_mode"] == mode]
        for size in SIZES:
            _draw_size(above, below, size, [row for row in here if row["size"] == size])
        _draw_flat(above, [row for row in measured if row["train_mode"] == mode])
        above.set(title=f"{measured[0]['arch']}, {title}")
        below.set(xlabel="images in the batch", xscale="log")
    counts = sorted({int(row["batch"]) for row in drawn})
    axes[0, 0].set_xticks(counts, counts)
    axes[0, 0].minorticks_off()
    axes[0, 0].set(ylabel="mean PSNR in dB")
    most = max(int(row["depth_of"]) for row in measured)
    axes[1, 0].set(
        ylabel=f"deepest certified tensor\n(0: none, 1: features, {most}: the image)",
        ylim=(-1, most + 1), yticks=range(0, most + 1, max(1, most // 6)),
    )  # fmt: skip
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 1].legend(fontsize=9)
    save_figure(figure, path)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(COLOURS)
    few.save(path, optimize=True)


def _draw_size(above: Any, below: Any, size: str, rows: Sequence[dict]) -> None:
    """Draw the rows of one side: PSNR above, depth below, crosses for skipped ones."""
    marker, colour = SIZES[size]
    for axis, column in ((above, "psnr"), (below, "depth")):
        points = means(rows, column)
        axis.plot(
            [x for x, _ in points], [y for _, y in points], f"{marker}-", color=colour,
            markersize=6, label=f"{size} px" if points else None,
        )  # fmt: skip
    reached = {count for count, _ in means(rows, "depth")}
    skipped = sorted({int(row["batch"]) for row in rows} - reached)
    below.plot(skipped, [-0.5] * len(skipped), "x", color=colour)


def _draw_flat(above: Any, rows: Sequence[dict]) -> None:
    """Draw what images of one colour each have, the mean over all sides."""
    points = means(rows, "mean_colour_psnr")
    label = "mean colours" if points else None
    above.plot([x for x, _ in points], [y for _, y in points], ":", color="grey", label=label)


def means(rows: Sequence[dict], column: str) -> list[tuple[int, float]]:
    """Return (number of images, mean of a column) where it is not empty, the fewest first."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row[column] != "":
            found.setdefault(int(row["batch"]), []).append(float(row[column]))
    return [(count, statistics.mean(found[count])) for count in sorted(found)]
