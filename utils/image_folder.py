"""Lists a folder with one subfolder per class, whatever else lies in it."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.errors import InputError
from utils.files import printable
from utils.image_reading import opened

#: Ends of the names of files that are read as images; upper case counts as lower case.
# fmt: off
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif",
)
#: Ends of the names of images that are not read: to leave them out would change the data set.
UNREAD_ENDINGS = (
    ".dcm", ".dicom", ".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".heic", ".heif", ".jxl", ".svg",
    ".eps", ".psd", ".exr", ".hdr", ".fits", ".tga", ".ico", ".svs", ".ndpi", ".dng", ".nef",
    ".cr2", ".cr3", ".arw", ".raw", ".npy",
)
# fmt: on
#: What file managers and archives leave behind, in lower case; names that begin with a dot too.
DEBRIS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir")
#: How many names a line gives as examples.
SHOWN = 4


@dataclass(frozen=True)
class ImageFolder:
    """Holds what a folder with one subfolder per class contains."""

    #: Path of every image: class by class, sorted by folder and name.
    paths: list[str]
    #: Class of every image, from 0.
    labels: list[int]
    #: Names of the classes, sorted; they are the names of the subfolders.
    classes: list[str]
    #: One line per kind of thing that was skipped, followed or merged.
    notes: tuple[str, ...]


@dataclass
class _Found:
    """Collects what a walk through the folder meets."""

    root: str
    #: (path, class) of every image.
    images: list[tuple[str, int]] = field(default_factory=list)
    #: What is said at the end → names that it is said of.
    said: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    #: Why a file is refused.
    refused: list[str] = field(default_factory=list)
    #: Real path of every folder that was read → its path here and its class.
    folders: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: Whether a link was followed.
    has_links: bool = False

    def name(self, path: str) -> str:
        """Return a path as seen from the root, fit to be printed."""
        return printable(os.path.relpath(path, self.root))


def image_folder(root: str) -> ImageFolder:
    """List a folder with one subfolder per class; deeper subfolders belong to their class.

    Links are followed, except those that lead back up. Hidden files, what file managers leave
    behind, and files that are no images are skipped, and `notes` says so.

    Raises InputError for a missing folder, no class, a class without images, two class folders
    whose names look the same, a file or folder that two classes share by a link, a folder that
    cannot be read, an image file that is none or a link to nothing, and for images of kinds that
    are not read.
    """
    if not os.path.isdir(root):
        raise InputError("no such folder; give one with one subfolder per class")
    found = _Found(root)
    classes = _classes(found)
    found.folders[os.path.realpath(root)] = root, -1
    for label, name in enumerate(classes):
        _walk(os.path.join(root, name), label, (os.path.realpath(root),), found)
    if found.refused:
        more = len(found.refused) - 1
        raise InputError(found.refused[0] + (f" (and {more} more such files)" if more else ""))
    found.images.sort(key=lambda image: (image[1], *os.path.split(image[0])))
    images = _once(found) if found.has_links else found.images
    with_images = {label for _, label in images}
    empty = [printable(name) for label, name in enumerate(classes) if label not in with_images]
    if empty:
        said = "".join(f"; {note}" for note in _notes(found))
        raise InputError(
            f"needs one subfolder per class with images in each: no images in {_some(empty)}{said}"
        )
    return ImageFolder(
        [path for path, _ in images], [label for _, label in images], classes, _notes(found)
    )


def _classes(found: _Found) -> list[str]:
    """Return the sorted names of the class folders."""
    classes = []
    for entry in _entries(found.root, found):
        if entry.is_dir():
            classes.append(entry.name)
        elif _ends(entry.name, IMAGE_ENDINGS):
            found.said["images beside the class folders, not read"].append(entry.name)
        else:
            found.said["other files, not read"].append(entry.name)
    if not classes:
        beside = found.said["images beside the class folders, not read"]
        raise InputError(
            "needs one subfolder per class with images in each: it has no subfolder"
            + (f", but {len(beside)} images" if beside else "")
        )
    forms: dict[str, str] = {}
    for name in classes:
        other = forms.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise InputError(
                f"two class folders are both called {printable(name)}, in different forms of "
                f"Unicode ({ascii(other)}, {ascii(name)}); rename one or merge them"
            )
    return classes


def _entries(folder: str, found: _Found) -> list[os.DirEntry]:
    """Return what lies in a folder, sorted by name, without what is hidden or left behind."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{found.name(folder)} cannot be read: {error.strerror}") from error
    kept = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in DEBRIS:
            found.said["hidden files, or files of file managers, skipped"].append(
                found.name(entry.path)
            )
        else:
            kept.append(entry)
    return kept


