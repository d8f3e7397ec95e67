"""Gathers results of run.py into one CSV and prints means over seeds.

    python -m benchmarks.collect FOLDER/results/exp/* --csv FILE

The CSV has one row per run. The table has the mean and the sample's standard deviation over the
runs whose folders differ only in the number after the last dash: lenet-best-0, lenet-best-1, ….
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from utils.console import table
from utils.files import write_csv

FIGURES = ("gradient_loss", "psnr", "ssim", "mse", "above_baselines", "mean_colour_psnr")


def figures(result: dict) -> dict[str, float]:
    """Return the figures, by the names in FIGURES, of one result.json."""
    scores = result["metrics"]
    return {
        "gradient_loss": result["losses"]["gradient"],
        **{name: scores["mean"][name] for name in ("psnr", "ssim", "mse")},
        "above_baselines": sum(image["above_baselines"] for image in scores["images"]),
        "mean_colour_psnr": scores["baselines"]["mean colour"]["psnr"],
    }


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders with a result.json")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    rows: list[list] = []
    groups: dict[str, list[dict[str, float]]] = {}
    for folder in args.folders:
        result = json.loads((folder / "result.json").read_text())
        found = figures(result)
        rows.append([folder.name, result["settings"]["seed"], *found.values(),
                     result["iterations"], result["device"]])  # fmt: skip
        groups.setdefault(re.sub(r"-\d+$", "", folder.name), []).append(found)

    def summary(runs: list[dict[str, float]], name: str) -> str:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.4g} ± {spread:.2g}"

    summaries = [
        [name, len(runs), *(summary(runs, figure) for figure in FIGURES)]
        for name, runs in groups.items()
    ]
    print(table(["runs", "count", *FIGURES], summaries))
    if args.csv:
        write_csv(["run", "seed", *FIGURES, "iterations", "device"], rows, args.csv)


if __name__ == "__main__":
    main()
