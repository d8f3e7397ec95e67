"""Data sets of the client: name → shape, class count, normalisation, and how to open it.

A new data set is one `DatasetSpec` in DATASETS and its name in train/request.py. Images are decoded
one by one, only those of the batch asked for.
"""

import math
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils.images
from train.label_vectors import LabelFile, label_vectors, output_count, read_label_file
from train.origins import Origin, file_below
from train.photos import photo_batch
from train.request import (
    PHOTO_NAMES,
    Request,
    check_batch_size,
    check_name,
    check_openable,
    check_request,
)
from utils.errors import InputError, naming, one_line
from utils.files import printable
from utils.image_files import decode_all
from utils.image_folder import ImageFolder, image_folder
from utils.image_reading import ColourError, DepthError, is_grey
from utils.memory import limited_memory, require_memory
from utils.tensor_files import SPARE

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR100_MEAN, CIFAR100_STD = (0.50716, 0.48669, 0.44120), (0.26733, 0.25644, 0.27615)
#: How many numbers a published file may claim per byte of it: they are photographs, and compress by
#: half at most.
MOST_PACKED = 100
GREY_MEAN, GREY_STD = (0.449,), (0.226,)


@dataclass(frozen=True)
class Finite:
    """An opened data set whose images can be counted."""

    spec: "DatasetSpec"
    #: Class of every image, or its label vector.
    labels: Sequence
    #: (indices) → their images (B, C, H, W) in [0, 1], labels, (B,) or (B, K), and where they come
    #: from.
    read: Callable[[Sequence[int]], tuple[Tensor, Tensor, tuple[Origin, ...]]]
    #: What is to be said of the files, one line each.
    notes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class Endless:
    """An opened data set that makes as many different images as are asked for."""

    spec: "DatasetSpec"
    #: (batch size B, number of the batch) → images (B, C, H, W) in [0, 1] and labels (B,).
    draw: Callable[[int, int], tuple[Tensor, Tensor]]
    #: Names of its classes.
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before its files are read."""

    #: (C, H, W) of the images.
    shape: tuple[int, int, int]
    #: Number of classes, that is of the network's outputs; None where it depends on the files, and
    #: the opened set's spec has it.
    num_classes: int | None
    #: Mean of the normalisation, C numbers.
    mean: tuple[float, ...]
    #: Standard deviation of the normalisation, C numbers.
    std: tuple[float, ...]
    #: Opens it for a request; decodes nothing yet.
    open: Callable[[Request, "DatasetSpec"], Finite | Endless]

    @property
    def class_count(self) -> int:
        """Return the number of classes, which every opened data set knows."""
        assert self.num_classes is not None  # _open_folder puts the number in
        return self.num_classes

    @property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Return mean and std as (C, 1, 1) tensors."""
        return tuple(torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))


def named_spec(name: str) -> DatasetSpec:
    """Return the spec of data set `name`; raise InputError for an unknown name."""
    check_name(name)
    return DATASETS[name]


def open_dataset(name: str, request: Request) -> Finite | Endless:
    """Open data set `name`; decodes nothing yet.

    Raises InputError for an unknown name and for missing or broken files.
    """
    check_openable(name, request)
    spec = _requested_spec(name, request)
    source = spec.open(request, spec)
    final = requested_labels(source.spec, request)
    source = replace(source, spec=final)
    if request.loss == "cross-entropy" or isinstance(source, Endless):
        return source  # `read_batch` makes the vectors of an endless set
    return _with_vectors(source)


def dataset_length(name: str, request: Request) -> int | None:
    """Count the images of data set `name`; None where there is no end.

    Raises InputError as `open_dataset` does.
    """
    source = open_dataset(name, request)
    return None if isinstance(source, Endless) else len(source)


def dataset_spec(name: str, request: Request) -> DatasetSpec:
    """Return the spec of data set `name`; its files are opened only where it depends on them.

    Raises InputError as `open_dataset` does.
    """
    check_request(name, request)
    spec = _requested_spec(name, request)
    if spec.num_classes is None:
        return open_dataset(name, request).spec
    return requested_labels(spec, request)


def _requested_spec(name: str, request: Request) -> DatasetSpec:
    spec = named_spec(name)
    if request.sides is not None:
        spec = replace(spec, shape=(spec.shape[0], *request.sides))
    if request.channels == 1 and name == "photos":
        spec = replace(spec, shape=(1, *spec.shape[1:]), mean=GREY_MEAN, std=GREY_STD)
    return spec


