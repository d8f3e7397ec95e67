"""Reading images: files, folders with one subfolder a class, and the public photographs."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import skimage.data
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as transforms

from utils.errors import InputError

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")


def decode(path: str, channels: int, size: int, flag: str = "--data") -> Tensor:
    """Read one image file: (channels, size, size) in [0, 1].

    The shorter side is scaled to `size` and the centre cut out. Grey files of 8 bits, of 16 bits
    (0 to 65535, also inside 32-bit integers) and floats (0 to 1) keep their range.

    Raises InputError, naming `flag` and the file, when it is broken or too large, holds values
    outside that range, or has colours where one channel was asked for.
    """
    with _opened(path, flag) as image:
        image.load()
    is_grey = image.mode in GREY_MODES
    if channels == 1 and not is_grey:
        remedy = "; give --channels 3 to read all in colour" if flag == "--data" else ""
        raise InputError(f"{flag}: {path} is in colour, among grey ones{remedy}")
    if image.mode.startswith(("I", "F")):
        highest = 65535 if image.mode.startswith("I") else 1
        values = np.asarray(image).astype(np.float32)
        if not (values.min() >= 0 and values.max() <= highest):
            raise InputError(
                f"{flag}: {path} holds {values.min():g} to {values.max():g}, but images of kind "
                f"{image.mode} are read from 0 to {highest}; rescale it"
            )
        pixels = torch.from_numpy(values / highest)[None]
    else:
        pixels = transforms.pil_to_tensor(image.convert("L" if is_grey else "RGB")).float() / 255
    if pixels.shape[0] < channels:
        pixels = pixels.expand(channels, -1, -1)
    pixels = transforms.resize(pixels, [size], antialias=True).clamp(0, 1)
    return transforms.center_crop(pixels, [size, size])


def is_grey(path: str, flag: str = "--data") -> bool:
    """Whether an image file holds one channel. Raises InputError when it is broken."""
    with _opened(path, flag) as image:
        return image.mode in GREY_MODES


@contextmanager
def _opened(path: str, flag: str):
    """The image file `path`; whatever goes wrong with it becomes an InputError naming it."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{flag}: {path} is no readable image ({error}); remove it") from error


def decode_all(
    paths: Sequence[str], channels: int, size: int, flag: str = "--data", workers: int = 4
) -> Tensor:
    """Decode several files with `workers` threads: (N, channels, size, size) in [0, 1]."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return torch.stack(list(pool.map(lambda path: decode(path, channels, size, flag), paths)))


def image_folder(root: str, flag: str = "--data") -> tuple[list[str], list[int], int]:
    """Files, class indices and number of classes of a folder with one subfolder a class.

    Raises InputError, naming `flag`, for a missing folder, no class, a class without images.
    """
    if not os.path.isdir(root):
        raise InputError(f"{flag} {root}: no such folder; give one with a subfolder a class")
    try:
        folder = ImageFolder(root)
    except OSError as error:  # no class, a class without images, no permission
        raise InputError(
            f"{flag} {root}: needs one subfolder a class with images in each: "
            f"{' '.join(str(error).split())}"
        ) from error
    return [p for p, _ in folder.samples], [c for _, c in folder.samples], len(folder.classes)


def load_auxiliary(
    root: str, num_classes: int, image_shape: tuple[int, int, int], flag: str
) -> tuple[Tensor, Tensor]:
    """All images of a folder with one subfolder a class: (N, C, H, W) in [0, 1], and labels (N,).

    Raises InputError, naming `flag`, unless it has `num_classes` subfolders of readable images.
    """
    paths, labels, found = image_folder(root, flag)
    if found != num_classes:
        raise InputError(
            f"{flag} {root}: {found} class folders, but the network has {num_classes} classes; "
            "give one subfolder a class, sorted as the classes are"
        )
    channels, height, width = image_shape
    images = decode_all(paths, channels, max(height, width), flag)
    return transforms.center_crop(images, [height, width]), torch.tensor(labels)


# Photographs inside scikit-image and scikit-learn --------------------------------------------

#: Public photographs, never a client's: colour ones, then grey ones.
PUBLIC_PHOTOS: tuple[Callable[[], np.ndarray], ...] = (
    lambda: skimage.data.stereo_motorcycle()[0],
    lambda: skimage.data.stereo_motorcycle()[1],
    lambda: sklearn.datasets.load_sample_image("flower.jpg"),
    skimage.data.brick,
    skimage.data.grass,
    skimage.data.gravel,
    skimage.data.coins,
    skimage.data.moon,
    skimage.data.text,
)


def random_crop(photo: Image.Image, size: int, draw: np.random.Generator) -> Tensor:
    """A square cut out of a photograph, scaled: (channels, size, size) in [0, 1].

    Its side is 50 to 100 % of the photograph's shorter one and its corner real-valued.
    """
    side = draw.uniform(0.5, 1.0) * min(photo.size)
    return square_crop(photo, size, side, draw.uniform(), draw.uniform())


def centre_crop(photo: Image.Image, size: int) -> Tensor:
    """The largest centred square of a photograph, scaled: (channels, size, size) in [0, 1]."""
    return square_crop(photo, size, min(photo.size), 0.5, 0.5)


def square_crop(
    photo: Image.Image, size: int, side: float, x_share: float, y_share: float
) -> Tensor:
    """The square of `side` pixels at a share of the way from left to right and top to bottom."""
    left, top = x_share * (photo.width - side), y_share * (photo.height - side)
    box = (left, top, left + side, top + side)
    small = photo.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return transforms.pil_to_tensor(small).float() / 255


def public_photographs(
    count: int, image_shape: tuple[int, int, int], seed: int = 0, first: int = 0
) -> Tensor:
    """Crops of the public photographs: (count, C, H, W) in [0, 1], the photographs in turn.

    Photograph and place depend on (seed, number) alone, numbers counting from `first`. C is 1 or
    3.
    """
    channels, height, width = image_shape
    mode = "L" if channels == 1 else "RGB"
    photos = [Image.fromarray(photo()).convert(mode) for photo in PUBLIC_PHOTOS]
    size = max(height, width)
    crops = [
        random_crop(photos[i % len(photos)], size, np.random.default_rng([seed, i]))
        for i in range(first, first + count)
    ]
    return transforms.center_crop(torch.stack(crops), [height, width])