def _walk(folder: str, label: int, above: tuple[str, ...], found: _Found) -> None:
    """Collect the images below a folder of a class; above: real paths of those that led here."""
    real = os.path.realpath(folder)
    if any(path == real or path.startswith(os.path.join(real, "")) for path in above):
        found.said["links that lead back up, not followed"].append(found.name(folder))
        return
    if real in found.folders:
        other, its_label = found.folders[real]
        if its_label != label:
            raise InputError(
                f"{found.name(other)} and {found.name(folder)} are the same folder by a link, in "
                "two classes; remove one"
            )
        found.said["second links to the same folder, skipped"].append(found.name(folder))
        return
    found.folders[real] = folder, label
    _say_link(folder, found)
    inner = []
    for entry in _entries(folder, found):
        if os.path.isdir(entry.path):
            inner.append(entry.path)
        elif _is_image(entry, found):
            found.images.append((entry.path, label))
            _say_link(entry.path, found)
            if len(above) > 1:
                found.said["images in subfolders of a class, read as of that class"].append(
                    found.name(folder)
                )
    for path in inner:
        _walk(path, label, (*above, real), found)


def _say_link(path: str, found: _Found) -> None:
    """Note where a file or folder that is read is a link, and whether it leads outside."""
    if not os.path.islink(path):
        return
    found.has_links = True
    if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(found.root), "")):
        found.said["links to outside the folder, followed"].append(found.name(path))


def _is_image(entry: os.DirEntry, found: _Found) -> bool:
    """Tell whether a file is to be read as an image; note what is not, and what is refused."""
    name, is_file = found.name(entry.path), os.path.isfile(entry.path)
    if _ends(entry.name, IMAGE_ENDINGS):
        if is_file:
            return True
        what = "a link to nothing" if entry.is_symlink() else "no regular file"
        found.refused.append(f"{name} is {what}; remove it")
    elif _ends(entry.name, UNREAD_ENDINGS):
        found.refused.append(
            f"{name} is an image of a kind that is not read; convert it to PNG or TIFF, or remove "
            "it"
        )
    else:
        kind = _kind_inside(entry.path) if is_file else None
        if kind is None:
            found.said["other files, not read"].append(name)
        else:
            found.refused.append(
                f"{name} holds {kind}, but its name ends as that of no image; rename it (DICOM: "
                "convert it), or remove it"
            )
    return False


def _kind_inside(path: str) -> str | None:
    """Return the format of a file with the name of no image, or None where it holds none."""
    try:
        with open(path, "rb") as file:
            if file.read(132)[128:] == b"DICM":
                return "DICOM"
        with opened(path) as image:
            return image.format
    except (InputError, OSError):
        return None


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings)


def _once(found: _Found) -> list[tuple[str, int]]:
    """Leave out images that links show a second time; raise InputError where two classes do."""
    first: dict[str, tuple[str, int]] = {}
    for path, label in found.images:
        other, its_label = first.setdefault(os.path.realpath(path), (path, label))
        if its_label != label:
            raise InputError(
                f"{found.name(other)} and {found.name(path)} are the same file by a link, in two "
                "classes; remove one"
            )
        if other != path:
            found.said["second links to the same file, skipped"].append(found.name(path))
    return list(first.values())


def _notes(found: _Found) -> tuple[str, ...]:
    """Return one line per kind of thing that is said."""
    return tuple(
        f"{what}: {len(names)} ({_some(list(dict.fromkeys(names)))})"
        for what, names in sorted(found.said.items())
        if names
    )


def _some(names: Sequence[str]) -> str:
    """List the first names, and count the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f", … and {more} more" if more > 0 else "")