def requested_normalisation(spec: DatasetSpec, request: Request) -> DatasetSpec:
    """Return the spec with the normalisation asked for, or its own where none was.

    Raises InputError where the normalisation is not one number per channel.
    """
    if request.mean is None or request.std is None:
        return spec
    if len(request.mean) != spec.shape[0]:
        raise InputError(
            f"--mean: {len(request.mean)} numbers for images of {spec.shape[0]} channels; give "
            "one per channel"
        )
    return replace(spec, mean=request.mean, std=request.std)


def requested_labels(spec: DatasetSpec, request: Request) -> DatasetSpec:
    """Return the spec with the outputs that the loss takes, and the normalisation asked for.

    Raises InputError where the normalisation is not one number per channel, and where the outputs
    asked for are not enough for the labels.
    """
    spec = requested_normalisation(spec, request)
    if spec.num_classes is not None and request.num_classes is not None:
        return replace(spec, num_classes=_wanted_outputs(spec.num_classes, request))
    if spec.num_classes is None or request.labels_csv is not None:
        return spec
    return replace(spec, num_classes=output_count(spec.num_classes, request))


def _wanted_outputs(num_classes: int, request: Request) -> int:
    """Return the outputs asked for; raise InputError unless `num_classes` classes fit them."""
    wanted = request.num_classes
    assert wanted is not None  # the caller has asked
    if request.labels_csv is not None and wanted != num_classes:
        raise InputError(
            f"--num-classes {wanted}: --labels-csv has {num_classes} columns, one per output; "
            "leave it out"
        )
    if wanted < num_classes:
        raise InputError(
            f"--num-classes {wanted}: the data set has {num_classes} classes; give as many or more"
        )
    return wanted


def _with_vectors(source: Finite) -> Finite:
    """Return the data set with label vectors in the place of classes."""
    read, outputs = source.read, source.spec.class_count

    def read_vectors(indices: Sequence[int]) -> tuple[Tensor, Tensor, tuple[Origin, ...]]:
        x, y, origins = read(indices)
        return x, y if y.dim() == 2 else label_vectors(y, outputs), origins

    return replace(source, read=read_vectors)


def normalise(x: Tensor, spec: DatasetSpec) -> Tensor:
    """Normalise images (B, C, H, W) in [0, 1]: (x − mean) / std per channel."""
    return utils.images.normalise(x, *spec.normalisation)


# Image files -------------------------------------------------------------------------------


def _files_source(folder: ImageFolder | LabelFile, request: Request, spec: DatasetSpec) -> Finite:
    channels, height, width = spec.shape
    paths, labels, classes = folder.paths, folder.labels, folder.classes

    def read(indices):
        chosen = [paths[i] for i in indices]
        with naming("--data"):
            try:
                images, readings = decode_all(
                    chosen, channels, (height, width), request.workers, request.bit_depth
                )
            except ColourError as error:
                raise InputError(f"{error}; give --channels 3 to read all in colour") from error
            except DepthError as error:
                raise InputError(
                    f"{error}; give --bit-depth with the bits that the files hold"
                ) from error
        origins = tuple(
            Origin(i, _class_name(labels[i], classes), os.path.relpath(path, request.root), reading)
            for i, path, reading in zip(indices, chosen, readings, strict=True)
        )
        return images, torch.tensor([labels[i] for i in indices]), origins

    return Finite(spec, labels, read, folder.notes)


def _class_name(label: int | Sequence[float], classes: Sequence[str]) -> str:
    """Return the name of a class, or those that a vector of labels holds."""
    if isinstance(label, int):
        return classes[label]
    return " + ".join(name for name, value in zip(classes, label, strict=True) if value)


def _folder_of(request: Request) -> str:
    assert request.root is not None  # check_openable refuses a missing --data
    if not os.path.isdir(request.root):
        raise InputError(
            f"--data {printable(request.root)}: no such folder; give the folder of the data set"
        )
    return request.root


def _class_folders(root: str) -> ImageFolder:
    with naming(f"--data {printable(root)}"):
        return image_folder(root)


