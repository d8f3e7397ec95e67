"""Labels of a binary cross-entropy: one number in [0, 1] per output of the network.

They come from classes (one output per class, and a single one for two classes) or from a CSV file.
"""

import csv
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.origins import file_below
from train.request import Request
from utils.errors import InputError, naming
from utils.files import printable
from utils.memory import require_memory

#: How many times its size the lines of a CSV file take in memory, at most about.
CSV_GROWTH = 20


def output_count(num_classes: int, request: Request) -> int:
    """Return the number K of outputs for a data set of so many classes.

    Under cross-entropy one per class. Under binary cross-entropy too, but two classes, also of
    `distinct_labels`, make one output.
    """
    if request.loss == "cross-entropy":
        return num_classes
    classes = request.distinct_labels if request.distinct_labels == 2 else num_classes
    return 1 if classes <= 2 else num_classes


def label_vectors(y: Tensor, outputs: int) -> Tensor:
    """Turn class indices (B,) into label vectors (B, outputs).

    One-hot vectors; for one output 0 and 1, the lower class of two in the batch being 0.
    """
    if outputs > 1:
        return torch.nn.functional.one_hot(y.long(), outputs).float()
    lowest = 0 if int(y.max()) <= 1 else int(y.min())
    return (y > lowest).float()[:, None]


def label_keys(labels: Tensor | Sequence) -> list[Hashable]:
    """Return every image's label as something that can be counted: an int, or a tuple of floats."""
    rows = labels.tolist() if isinstance(labels, Tensor) else labels
    return [tuple(row) if isinstance(row, list | tuple) else int(row) for row in rows]


def shown_labels(y: Tensor) -> list:
    """Return the labels of a batch as they are listed: class indices, or the vectors' numbers."""
    if y.dim() == 1:
        return y.tolist()
    return [" ".join(f"{value:g}" for value in row) for row in y.tolist()]


def classes_of(y: Tensor) -> Tensor:
    """Return the classes (B,) that `label_vectors` (B, K) are made of, up to their numbering."""
    return y.argmax(1) if y.shape[1] > 1 else y[:, 0].long()


@dataclass(frozen=True)
class LabelFile:
    """Holds what a CSV file says of images, as `utils.image_files` does of a folder."""

    #: Path of every image.
    paths: list[str]
    #: Label vector of every image.
    labels: list[tuple[float, ...]]
    #: Name of every output.
    classes: list[str]
    #: What is to be said of the files; nothing.
    notes: tuple[str, ...] = ()


def read_label_file(path: str, root: str) -> LabelFile:
    """Read a CSV file with a header `file,class,class,…` and one row per image.

    The first column is the image's path below the folder `root`, the others are numbers in [0, 1],
    as a rule 0 and 1.

    Raises InputError, without the name of the CSV file, for a file that cannot be read, and, with
    the line, for images that are missing or come twice and for values that are no such numbers.
    """
    if not os.path.isfile(path):  # a named pipe would be waited for
        raise InputError("no readable CSV file (no such file)")
    try:
        require_memory(
            CSV_GROWTH * os.path.getsize(path), "its lines", "take a machine with more memory"
        )
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"no readable CSV file ({error})") from error
    if len(rows) < 2 or len(rows[0][1]) < 2:
        raise InputError("needs a header line `file,class,…` and a line per image")
    classes = rows[0][1][1:]
    found: dict[str, tuple[float, ...]] = {}
    for number, (name, *values) in rows[1:]:
        with naming(f"line {number}"):
            image = file_below(root, name)
        if not os.path.isfile(image):
            raise InputError(f"line {number}: {root} holds no file {printable(name[:200])}")
        if image in found:
            raise InputError(f"line {number}: {printable(name[:200])} comes twice")
        if len(values) != len(classes):
            raise InputError(f"line {number}: {len(values)} labels for {len(classes)} classes")
        found[image] = tuple(_label(value, number) for value in values)
    return LabelFile(list(found), list(found.values()), classes)


def _label(text: str, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        shown = printable(text[:40])
        raise InputError(f"line {line}: '{shown}' is no label; give 0, 1 or a number between")
    return value
