"""Which images the client takes: batches of a data set or of a backup, controls and decoys."""

import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

import utils.images
from models import checking
from train.datasets import (
    DatasetSpec,
    Endless,
    named_spec,
    normalise,
    open_dataset,
    requested_labels,
)
from train.label_vectors import classes_of, label_keys, label_vectors
from train.origins import Origin, has_deep_grey
from train.request import Request
from train.settings import BatchSettings
from utils.errors import InputError, naming
from utils.image_files import public_photographs
from utils.memory import free_memory, require_memory
from utils.tensor_files import load_plain

#: Number of the first crop of public photographs that is a decoy: those before are the controls'.
FIRST_DECOY = 10_000
#: Decoys per image unless --decoys asks for another number.
DECOYS = 99
#: What is asked of a backup where nothing is.
PLAIN = Request()
#: Bytes that decoys may take unless --decoys asks for more.
DECOY_BYTES = 2**29


@dataclass(frozen=True)
class Batch:
    """Holds the images of one run of the client."""

    #: The private batch, (B, C, H, W), normalised.
    x: Tensor
    #: Its labels, (B,), or (B, K) under binary cross-entropy.
    y: Tensor
    #: Spec of the data set it is from.
    spec: DatasetSpec
    #: The control's images, (B, C, H, W), normalised, under the same labels; None without.
    other: Tensor | None = None
    #: Decoys per image, (B, n, C, H, W) of uint8; None without.
    decoys: Tensor | None = None
    #: Where each image comes from; private, as the images are.
    origins: tuple[Origin, ...] = ()
    #: What is to be said of the files of the data set, one line each.
    notes: tuple[str, ...] = ()


def client_batch(settings: BatchSettings, say: Callable[[str], None]) -> Batch:
    """Load the private batch, and a control and decoys if the settings ask for them.

    `say` prints one line. Raises InputError for images that are missing or unfit.
    """
    name, size, index = settings.data_name, settings.size, settings.index
    if settings.backup is not None:
        x, y, spec = load_backup(settings.backup, name, size, index, settings.request)
        batch = Batch(
            x, y, spec, origins=tuple(Origin(i) for i in range(index * size, (index + 1) * size))
        )
    else:
        batch = read_batch(name, settings.request, size, index)
        y, spec = batch.y, batch.spec
    if spec.num_classes == 1 and settings.request.loss == "cross-entropy":
        raise InputError(
            f"--data {settings.request.root}: one class only: the cross-entropy of one class is 0 "
            "whatever the images; give a folder of two classes or more"
        )
    if not settings.with_control:
        return batch
    other, decoys = _others(settings, y, spec.shape, say)
    return replace(batch, other=other, decoys=decoys)