def _open_folder(request: Request, spec: DatasetSpec) -> Finite:
    """Open a folder with one subfolder per class, or with a CSV file of labels.

    Its images are grey where the first file of every class is, unless channels are given.
    """
    folder: ImageFolder | LabelFile
    if request.labels_csv is not None:
        with naming(f"--labels-csv {request.labels_csv}"):
            folder = read_label_file(request.labels_csv, _folder_of(request))
        firsts = folder.paths[:1]
    else:
        folder = classes = _class_folders(_folder_of(request))
        firsts = [folder.paths[classes.labels.index(c)] for c in range(len(folder.classes))]
    channels = request.channels
    if channels is None:
        with naming("--data"):
            channels = 1 if all(is_grey(path) for path in firsts) else 3
    spec = replace(spec, shape=(channels, *spec.shape[1:]), num_classes=len(folder.classes))
    if channels == 1:
        spec = replace(spec, mean=GREY_MEAN, std=GREY_STD)
    return _files_source(folder, request, spec)


def _open_imagenet(request: Request, spec: DatasetSpec) -> Finite:
    """Open the class folders in `root/train`, or in `root` itself; classes are sorted by name."""
    root = _folder_of(request)
    inner = os.path.join(root, "train")
    folder = _class_folders(inner if os.path.isdir(inner) else root)
    if len(folder.classes) > spec.class_count:
        raise InputError(
            f"--data {root}: {len(folder.classes)} class folders, imagenet has {spec.class_count}; "
            "give --data-name folder"
        )
    return _files_source(folder, request, spec)


def _open_celeba(request: Request, spec: DatasetSpec) -> Finite:
    """Open `x_train/` with the images and `y_train.txt` with lines "name identity", from 1."""
    root = _folder_of(request)
    images, listing = os.path.join(root, "x_train"), os.path.join(root, "y_train.txt")
    if not (os.path.isdir(images) and os.path.isfile(listing)):
        raise InputError(f"--data {root}: celeba needs a folder x_train and a file y_train.txt")
    paths, labels = [], []
    try:
        with open(listing, errors="replace") as file:
            lines = file.readlines()
    except OSError as error:
        raise InputError(f"--data {listing}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, identity = line.strip().rpartition(" ")
        if not name or not identity.isdecimal() or not 1 <= int(identity) <= spec.class_count:
            raise InputError(
                f"--data {listing}: line {number} is not 'name identity' with an identity "
                f"from 1 to {spec.class_count}"
            )
        with naming(f"--data {listing}: line {number}"):
            paths.append(file_below(images, name.strip()))
        labels.append(int(identity) - 1)
    if not paths:
        raise InputError(f"--data {listing}: lists no image")
    identities = [str(number) for number in range(1, spec.class_count + 1)]
    return _files_source(ImageFolder(paths, labels, identities, ()), request, spec)


# Arrays ------------------------------------------------------------------------------------


#: What numpy's pickles of arrays name, by old and new versions.
ARRAY_NAMES = (
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
    "numpy.dtype",
)  # fmt: skip


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled containers, strings, numbers and numpy arrays; refuses everything else."""

    def find_class(self, module, name):
        """Allow the names that an array is rebuilt from."""
        if f"{module}.{name}" in ARRAY_NAMES:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array or plain value")


def _latin1(text: str, encoding: str) -> bytes:
    """Turn text into bytes as pickles of bytes do, and by no other encoding, which could grow."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes by the encoding {encoding[:20]!r}")
    return text.encode("latin1")


def _array_source(data: np.ndarray, labels: Sequence[int], spec: DatasetSpec) -> Finite:
    """Make a data set of arrays; data: (N, 3, H, W) of uint8."""
    sides = spec.shape[1:]

    def read(indices):
        x = torch.from_numpy(data[indices]).float() / 255
        if x.shape[-2:] != sides:
            from torchvision.transforms.v2.functional import resize  # seconds that only this needs

            x = resize(x, list(sides), antialias=True).clamp(0, 1)
        y = torch.tensor([int(labels[i]) for i in indices])
        return x, y, tuple(Origin(i) for i in indices)

    return Finite(spec, labels, read)


