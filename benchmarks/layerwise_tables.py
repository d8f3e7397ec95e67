"""Prints the tables of docs/layerwise.md from the rows of benchmarks/layerwise.py, draws the noise.

python -m benchmarks.layerwise_tables docs/rows/layerwise.csv --picture FILE
"""

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

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
#: Kinds of noise that are drawn at a level of their own: float16 and bfloat16 round by that much.
ROUNDING = {"none": 6e-8, "float16": 2.8e-4, "bfloat16": 2.3e-3}


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
        draw_noise([row for row in rows if row["part"] in ("noise", "matching")], args.picture)


def draw_noise(rows: Sequence[dict], path: Path) -> None:
    """Draw PSNR and the share of certified tensors against the noise, eval mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(6, 6), sharex=True)
    most = max(float(row["certified"]) for row in rows)
    for kind, marker in (("relative", "o-"), ("none", "s"), ("float16", "^"), ("bfloat16", "v")):
        chosen = [r for r in rows if r["noise"] == kind and r["train_mode"] == "False"]
        x = [float(r["level"]) or ROUNDING.get(kind, 0.0) for r in chosen]
        for name, colour in (("psnr", "C0"), ("matching_psnr", "C1")):
            label = {"psnr": "layerwise", "matching_psnr": "matching, equal time"}[name]
            above.plot(x, [float(r[name]) for r in chosen], marker, color=colour,
                       label=label if kind == "relative" else None)  # fmt: skip
        share = [100 * float(r["certified"]) / most for r in chosen]
        below.plot(x, share, marker, color="C0", label=None if kind == "relative" else kind)
    above.axhline(float(rows[0]["mean_colour_psnr"]), color="grey", ls=":", label="mean colour")
    above.set(ylabel="PSNR dB", xscale="log")
    below.set(ylabel="certified tensors %", xlabel="noise, relative to each tensor's rms")
    above.legend()
    below.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