def _others(settings: BatchSettings, y, image_shape, say) -> tuple[Tensor, Tensor | None]:
    """Load the control's images and decoys, and report how many there are."""
    count, fitting = settings.decoys, max(1, DECOY_BYTES // (len(y) * math.prod(image_shape)))
    if count is None:
        count = min(DECOYS, fitting)
    name, index = settings.data_name, settings.index
    if settings.backup is not None:
        x, decoys = load_backup_control(settings.backup, name, index, y, count, settings.request)
    else:
        x, decoys = load_control(name, settings.request, index, y, count)
    if decoys is None:
        say(
            "note: a class has too few images outside the batch for decoys; without them run.py "
            "cannot test whether the gradient shows in the images"
        )
        return x, None
    fewer = ""
    if decoys.shape[1] < count:
        fewer = "; the classes hold no more images"
    elif settings.decoys is None and count < DECOYS:
        fewer = f" (as many as fit into {DECOY_BYTES // 2**20} MiB; --decoys asks for more)"
    mebibytes = decoys.numel() / 2**20
    say(f"decoys: {decoys.shape[1]} per image, {mebibytes:.1f} MiB, for scoring{fewer}")
    return x, decoys


def load_batch(
    name: str, request: Request, batch_size: int, target_idx: int
) -> tuple[Tensor, Tensor, DatasetSpec]:
    """Load batch number `target_idx` of data set `name`, as `read_batch` does.

    Returns x (B, C, H, W) normalised, y (B,), and the data set's final spec.
    """
    batch = read_batch(name, request, batch_size, target_idx)
    return batch.x, batch.y, batch.spec


def read_batch(name: str, request: Request, batch_size: int, target_idx: int) -> Batch:
    """Load batch number `target_idx` of data set `name`, and where its images come from.

    Batches are consecutive slices of one permutation of the data set that `request.seed` draws,
    so different indices never share an image. `photos` has its own rule (`photo_batch`).

    Raises InputError for an unknown name, missing or broken files and a batch beyond the end.
    """
    source = open_dataset(name, request)
    if isinstance(source, Endless):
        each = 4 * math.prod(source.spec.shape)
        fit = (free_memory() or 0) // each
        with naming(f"--batch-size {batch_size}"):
            require_memory(
                each * batch_size,
                "the images",
                f"give {fit} or fewer" if fit else "give a smaller --image-size",
            )
        x, y = source.draw(batch_size, target_idx)
        origins = tuple(Origin(class_name=source.class_names[label]) for label in y.tolist())
        if request.loss == "bce":
            y = label_vectors(y, source.spec.class_count)
        return Batch(normalise(x, source.spec), y, source.spec, origins=origins)
    length, batches = len(source), len(source) // batch_size
    if batch_size > length:
        raise InputError(
            f"--batch-size {batch_size}: {name} holds {length} images; give {length} or fewer"
        )
    if target_idx >= batches:
        raise InputError(
            f"--target-idx {target_idx}: {length} images make {batches} batches of "
            f"{batch_size}; give 0 to {batches - 1}"
        )
    order = _permutation(length, request.seed)
    x, y, origins = source.read(order[target_idx * batch_size : (target_idx + 1) * batch_size])
    notes = source.notes
    if request.bit_depth is not None and not has_deep_grey(origins):
        notes += (
            f"no file of the batch has more than 8 bits: --bit-depth {request.bit_depth} idle",
        )
    return Batch(normalise(x, source.spec), y, source.spec, origins=origins, notes=notes)


def _permutation(length: int, seed: int) -> list[int]:
    return torch.randperm(length, generator=Generator().manual_seed(seed)).tolist()


def load_control(
    name: str, request: Request, target_idx: int, y: Tensor, decoys: int
) -> tuple[Tensor, Tensor | None]:
    """Load other images under the labels `y` of batch `target_idx`, for scoring.

    Returns the control's images (B, C, H, W), normalised, and up to `decoys` decoys per image of
    the batch, (B, n, C, H, W) of uint8, or None where some class has no more images. All are
    images of the data set outside the batch, none twice, the first ones of the permutation that
    also drew the batch. For `photos` they are crops of the photographs that are never a target,
    under labels that are not theirs.

    Raises InputError where a class has too few other images for the control.
    """
    source = open_dataset(name, request)
    if isinstance(source, Endless):
        x = public_photographs(len(y), source.spec.shape, seed=request.seed)
        crops = public_photographs(
            len(y) * decoys, source.spec.shape, seed=request.seed, first=FIRST_DECOY
        )
        return normalise(x, source.spec), _as_decoys(crops, len(y))
    order = _permutation(len(source), request.seed)
    batch = range(target_idx * len(y), (target_idx + 1) * len(y))
    others = [index for place, index in enumerate(order) if place not in batch]
    chosen, more = _with_labels(y, others, source.labels, f"--data-name {name}", decoys)
    x, *_ = source.read(chosen)
    if not more[0]:
        return normalise(x, source.spec), None
    parts = [_as_decoys(source.read(of_image)[0], 1) for of_image in more]
    return normalise(x, source.spec), torch.cat(parts)


def _as_decoys(images: Tensor, batch_size: int) -> Tensor:
    """Store images (B · n, C, H, W) in [0, 1] as (B, n, C, H, W) of uint8."""
    return utils.images.eight_bit(images).unflatten(0, (batch_size, -1))


def _with_labels(
    y: Tensor, others: Sequence[int], labels: Sequence, source: str, decoys: int
) -> tuple[list[int], list[list[int]]]:
    """Choose for every label of `y` an index of `others` with that label, and some more.

    Labels are classes, (B,) and a sequence, or vectors, (B, K) and a sequence of tuples; `y` may be
    vectors made of classes. The first ones of `others` come first, and none comes twice. source:
    the data set, for messages.
    Returns B indices, and B lists of equal length, at most `decoys`.
    """
    if y.dim() == 2 and not isinstance(labels[0], tuple):
        y = classes_of(y)
    wanted_labels = label_keys(y)
    of_class: dict[Hashable, list[int]] = {}
    for index, label in zip(
        reversed(others), label_keys([labels[index] for index in reversed(others)]), strict=True
    ):
        of_class.setdefault(label, []).append(index)
    chosen = []
    for label in wanted_labels:
        if not of_class.get(label):
            what = f"class {label}" if isinstance(label, int) else f"label vector {label}"
            raise InputError(
                f"--with-control: {what} of {source} has too few images outside the batch; "
                "take a smaller --batch-size, or leave it out"
            )
        chosen.append(of_class[label].pop())
    wanted = Counter(wanted_labels)
    count = min(decoys, *(len(of_class[label]) // n for label, n in wanted.items()))
    return chosen, [[of_class[label].pop() for _ in range(count)] for label in wanted_labels]


def load_backup(
    folder: str, name: str, batch_size: int, target_idx: int, request: Request = PLAIN
) -> tuple[Tensor, Tensor, DatasetSpec]:
    """Load batch `target_idx` of a backup, `x_true.pth.bk` and `y_true.pth.bk` in `folder`.

    They hold N images (N, C, H, W), normalised, and their classes (N,). Normalisation and class
    count are those of data set `name`; `request` may give others, and its loss says
    whether labels become vectors. Returns as `load_batch` does.
    Raises InputError when a file is missing or unfit, or the slice lies beyond its end.
    """
    x, y, spec = _read_backup(folder, name, request)
    part = slice(target_idx * batch_size, (target_idx + 1) * batch_size)
    if len(x[part]) < batch_size:
        raise InputError(
            f"--target-idx {target_idx}: batch {target_idx} of {batch_size} lies beyond the "
            f"{len(x)} images of {folder}; give a smaller index or --batch-size"
        )
    y = y[part]
    if int(y.min()) < 0 or int(y.max()) >= spec.class_count:
        of = f"--data-name {name}"
        if request.num_classes is not None:
            of = f"--num-classes {request.num_classes}"
        raise InputError(
            f"--data-backup {folder}: labels {int(y.min())} to {int(y.max())}, but {of} has "
            f"classes 0 to {spec.class_count - 1}"
        )
    final = requested_labels(spec, request)
    if request.loss == "bce":
        y = label_vectors(y, final.class_count)
    return x[part].float(), y, final


def load_backup_control(
    folder: str, name: str, target_idx: int, y: Tensor, decoys: int, request: Request = PLAIN
) -> tuple[Tensor, Tensor | None]:
    """Load other images as `load_control` does, from the rest of a backup."""
    x, labels, spec = _read_backup(folder, name, request)
    spec = requested_labels(spec, request)
    batch = range(target_idx * len(y), (target_idx + 1) * len(y))
    others = [index for index in range(len(x)) if index not in batch]
    chosen, more = _with_labels(y, others, labels.tolist(), f"--data-backup {folder}", decoys)
    if not more[0]:
        return x[chosen].float(), None
    flat = [index for of_image in more for index in of_image]
    images = utils.images.denormalise(x[flat].float(), *spec.normalisation)
    return x[chosen].float(), _as_decoys(images, len(y))


def _read_backup(folder: str, name: str, request: Request) -> tuple[Tensor, Tensor, DatasetSpec]:
    """Read a whole backup: x (N, C, H, W), y (N,), and the set's own spec with its shape."""
    spec = named_spec(name)
    if request.num_classes is not None:
        spec = replace(spec, num_classes=request.num_classes)
    x, y = (_backup_file(os.path.join(folder, f"{which}_true.pth.bk")) for which in "xy")
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
            "another data set, or give --num-classes where an update is imported"
        )
    if request.mean is None and x.shape[1] != len(spec.mean):
        raise InputError(
            f"--data-backup {folder}: {x.shape[1]} channels, but --data-name {name} has "
            f"{len(spec.mean)}"
        )
    return x, y.long(), replace(spec, shape=tuple(x.shape[1:]))


def _backup_file(path: str) -> Tensor:
    with naming(f"--data-backup {path}"):
        return load_plain(path)
