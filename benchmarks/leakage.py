"""Gathers the results of benchmarks/leakage.sh: rows for docs/rows, tables for docs/results.md.

python -m benchmarks.leakage FOLDER [--rows docs/rows]
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from scipy.stats import spearmanr

from inversion.audit.verdict import IDENTIFIABLE, INCOMPLETE, NOT_SHOWN, RECONSTRUCTION
from utils.console import table
from utils.files import write_csv

#: Figures of an image that are correlated with its scores. The last is the number of images in its
#: batch that share its label.
FIGURES = ("ratio", "information", "norm", "cosine_distance", "confidence", "same label")
CONTROLS = ("mean image", "prior only", "other gradient")
#: Verdict → one word for the table.
WORDS = {RECONSTRUCTION: "reconstruction", IDENTIFIABLE: "identifiable", NOT_SHOWN: "none",
         INCOMPLETE: "incomplete"}  # fmt: skip


def information_rows(results: dict[str, dict]) -> list[dict]:
    """Return one row per image: its scores and its gradient information."""
    rows = []
    for name, result in results.items():
        found = re.fullmatch(r"information-(\d+)-(\d+)", name)
        if not found:
            continue
        for i, image in enumerate(result["metrics"]["images"]):
            figures = {figure: result["information"][figure][i] for figure in FIGURES[:-1]}
            labels = result["information"]["label"]
            figures["same label"] = labels.count(labels[i])
            rows.append(
                {"seed": int(found[1]), "batch": int(found[2]), "image": i, "label": labels[i]}
                | figures
                | {"psnr": image["psnr"], "ssim": image["ssim"]}
            )
    return rows


def correlations(rows: list[dict]) -> str:
    """Return a table of Spearman's correlation of every figure with PSNR and SSIM.

    It has one row per network (seed) and figure: over all images, and the mean within batches.
    """
    lines, shares = [], []
    for seed in sorted({row["seed"] for row in rows}):
        of_seed = [row for row in rows if row["seed"] == seed]
        shares.append(f"seed {seed} {100 * between_classes(of_seed):.2f} %")
        batches = [
            [row for row in of_seed if row["batch"] == batch]
            for batch in sorted({row["batch"] for row in of_seed})
        ]
        for figure in FIGURES:
            line = [seed, figure, len(of_seed)]
            for score in ("psnr", "ssim"):
                test = spearmanr([r[figure] for r in of_seed], [r[score] for r in of_seed])
                inner = [
                    spearmanr([r[figure] for r in batch], [r[score] for r in batch]).statistic
                    for batch in batches
                ]
                line += [f"{test.statistic:+.2f} (p {test.pvalue:.2g})"]
                line += [f"{statistics.mean(inner):+.2f}"]
            lines.append(line)
    header = ["seed", "figure", "images", "PSNR", "PSNR in a batch", "SSIM", "SSIM in a batch"]
    return (
        f"{table(header, lines)}\nshare of the ratio's variance that lies between classes: "
        f"{', '.join(shares)}"
    )


def between_classes(rows: list[dict]) -> float:
    """Return the share of the ratio's variance that the classes' means explain."""
    classes = {row["label"] for row in rows}
    of_class = {k: [row["ratio"] for row in rows if row["label"] == k] for k in classes}
    means = [statistics.mean(of_class[row["label"]]) for row in rows]
    return statistics.pvariance(means) / statistics.pvariance([row["ratio"] for row in rows])


def leakage_rows(results: dict[str, dict]) -> list[dict]:
    """Return one row per run: its scores, its controls, and the leakage with its interval."""
    rows = []
    for name, result in results.items():
        scores = result["metrics"]
        if name.startswith("information") or scores["leakage"] is None:
            continue
        protection = result["target"]["protection"] or {}
        row = {"run": re.sub(r"-\d+$", "", name), "seed": result["settings"]["seed"]}
        row |= {key: protection.get(key) for key in ("mode", "clip", "sigma", "epsilon")}
        row |= {"psnr": scores["mean"]["psnr"], "ssim": scores["mean"]["ssim"]}
        row |= {name: scores["controls"][name]["mean"]["psnr"] for name in CONTROLS}
        for metric in ("psnr", "ssim"):
            for key in ("mean", "low", "high"):
                row[f"leakage {metric} {key}"] = scores["leakage"][metric][key]
        for key in ("mean", "low", "high"):
            against_other = scores["controls"]["other gradient"]["leakage"]["psnr"]
            row[f"above other gradient psnr {key}"] = against_other[key]
        above = scores["leakage"]["ssim"]["images"]
        row |= {"images above": sum(v > 0 for v in above), "images": len(above)}
        verdict, ranks = scores["verdict"], scores["identification"]
        row |= {"verdict": verdict["verdict"], "p": verdict["p"]}
        row |= {"ranks p": ranks["p"]}
        row |= {f"paired {key}": scores["paired"][key] for key in ("p", "signs_p")}
        row |= {"images of rank 1": ranks["ranks"].count(1)}
        row |= {"images identified": len(verdict["identified"])}
        for name in CONTROLS:
            row[f"{name} ranks p"] = scores["controls"][name]["identification_p"]
        row["arrived"] = scores["attack"]["arrived"]
        row["attack seconds"] = result["seconds"]
        for name in CONTROLS:
            row[f"{name} seconds"] = result["controls"][name]["seconds"]
        rows.append(row)
    return sorted(rows, key=lambda row: (row["run"], row["seed"]))


def summary(rows: list[dict]) -> str:
    """Return a table of means over the seeds, one row per kind of run."""
    lines = []
    for run in sorted({row["run"] for row in rows}):
        runs = [row for row in rows if row["run"] == run]

        def mean(key: str, runs: list[dict] = runs) -> float:
            return statistics.mean(row[key] for row in runs)

        found = [WORDS[row["verdict"]] for row in runs]
        spread, other = (
            " ".join(f"{row[f'{kind} psnr mean']:+.1f}" for row in runs)
            for kind in ("leakage", "above other gradient")
        )
        lines.append(
            [
                run,
                "none" if runs[0]["epsilon"] is None else f"{runs[0]['epsilon']:.4g}",
                f"{mean('psnr'):.1f}",
                f"{mean('ssim'):.3f}",
                *(f"{mean(name):.1f}" for name in CONTROLS),
                spread,
                other,
                f"{mean('leakage ssim mean'):+.3f}",
                " ".join(found),
                " ".join(f"{row['p']:.2g}" for row in runs),
                " ".join(f"{row['images identified']}/{row['images of rank 1']}" for row in runs),
                " ".join("yes" if row["arrived"] else "no" for row in runs),
                f"{sum(row['images above'] for row in runs)} of {sum(r['images'] for r in runs)}",
                f"{mean('prior only seconds') / mean('attack seconds'):.2f}",
                f"{mean('other gradient seconds') / mean('attack seconds'):.2f}",
            ]
        )
    header = [
        "run", "epsilon", "PSNR", "SSIM", *CONTROLS, "leakage dB by seed",
        "above other gradient dB by seed", "leakage SSIM", "verdicts", "p",
        "identified / rank 1", "arrived", "images above", "time prior only", "time other gradient",
    ]  # fmt: skip
    return table(header, lines)


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder that benchmarks/leakage.sh wrote to")
    parser.add_argument("--rows", type=Path, help="folder for the raw rows")
    args = parser.parse_args()
    results = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted((args.folder / "results" / "exp").glob("*/result.json"))
    }
    for name, rows, text in (
        ("information", information_rows(results), correlations),
        ("verdicts", leakage_rows(results), summary),
    ):
        if not rows:
            continue
        print(text(rows))
        if args.rows:
            values = [list(row.values()) for row in rows]
            write_csv(list(rows[0]), values, args.rows / f"{name}.csv")


if __name__ == "__main__":
    main()
