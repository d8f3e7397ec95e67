"""Data sets of the client: name → shape, class count, normalisation, and how to open it.

A new data set is one `DatasetSpec` in DATASETS. Images are decoded one by one, only those of
the batch asked for.
"""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import skimage.data
import sklearn.datasets
import torch
from PIL import Image
from torch import Generator, Tensor
from torchvision.datasets import SVHN
from torchvision.transforms.v2 import functional as transforms

import utils.images
from models import checking
from utils.errors import InputError
from utils.image_files import (
    centre_crop,
    decode_all,
    image_folder,
    is_grey,
    public_photographs,
    random_crop,
)
from utils.tensor_files import load_plain

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR100_MEAN, CIFAR100_STD = (0.50716, 0.48669, 0.44120), (0.26733, 0.25644, 0.27615)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)
#: Number of the first crop of public photographs that is a decoy: those before are the controls'.
FIRST_DECOY = 10_000


@dataclass(frozen=True)
class Request:
    """What the user asked of a data set.

    size: side of the square images in pixels, None for the data set's own. channels: 1, 3 or
    None for the files' own. distinct_labels: number of distinct labels in a batch, for `photos`.
    """

    root: str | None = None
    size: int | None = None
    channels: int | None = None
    distinct_labels: int | None = None
    seed: int = 0
    workers: int = 4


@dataclass(frozen=True)
class Source:
    """An opened data set. length: number of images, None where there is no end.

    batch(indices): images (B, C, H, W) in [0, 1] and labels (B,) of those indices; where there
    is no end it is called with (batch_size, target_idx) instead. labels: of all images, None
    where there is no end.
    """

    length: int | None
    batch: Callable[..., tuple[Tensor, Tensor]]
    spec: "DatasetSpec"
    labels: Sequence[int] | None = None


@dataclass(frozen=True)
class DatasetSpec:
    """shape: (C, H, W). mean, std: C numbers. open: (Request, DatasetSpec) → Source.

    num_classes is None where the files tell (the Source's own spec then holds it).
    """

    shape: tuple[int, int, int]
    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    open: Callable[[Request, "DatasetSpec"], Source]

    @property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """mean and std as (C, 1, 1) tensors."""
        return tuple(torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))


def load_batch(
    name: str, request: Request, batch_size: int, target_idx: int
) -> tuple[Tensor, Tensor, DatasetSpec]:
    """Batch number `target_idx` of data set `name`.

    Batches are consecutive slices of one permutation of the data set that `request.seed` draws,
    so different indices never share an image. `photos` has its own rule (`photo_batch`).

    Returns x (B, C, H, W) normalised, y (B,), and the data set's final spec.
    Raises InputError for an unknown name, missing or broken files and a batch beyond the end.
    """
    source = open_dataset(name, request)
    if source.length is None:
        x, y = source.batch(batch_size, target_idx)
    else:
        batches = source.length // batch_size
        if batch_size > source.length:
            raise InputError(
                f"--batch-size {batch_size}: {name} holds {source.length} images; "
                f"give {source.length} or fewer"
            )
        if target_idx >= batches:
            raise InputError(
                f"--target-idx {target_idx}: {source.length} images make {batches} batches of "
                f"{batch_size}; give 0 to {batches - 1}"
            )
        order = _permutation(source.length, request.seed)
        x, y = source.batch(order[target_idx * batch_size : (target_idx + 1) * batch_size])
    return normalise(x, source.spec), y, source.spec


def _permutation(length: int, seed: int) -> list[int]:
    return torch.randperm(length, generator=Generator().manual_seed(seed)).tolist()


