"""The columns and files that benchmarks/layerwise.py writes its rows to."""

import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.layerwise_cases import LARGE

#: Columns of layerwise.csv, and the first ones of layerwise_large.csv.
SMALL = (
    "part", "arch", "size", "batch", "seed", "index", "train_mode", "trained", "head", "noise",
    "level", "matching", "certified", "tensors", "deepest", "method", "psnr", "ssim", "lowest_psnr",
    "other_gradient_psnr", "other_gradient_ssim", "decoder_only_psnr", "decoder_only_ssim",
    "mean_image_psnr", "mean_image_ssim", "grey_psnr", "grey_ssim", "mean_colour_psnr",
    "mean_colour_ssim", "matching_psnr", "matching_ssim", "cpu_seconds", "stopped", "device",
)  # fmt: skip
#: Further columns of layerwise_large.csv, and what they mean.
FURTHER = {
    "number": "number of the case in its part, as --only takes it",
    "classes_used": "classes whose labels repeat in turn; 0 where the batch's number draws them",
    "control": "whether the attack ran on the gradient of other images too",
    "labels": "distinct labels in the batch",
    "labels_read": "whether the walk read the labels from the gradient",
    "labels_right": "true labels among those read, or else among those given, of B",
    "source": "deepest certified tensor, which the images were made of",
    "depth": "its place, from the head's features, 1, towards the image; 0 for none",
    "depth_of": "depth of the image itself: tensors that convolutions and linear layers take",
    "share": "numbers per image of `source` over the image's own",
    "pixels": "share of pixels determined: 1 where the image was solved for; behind a pooling the "
    "share of images that reproduce its output, where that has enough numbers; else 0",
    "identified": "images that are more similar (SSIM) to their reconstruction than 99 crops of "
    "the other photographs are",
    "identified_ranks": "place of every image among these, 1 being the first, in the batch's order",
    "identified_same": "the same among 99 crops of its own photograph",
    "identified_same_ranks": "places among these",
    "matching_identified": "`identified` of the images that matching gave; empty without it",
    "matching_identified_ranks": "as above",
    "matching_identified_same": "as above",
    "matching_identified_same_ranks": "as above",
    "peak_mib": "largest memory of the process until then, earlier cases included",
}


def files(part: str) -> tuple[str, str]:
    """Return the names of the files for a part's rows: of its cases, and of their tensors."""
    stem = "layerwise_large" if part in LARGE else "layerwise"
    return f"{stem}.csv", f"{stem}_tensors.csv"


def append(rows: Sequence[dict], path: Path) -> None:
    """Append rows to a CSV, with a header where the file is new.

    Raises SystemExit, and writes nothing, where the file has other columns.
    """
    header = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            there = next(csv.reader(file), [])
        if there != header:
            apart = ", ".join(sorted(set(there) ^ set(header))) or "their order"
            raise SystemExit(f"{path}: has other columns than these rows ({apart}); move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def write(part: str, number: int, row: dict, tensors: Sequence[dict], folder: Path) -> None:
    """Append the row of a case, and those of its tensors, to the files of its part."""
    row = {"part": part, "number": number, **row}
    names = (*SMALL, *FURTHER) if part in LARGE else SMALL
    of_cases, of_tensors = files(part)
    append([{name: row.get(name, "") for name in names}], folder / of_cases)
    if part not in LARGE:
        tensors = [{k: v for k, v in row.items() if k != "classes_used"} for row in tensors]
    if tensors:
        append(tensors, folder / of_tensors)
