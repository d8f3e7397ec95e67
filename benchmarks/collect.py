"""Gather results of run.py into one CSV and print means over runs.

    python -m benchmarks.collect RESULT_FOLDER... --by arch bn_grad --csv FILE

A row a run: its settings named in --by, its seed, losses and mean scores; then a table of mean
and standard deviation (of the sample) over the runs that share the settings.
"""

import argparse
import json
import statistics
from pathlib import Path

from utils.report import table, write_csv

FIGURES = ("gradient_loss", "psnr", "ssim", "mse", "above_baselines", "mean_colour_psnr")


def figures(result: dict) -> dict[str, float]:
    """The figures of one result.json."""
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
    parser.add_argument("--by", nargs="+", default=["checkpoint"], help="settings that differ")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    rows, groups = [], {}
    for folder in args.folders:
        result = json.loads((folder / "result.json").read_text())
        settings = [result["settings"][name] for name in args.by]
        if "checkpoint" in args.by:
            at = args.by.index("checkpoint")
            settings[at] = Path(settings[at]).name.removesuffix("-checkpoint.pth.tar")
        found = figures(result)
        device = result["device"]
        rows.append([*settings, result["settings"]["seed"], *found.values(),
                     result["iterations"], result["seconds"], device])  # fmt: skip
        groups.setdefault(tuple(settings), []).append(found)
    header = [*args.by, "seed", *FIGURES, "iterations", "seconds", "device"]

    def summary(runs, name):
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.4g} ± {spread:.2g}"

    print(
        table(
            [*args.by, "runs", *FIGURES],
            [
                [*settings, len(runs), *(summary(runs, name) for name in FIGURES)]
                for settings, runs in groups.items()
            ],
        )
    )
    if args.csv:
        write_csv(header, rows, args.csv)


if __name__ == "__main__":
    main()