def load_control(
    name: str, request: Request, target_idx: int, y: Tensor, decoys: int
) -> tuple[Tensor, Tensor | None]:
    """Other images under the labels `y` (B,) of batch `target_idx`, for scoring.

    Returns the control's images (B, C, H, W), normalised, and up to `decoys` decoys per image of
    the batch, (B, n, C, H, W) of uint8, or None where some class has no more images. All are
    images of the data set outside the batch, none twice, that the permutation puts first, as it
    did the batch; for `photos` crops of the photographs that are never a target, which stand under
    labels that are not theirs.

    Raises InputError where a class has too few other images for the control.
    """
    source = open_dataset(name, request)
    if source.length is None:
        x = public_photographs(len(y), source.spec.shape, seed=request.seed)
        crops = public_photographs(
            len(y) * decoys, source.spec.shape, seed=request.seed, first=FIRST_DECOY
        )
        return normalise(x, source.spec), _as_decoys(crops, len(y))
    order = _permutation(source.length, request.seed)
    batch = range(target_idx * len(y), (target_idx + 1) * len(y))
    others = [index for place, index in enumerate(order) if place not in batch]
    chosen, more = _with_labels(y, others, source.labels, f"--data-name {name}", decoys)
    x, _ = source.batch(chosen)
    if not more[0]:
        return normalise(x, source.spec), None
    parts = [_as_decoys(source.batch(of_image)[0], 1) for of_image in more]
    return normalise(x, source.spec), torch.cat(parts)


def _as_decoys(images: Tensor, batch_size: int) -> Tensor:
    """Images (B · n, C, H, W) in [0, 1] → (B, n, C, H, W) of uint8."""
    return (images * 255).round().byte().unflatten(0, (batch_size, -1))


