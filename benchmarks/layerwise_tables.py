"""Prints the tables of docs/layerwise.md from the rows of benchmarks/layerwise.py, draws pictures.

python -m benchmarks.layerwise_tables docs/rows/layerwise.csv --picture FILE
python -m benchmarks.layerwise_tables docs/rows/layerwise_large.csv --curve FILE
"""

import argparse
import csv
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.layerwise_curve import draw_curve
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
    "classes_used",
)
#: Parts that share a table.
TABLES = (("eval", "crops", "train", "trained", "64", "cifar"), ("networks",),
          ("matching", "noise"), ("224", "train-large", "resnet50"), ("repeated",),
          ("curve",))  # fmt: skip
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
        found.setdefault(tuple(row.get(name, "") for name in SETTING), []).append(row)
    return found


def mean(rows: Sequence[dict], name: str, digits: int = 1) -> str:
    """Write the mean of a figure over seeds."""
    values = [float(row[name]) for row in rows if row[name] != ""]
    return f"{statistics.mean(values):.{digits}f}" if values else "–"


def spread(rows: Sequence[dict], name: str, digits: int = 1) -> str:
    """Write the mean of a figure over seeds, with the lowest and highest of several."""
    values = [float(row[name]) for row in rows if row[name] != ""]
    if len(values) < 2:
        return mean(rows, name, digits)
    return f"{mean(rows, name, digits)} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def brief(rows: Sequence[dict], name: str, digits: int = 2) -> str:
    """Write the mean of a figure over seeds, with the lowest and highest where they differ."""
    differ = len({row[name] for row in rows if row[name] != ""}) > 1
    return (spread if differ else mean)(rows, name, digits)


def certified(rows: Sequence[dict]) -> str:
    """Write how many tensors are certified, or up to which, of cases that differ in the seed."""
    rows = [row for row in rows if row["psnr"] != ""]
    if not rows:
        return "skipped"
    reached = Counter(row["deepest"] or "nothing" for row in rows)
    share = [f"{row['certified']}/{row['tensors']}" for row in rows]
    if len(set(share)) == 1 and all(row["certified"] == row["tensors"] for row in rows):
        return f"{share[0]}, to {rows[0]['deepest']}"
    if len(reached) == 1:
        return f"to {rows[0]['deepest']}" if rows[0]["deepest"] else "nothing"
    return ", ".join(f"to {name} ({count})" for name, count in reached.items())


def network(row: dict) -> str:
    """Write what was attacked."""
    parts = [row["arch"], "train" if row["train_mode"] == "True" else "eval"]
    if row["trained"] == "True":
        parts.append(f"trained, {'its own' if row['head'] == 'keep' else 'fresh'} head")
    if row["index"] != "0":
        parts.append(f"batch {row['index']}")
    if row["noise"] != "none":
        level = float(row["level"])
        parts.append(f"{row['noise']} {level:g}" if level else row["noise"])
    return ", ".join(parts)


def of_all(rows: Sequence[dict], name: str) -> str:
    """Write for how many of all seeds' images something holds; a dash where nobody counted."""
    counted = [row for row in rows if row[name] != ""]
    images = sum(int(row["batch"]) for row in counted)
    return f"{sum(int(row[name]) for row in counted)}/{images}" if counted else "–"


def labels_right(rows: Sequence[dict]) -> str:
    """Write how many labels were right, and whether the gradient gave them."""
    read = {row["labels_read"] for row in rows if row["psnr"] != ""}
    how = {("True",): "read", ("False",): "given"}.get(tuple(read), "some read")
    return f"{of_all(rows, 'labels_right')}, {how}" if read else "–"


#: A table's column → what writes it, of rows that differ in the seed.
COLUMNS: dict[str, Callable[[Sequence[dict]], str]] = {
    "network, mode": lambda same: network(same[0]),
    "px": lambda same: same[0]["size"],
    "B": lambda same: same[0]["batch"],
    "classes": lambda same: brief(same, "labels", 0),
    "seeds": lambda same: str(len(same)),
    "certified": certified,
    "numbers / image's": lambda same: brief(same, "share"),
    "pixels determined": lambda same: brief(same, "pixels"),
    "PSNR dB": lambda same: spread(same, "psnr"),
    "SSIM": lambda same: mean(same, "ssim", 3),
    "identified": lambda same: of_all(same, "identified"),
    "in its photograph": lambda same: of_all(same, "identified_same"),
    "labels right": labels_right,
    "matching": lambda same: spread(same, "matching_psnr"),
    "matching identified": lambda same: of_all(same, "matching_identified"),
    "other gradient": lambda same: mean(same, "other_gradient_psnr"),
    "decoder only": lambda same: mean(same, "decoder_only_psnr"),
    "mean colour": lambda same: mean(same, "mean_colour_psnr"),
    "CPU s": lambda same: spread(same, "cpu_seconds", 0),
}
#: Columns of tables of layerwise_large.csv alone.
LARGE = ("classes", "numbers / image's", "pixels determined", "identified", "in its photograph",
         "labels right", "matching identified")  # fmt: skip


def markdown(rows: Sequence[dict]) -> str:
    """Write one table, a line per case over its seeds; columns of dashes alone are left out."""
    written = [
        (name, [write(same) for same in groups(rows).values()])
        for name, write in COLUMNS.items()
        if name not in LARGE or "identified" in rows[0]
    ]
    written = [(name, cells) for name, cells in written if {*cells} != {"–"}]
    lines = [[name for name, _ in written], ["---"] * len(written)]
    lines += [[*line] for line in zip(*(cells for _, cells in written), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--picture", type=Path, help="where to draw PSNR against noise")
    parser.add_argument("--curve", type=Path, help="where to draw the curve over batch sizes")
    args = parser.parse_args()
    with args.rows.open() as file:
        rows = [*csv.DictReader(file)]
    for parts in TABLES:
        chosen = [row for row in rows if row["part"] in parts]
        if chosen and "number" in chosen[0]:  # parts may have been run in any order
            chosen.sort(key=lambda row: (parts.index(row["part"]), int(row["number"])))
        if chosen:
            print(markdown(chosen) + "\n")
    if args.picture:
        draw_noise(rows, args.picture)
    if args.curve:
        draw_curve(rows, args.curve)


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