def _open_cifar100(request: Request, spec: DatasetSpec) -> Finite:
    """Open a folder that holds `cifar-100-python/` with the published pickle `train`."""
    root = _folder_of(request)

    def read():
        path = os.path.join(root, "cifar-100-python", "train")
        size = os.path.getsize(path)
        require_memory(4 * size, "its content", "take a machine with more memory")
        with limited_memory(4 * size + SPARE), open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        labels = _published_labels(content["fine_labels"], spec)
        images = _published_images(content["data"], (len(labels), 3072))
        return images.reshape(-1, 3, 32, 32), labels

    data, labels = _read_published(read, root, "cifar-100-python/train")
    return _array_source(data, labels, spec)


def _open_svhn(request: Request, spec: DatasetSpec) -> Finite:
    """Open a folder that holds the published `train_32x32.mat`; digit 0 is class 0."""
    root = _folder_of(request)

    def read():
        from scipy.io import loadmat, whosmat  # a second that only this needs

        path = os.path.join(root, "train_32x32.mat")
        size = os.path.getsize(path)
        with limited_memory(4 * size + SPARE):
            claims = [math.prod(shape) for name, shape, _ in whosmat(path) if name in ("X", "y")]
        claimed = max(claims)
        if claimed > MOST_PACKED * size:
            raise ValueError(f"it claims {claimed:,} numbers in {size:,} bytes")
        require_memory(2 * claimed, "its content", "take a machine with more memory")
        with limited_memory(2 * claimed + 4 * size + SPARE):
            content = loadmat(path, variable_names=("X", "y"))
        labels = np.asarray(content["y"]).reshape(-1)
        labels = _published_labels(np.where(labels == 10, 0, labels), spec)  # 10 is the digit 0
        images = _published_images(content["X"], (32, 32, 3, len(labels)))
        return images.transpose(3, 2, 0, 1), labels

    data, labels = _read_published(read, root, "train_32x32.mat")
    return _array_source(data, labels, spec)


def _published_labels(values: Sequence, spec: DatasetSpec) -> list[int]:
    """Return labels as they should be; raise ValueError for anything but classes of the set."""
    labels = [int(value) for value in values]
    if not labels or min(labels) < 0 or max(labels) >= spec.class_count:
        raise ValueError(f"its labels are not from 0 to {spec.class_count - 1}")
    return labels


def _published_images(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return images as they should be; raise ValueError for anything but bytes of that shape."""
    if not (isinstance(values, np.ndarray) and values.dtype == np.uint8 and values.shape == shape):
        raise ValueError(f"its images are not 8-bit integers of shape {shape}")
    return values


def _read_published(read, root, file):
    try:
        if not os.path.isfile(os.path.join(root, file)):  # a named pipe would be waited for
            raise FileNotFoundError("no such file")
        return read()
    except InputError as error:
        raise InputError(f"--data {root}: {file} {error}") from error
    except Exception as error:  # scipy and pickle raise many types for damaged files
        raise InputError(
            f"--data {root}: does not hold a readable {file} ({printable(one_line(error)[:200])})"
        ) from error


# Photographs -------------------------------------------------------------------------------


def _open_photos(request: Request, spec: DatasetSpec) -> Endless:
    """Open the embedded photographs, which have a rule of their own (`photo_batch`)."""

    def draw(batch_size, target_idx):
        check_batch_size(request, batch_size)
        return photo_batch(
            batch_size,
            target_idx,
            spec.shape[1:],
            seed=request.seed,
            distinct_labels=request.distinct_labels,
            channels=spec.shape[0],
        )

    return Endless(spec, draw, PHOTO_NAMES)


#: `--data-name`: name → DatasetSpec.
DATASETS = {
    "imagenet": DatasetSpec((3, 224, 224), 1000, IMAGENET_MEAN, IMAGENET_STD, _open_imagenet),
    "cifar100": DatasetSpec((3, 32, 32), 100, CIFAR100_MEAN, CIFAR100_STD, _open_cifar100),
    "svhn": DatasetSpec((3, 32, 32), 10, IMAGENET_MEAN, IMAGENET_STD, _open_svhn),
    "celeba": DatasetSpec((3, 224, 224), 10177, IMAGENET_MEAN, IMAGENET_STD, _open_celeba),
    "photos": DatasetSpec((3, 32, 32), len(PHOTO_NAMES), IMAGENET_MEAN, IMAGENET_STD, _open_photos),
    "folder": DatasetSpec((3, 224, 224), None, IMAGENET_MEAN, IMAGENET_STD, _open_folder),
}