def _with_labels(
    y: Tensor, others: Sequence[int], labels: Sequence[int], source: str, decoys: int
) -> tuple[list[int], list[list[int]]]:
    """For every label of `y` an index of `others` with that label, and as many more for each.

    The first ones of `others` come first, and none comes twice. Returns B indices, and B lists of
    equal length, at most `decoys`.
    """
    of_class: dict[int, list[int]] = {}
    for index in reversed(others):
        of_class.setdefault(int(labels[index]), []).append(index)
    chosen = []
    for label in y.tolist():
        if not of_class.get(label):
            raise InputError(
                f"--with-control: class {label} of {source} has too few images outside the batch; "
                "take a smaller --batch-size, or leave it out"
            )
        chosen.append(of_class[label].pop())
    wanted = Counter(y.tolist())
    count = min(decoys, *(len(of_class[label]) // n for label, n in wanted.items()))
    return chosen, [[of_class[label].pop() for _ in range(count)] for label in y.tolist()]


def open_dataset(name: str, request: Request) -> Source:
    """Open data set `name`; decodes nothing yet. Raises InputError as `load_batch` does."""
    spec = _requested_spec(name, request)
    return spec.open(request, spec)


def dataset_length(name: str, request: Request) -> int | None:
    """Number of images of data set `name`, None where there is no end.

    Raises InputError as `load_batch` does.
    """
    return open_dataset(name, request).length


def dataset_spec(name: str, request: Request) -> DatasetSpec:
    """Shape and class count of data set `name`; its files are opened only where they tell.

    Raises InputError as `load_batch` does.
    """
    spec = _requested_spec(name, request)
    return spec if spec.num_classes is not None else open_dataset(name, request).spec


def _requested_spec(name: str, request: Request) -> DatasetSpec:
    spec = _spec(name)
    if request.distinct_labels is not None and name != "photos":
        raise InputError(
            f"--distinct-labels {request.distinct_labels}: only for --data-name photos; leave it "
            "out"
        )
    if request.channels is not None and name != "folder":
        raise InputError(
            f"--channels {request.channels}: only for --data-name folder; leave it out"
        )
    if request.size is not None:
        spec = replace(spec, shape=(spec.shape[0], request.size, request.size))
    return spec


def _spec(name: str) -> DatasetSpec:
    if name not in DATASETS:
        raise InputError(f"--data-name {name}: unknown; choose from {', '.join(DATASETS)}")
    return DATASETS[name]


def load_backup(
    folder: str, name: str, batch_size: int, target_idx: int
) -> tuple[Tensor, Tensor, DatasetSpec]:
    """Batch `target_idx` of a backup: `x_true.pth.bk` (N, C, H, W) normalised, `y_true.pth.bk`.

    Normalisation and class count are those of data set `name`.
    Raises InputError when a file is missing or unfit, or the slice lies beyond its end.
    """
    x, y, spec = _read_backup(folder, name)
    part = slice(target_idx * batch_size, (target_idx + 1) * batch_size)
    if len(x[part]) < batch_size:
        raise InputError(
            f"--target-idx {target_idx}: batch {target_idx} of {batch_size} lies beyond the "
            f"{len(x)} images of {folder}; give a smaller index or --batch-size"
        )
    y = y[part]
    if int(y.min()) < 0 or int(y.max()) >= spec.num_classes:
        raise InputError(
            f"--data-backup {folder}: labels {int(y.min())} to {int(y.max())}, but --data-name "
            f"{name} has classes 0 to {spec.num_classes - 1}"
        )
    return x[part].float(), y, spec


def load_backup_control(
    folder: str, name: str, target_idx: int, y: Tensor, decoys: int
) -> tuple[Tensor, Tensor | None]:
    """As `load_control`, from the rest of a backup."""
    x, labels, spec = _read_backup(folder, name)
    batch = range(target_idx * len(y), (target_idx + 1) * len(y))
    others = [index for index in range(len(x)) if index not in batch]
    chosen, more = _with_labels(y, others, labels.tolist(), f"--data-backup {folder}", decoys)
    if not more[0]:
        return x[chosen].float(), None
    flat = [index for of_image in more for index in of_image]
    images = utils.images.denormalise(x[flat].float(), *spec.normalisation)
    return x[chosen].float(), _as_decoys(images, len(y))


def _read_backup(folder: str, name: str) -> tuple[Tensor, Tensor, DatasetSpec]:
    """Everything in a backup: x (N, C, H, W), y (N,), and the spec with its shape."""
    spec = _spec(name)
    x, y = (
        load_plain(os.path.join(folder, f"{which}_true.pth.bk"), "--data-backup") for which in "xy"
    )
    needs = "x_true must be normalised floats (N, C, H, W) and y_true integers (N,)"
    try:
        checking.check_tensor(x, "x_true")
        checking.check_tensor(y, "y_true", checking.INTEGERS)
    except checking.UnfitError as error:
        raise InputError(f"--data-backup {folder}: {error}; {needs}") from error
    if y.shape == (*y.shape[:1], 1):
        y = y[:, 0]  # as the original's loaders give them
    if x.dim() != 4 or y.shape != x.shape[:1]:
        raise InputError(
            f"--data-backup {folder}: shapes {tuple(x.shape)} and {tuple(y.shape)}; {needs}"
        )
    if spec.num_classes is None:
        raise InputError(
            f"--data-name {name}: its class count comes from its files; with --data-backup name "
            "another data set"
        )
    if x.shape[1] != len(spec.mean):
        raise InputError(
            f"--data-backup {folder}: {x.shape[1]} channels, but --data-name {name} has "
            f"{len(spec.mean)}"
        )
    return x, y.long(), replace(spec, shape=tuple(x.shape[1:]))


def normalise(x: Tensor, spec: DatasetSpec) -> Tensor:
    """Images (B, C, H, W) in [0, 1] → (x − mean) / std a channel."""
    return utils.images.normalise(x, *spec.normalisation)


# Image files -------------------------------------------------------------------------------


def _files_source(paths: Sequence[str], labels: Sequence[int], request: Request, spec) -> Source:
    channels, size, _ = spec.shape

    def batch(indices):
        chosen = [paths[i] for i in indices]
        images = decode_all(chosen, channels, size, workers=request.workers)
        return images, torch.tensor([labels[i] for i in indices])

    return Source(len(paths), batch, spec, labels)


def _folder_of(request: Request, name: str) -> str:
    if request.root is None:
        raise InputError(f"--data: missing; --data-name {name} needs the folder of the data set")
    if not os.path.isdir(request.root):
        raise InputError(f"--data {request.root}: no such folder; give the folder of the data set")
    return request.root


def _open_folder(request: Request, spec: DatasetSpec) -> Source:
    """Any ImageFolder. Grey where the first file of every class is, unless channels are given."""
    paths, labels, num_classes = image_folder(_folder_of(request, "folder"))
    channels = request.channels
    if channels is None:
        firsts = [paths[labels.index(c)] for c in range(num_classes)]
        channels = 1 if all(is_grey(path) for path in firsts) else 3
    spec = replace(spec, shape=(channels, *spec.shape[1:]), num_classes=num_classes)
    if channels == 1:
        spec = replace(spec, mean=GREY_MEAN, std=GREY_STD)
    return _files_source(paths, labels, request, spec)


def _open_imagenet(request: Request, spec: DatasetSpec) -> Source:
    """ImageFolder in `root/train`, or in `root` itself; class indices are its sorted folders."""
    root = _folder_of(request, "imagenet")
    inner = os.path.join(root, "train")
    paths, labels, num_classes = image_folder(inner if os.path.isdir(inner) else root)
    if num_classes > spec.num_classes:
        raise InputError(
            f"--data {root}: {num_classes} class folders, imagenet has {spec.num_classes}; give "
            "--data-name folder"
        )
    return _files_source(paths, labels, request, spec)


def _open_celeba(request: Request, spec: DatasetSpec) -> Source:
    """`x_train/` with the images and `y_train.txt` with lines "name identity", from 1."""
    root = _folder_of(request, "celeba")
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
        if not name or not identity.isdecimal() or not 1 <= int(identity) <= spec.num_classes:
            raise InputError(
                f"--data {listing}: line {number} is not 'name identity' with an identity "
                f"from 1 to {spec.num_classes}"
            )
        paths.append(os.path.join(images, name.strip()))
        labels.append(int(identity) - 1)
    if not paths:
        raise InputError(f"--data {listing}: lists no image")
    return _files_source(paths, labels, request, spec)


# Arrays ------------------------------------------------------------------------------------


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled containers, strings, numbers and numpy arrays; refuses everything else."""

    def find_class(self, module, name):
        """Allow what an array is rebuilt from."""
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array or plain value")


class _SvhnFiles(SVHN):
    """torchvision's reader, without the checksum of the published file."""

    split_list = {"train": ["", "train_32x32.mat", None]}


def _array_source(data: np.ndarray, labels: Sequence[int], request: Request, spec) -> Source:
    """`data` (N, 3, H, W) uint8."""
    size = spec.shape[1]

    def batch(indices):
        x = torch.from_numpy(data[indices]).float() / 255
        if x.shape[-1] != size:
            x = transforms.resize(x, [size, size], antialias=True).clamp(0, 1)
        return x, torch.tensor([int(labels[i]) for i in indices])

    return Source(len(data), batch, spec, labels)


def _open_cifar100(request: Request, spec: DatasetSpec) -> Source:
    """Folder that holds `cifar-100-python/` with the published pickle `train`."""
    root = _folder_of(request, "cifar100")

    def read():
        with open(os.path.join(root, "cifar-100-python", "train"), "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        labels = [int(label) for label in content["fine_labels"]]
        return content["data"].reshape(len(labels), 3, 32, 32), labels

    return _array_source(*_read_published(read, root, "cifar-100-python/train"), request, spec)


def _open_svhn(request: Request, spec: DatasetSpec) -> Source:
    """Folder that holds the published `train_32x32.mat`; its digit 0 is class 0."""
    root = _folder_of(request, "svhn")

    def read():
        dataset = _SvhnFiles(root, split="train", download=False)
        return dataset.data, dataset.labels

    return _array_source(*_read_published(read, root, "train_32x32.mat"), request, spec)


def _read_published(read, root, file):
    try:
        return read()
    except Exception as error:  # scipy and pickle raise many types for damaged files
        raise InputError(
            f"--data {root}: does not hold a readable {file} "
            f"({' '.join(str(error).split()) or type(error).__name__})"
        ) from error


# Photographs inside scikit-image and scikit-learn --------------------------------------------

#: Class i of `photos` is the i-th of these photographs.
PHOTOS = {
    "astronaut": skimage.data.astronaut,
    "chelsea": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
    "hubble_deep_field": skimage.data.hubble_deep_field,
    "immunohistochemistry": skimage.data.immunohistochemistry,
    "retina": skimage.data.retina,
    "china": lambda: sklearn.datasets.load_sample_image("china.jpg"),
}


def photo_batch(
    batch_size: int, target_idx: int, size: int, *, seed: int, distinct_labels: int | None = None
) -> tuple[Tensor, Tensor]:
    """Batch `target_idx` of the embedded photographs: x (B, 3, size, size) in [0, 1], y (B,).

    Batch 0 with B ≤ 8 and free labels: centre crops of the first B photographs, in the order
    of PHOTOS. Every other batch: position p is a crop drawn from (seed, target_idx, p) with a
    side of 50 to 100 % of the photograph's shorter one and real-valued corners, so that no
    crop comes twice; its photograph, which is its class, is drawn too. With `distinct_labels`
    U the labels are U classes that (seed, target_idx) draws, repeated in turn.
    """
    names = list(PHOTOS)
    photos = {}

    def photo(label):
        if label not in photos:
            photos[label] = Image.fromarray(PHOTOS[names[label]]())
        return photos[label]

    if target_idx == 0 and batch_size <= len(names) and distinct_labels is None:
        labels = list(range(batch_size))
        images = [centre_crop(photo(label), size) for label in labels]
        return torch.stack(images), torch.tensor(labels)
    classes = None
    if distinct_labels is not None:
        draw = np.random.default_rng([seed, target_idx])
        classes = draw.permutation(len(names))[:distinct_labels].tolist()
    labels, crops = [], []
    for position in range(batch_size):
        draw = np.random.default_rng([seed, target_idx, position])
        label = int(draw.integers(len(names)))
        if classes is not None:
            label = classes[position % len(classes)]
        labels.append(label)
        crops.append(random_crop(photo(label), size, draw))
    return torch.stack(crops), torch.tensor(labels)


def _open_photos(request: Request, spec: DatasetSpec) -> Source:
    if request.root is not None:
        raise InputError(f"--data {request.root}: photos are built in; leave --data out")
    distinct = request.distinct_labels
    if distinct is not None and not 1 <= distinct <= len(PHOTOS):
        raise InputError(
            f"--distinct-labels {distinct}: photos has {len(PHOTOS)} classes; give 1 to "
            f"{len(PHOTOS)}"
        )

    def batch(batch_size, target_idx):
        if distinct is not None and distinct > batch_size:
            raise InputError(
                f"--distinct-labels {distinct}: more than the {batch_size} images of the batch"
            )
        return photo_batch(
            batch_size, target_idx, spec.shape[1], seed=request.seed, distinct_labels=distinct
        )

    return Source(None, batch, spec)


#: `--data-name`: name → DatasetSpec.
DATASETS = {
    "imagenet": DatasetSpec((3, 224, 224), 1000, IMAGENET_MEAN, IMAGENET_STD, _open_imagenet),
    "cifar100": DatasetSpec((3, 32, 32), 100, CIFAR100_MEAN, CIFAR100_STD, _open_cifar100),
    "svhn": DatasetSpec((3, 32, 32), 10, IMAGENET_MEAN, IMAGENET_STD, _open_svhn),
    "celeba": DatasetSpec((3, 224, 224), 10177, IMAGENET_MEAN, IMAGENET_STD, _open_celeba),
    "photos": DatasetSpec((3, 32, 32), len(PHOTOS), IMAGENET_MEAN, IMAGENET_STD, _open_photos),
    "folder": DatasetSpec((3, 224, 224), None, IMAGENET_MEAN, IMAGENET_STD, _open_folder),
}
