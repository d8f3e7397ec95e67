"""Where the images of the private batch come from: the list "which file is image 7"."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from utils.errors import InputError
from utils.files import printable
from utils.image_reading import Reading

#: How many images are listed on the screen; the file lists all.
LISTED = 8
#: Columns of the file.
COLUMNS = ("image", "label", "class", "file", "number", "width", "height", "mode", "done")


@dataclass(frozen=True)
class Origin:
    """Says where one image of the private batch comes from."""

    #: Its number in the data set, from 0; None where there is no end.
    number: int | None = None
    #: Name of its class; None where classes have but numbers.
    class_name: str | None = None
    #: Its file as seen from --data; None where there is none.
    file: str | None = None
    #: How the file was read; None where there is none.
    reading: Reading | None = None


def file_below(folder: str, name: str) -> str:
    """Return the path of a file that a list names below a folder.

    Raises InputError for a name that leads out of the folder: no list decides what else is read.
    """
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        raise InputError(f"{printable(name[:200])} leads out of the folder; name files below it")
    return os.path.join(folder, name)


def has_deep_grey(origins: Sequence[Origin]) -> bool:
    """Tell whether a file is grey and stored in integers of more than 8 bits."""
    return any(o.reading is not None and o.reading.mode.startswith("I") for o in origins)


def summary(origins: Sequence[Origin], notes: Sequence[str]) -> list[str]:
    """Return what is said of a batch and its folder: one line per kind of thing that was done.

    notes: what there is to be said of the folder.
    """
    done = Counter(what for origin in origins if origin.reading for what in origin.reading.done)
    lines = [f"--data: {note}" for note in notes]
    for what, count in sorted(done.items()):
        verb = "is" if count == 1 else "are"
        lines.append(f"{count} of {len(origins)} images {verb} {what}")
    return lines


def listing(origins: Sequence[Origin], y: Sequence[int]) -> list[str]:
    """Return the lines that tell which file the first images are; none for images of no file."""
    lines = []
    for image, (origin, label) in enumerate(zip(origins, y, strict=True)):
        if origin.reading is None or origin.file is None:
            continue
        width, height = origin.reading.size
        lines.append(
            f"  image {image}, label {label}: {printable(origin.file)}, {width}×{height} "
            f"{origin.reading.mode}"
        )
    more = len(lines) - LISTED
    return lines[:LISTED] + ([f"  … and {more} more"] if more > 0 else [])


def rows(origins: Sequence[Origin], y: Sequence[int]) -> list[list]:
    """Return the rows of the file, under COLUMNS; names are escaped as they are on the screen."""
    found = []
    for image, (origin, label) in enumerate(zip(origins, y, strict=True)):
        read: list = ["", "", "", ""]
        if origin.reading is not None:
            read = [*origin.reading.size, origin.reading.mode, "; ".join(origin.reading.done)]
        names = [printable(name or "") for name in (origin.class_name, origin.file)]
        number = "" if origin.number is None else origin.number
        found.append([image, label, *names, number, *read])
    return found
