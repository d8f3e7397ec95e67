"""Prints the tables of docs/layerwise.md from the rows of benchmarks/layerwise.py, draws the noise.

python -m benchmarks.layerwise_tables docs/rows/layerwise.csv --picture FILE
"""

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.pictures import save_figure

#: What tells cases apart; the rest of a row was measured.
SETTING = (
    "part",
    "arch",
    "size",
    "batch",
    "index",
    "train_mode",
    "trained",
    "head",
    "noise",
    "level",
)
#: Kinds of noise that are drawn at a level of their own: the type rounds by that much.
ROUNDING = {"none": 6e-8, "float16": 2.8e-4, "bfloat16": 2.3e-3}
#: Markers and names of all kinds in the picture.
KINDS = {
    "relative": ("o-", "noise"),
    "none": ("s", "float32, no noise"),
    "float16": ("^", "float16"),
    "bfloat16": ("v", "bfloat16"),
    "per-sample": ("o-", "noise after clipping"),
}
#: Panels of the picture, side by side: share of the width, kinds, and what the axis shows.
PANELS = (
    (2, ("relative", "none", "float16", "bfloat16"), "standard deviation / tensor's rms"),
    (1, ("per-sample",), "standard deviation per entry,\nevery image's gradient clipped to norm 1"),
)
#: Column → what it is called in the picture, and its colour.
CURVES = {"psnr": ("layerwise", "C0"), "matching_psnr": ("matching, equal time", "C1")}


def groups(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    """Put the rows that differ in the seed alone together."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in SETTING), []).append(row)
    return found


def spread(rows: Sequence[dict], name: str, digits: int = 1) -> str:
    """Write the mean of a figure over seeds, with the lowest and highest of several."""
    values = [float(row[name]) for row in rows if row[name] != ""]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--picture", type=Path, help="where to draw PSNR against noise")
    args = parser.parse_args()
    with args.rows.open() as file:
        rows = [*csv.DictReader(file)]
    header = ["network", "px", "B", "mode", "weights, head", "noise", "seeds", "certified",
              "deepest", "PSNR dB", "SSIM", "other gradient", "decoder only", "mean colour",
              "matching", "CPU s"]  # fmt: skip
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for setting, same in groups(rows).items():
        of = dict(zip(SETTING, setting, strict=True))
        weights = "trained" if of["trained"] == "True" else "random"
        noise = of["noise"] if of["noise"] in ROUNDING else f"{of['noise']} {float(of['level']):g}"
        certified = ", ".join(f"{row['certified']}/{row['tensors']}" for row in same)
        deepest = ", ".join(dict.fromkeys(row["deepest"] or "none" for row in same))
        cells = [
            of["arch"], of["size"], of["batch"], "train" if of["train_mode"] == "True" else "eval",
            f"{weights}, {of['head']}", noise, len(same), certified, deepest,
            spread(same, "psnr"), spread(same, "ssim", 3), spread(same, "other_gradient_psnr"),
            spread(same, "decoder_only_psnr"), spread(same, "mean_colour_psnr"),
            spread(same, "matching_psnr"), spread(same, "cpu_seconds", 0),
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")
    if args.picture:
        draw_noise(rows, args.picture)


def draw_noise(rows: Sequence[dict], path: Path) -> None:
    """Draw PSNR and the share of certified tensors against the noise, in eval mode.

    Noise relative to each tensor's root mean square, with the rounding of types at its size, and
    noise after per-sample clipping have a panel each. Of all rows those of the parts "noise" and
    "matching" count; without any, a line says so and nothing is drawn.
    """
    drawn = [
        row for row in rows if row["part"] in ("noise", "matching") and row["train_mode"] == "False"
    ]
    if not drawn:
        print("no picture: there are no rows of the parts noise and matching in eval mode")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {row["noise"] for row in drawn}
    panels = [panel for panel in PANELS if found & {*panel[1]}]
    figure, axes = pyplot.subplots(
        2, len(panels), figsize=(9, 6), sharex="col", sharey="row", squeeze=False,
        width_ratios=[width for width, *_ in panels], layout="constrained",
    )  # fmt: skip
    most = max(1.0, *(float(row["certified"]) for row in drawn))
    colour = statistics.mean(float(row["mean_colour_psnr"]) for row in drawn)
    for (above, below), (_, kinds, unit) in zip(axes.T, panels, strict=True):
        for kind in kinds:
            _draw_kind(above, below, kind, [row for row in drawn if row["noise"] == kind], most)
        above.axhline(colour, color="grey", ls=":", label="mean colours")
        below.set(xlabel=f"noise: {unit}", xscale="log", ylim=(-5, 105))
    axes[0, 0].set(ylabel="mean PSNR in dB")
    axes[1, 0].set(ylabel=f"certified tensors in % of {most:.0f}")
    axes[0, 0].legend()
    axes[1, 0].legend()
    save_figure(figure, path)


def _draw_kind(above: Any, below: Any, kind: str, rows: Sequence[dict], most: float) -> None:
    """Draw the rows of one kind of noise: PSNR above, share of certified tensors below."""
    if not rows:
        return
    rows = sorted(rows, key=lambda row: float(row["level"]))
    marker, name = KINDS[kind]
    levels = [float(row["level"]) or ROUNDING[kind] for row in rows]
    for column, (curve, colour) in CURVES.items():
        shown = [(x, row[column]) for x, row in zip(levels, rows, strict=True) if row[column] != ""]
        above.plot(
            [x for x, _ in shown], [float(value) for _, value in shown], marker, color=colour,
            label=curve if marker == "o-" and shown else None,
        )  # fmt: skip
    below.plot(
        levels, [100 * float(row["certified"]) / most for row in rows], marker, color="C0",
        label=name,
    )  # fmt: skip


if __name__ == "__main__":
    main()
