"""Images of one size: from files, from class folders, and out of the public photographs.

torchvision and scikit-image take seconds to import, so each is imported inside the functions that
need it.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import InputError
from utils.files import package_folder, printable
from utils.image_folder import image_folder
from utils.image_reading import (
    Reading,
    eight_bit_pixels,
    most_pixels,
    opened,
    read_picture,
)
from utils.memory import require_memory

#: Images of more pixels are decoded one at a time, by whatever number of threads: each takes 1 GB.
LARGE_PIXELS = 2**25
_ONE_LARGE = threading.Lock()


def decode(
    path: str, channels: int, size: int | tuple[int, int], bit_depth: int | None = None
) -> Tensor:
    """Read one image file as `read_picture` does, and fit it: (channels, height, width) in [0, 1].

    size: (height, width), or the side of a square. The image is scaled until it covers that
    rectangle, and the centre is cut out.

    Raises InputError as `read_picture` does, and for an image too narrow to be scaled.
    """
    return _fitted(path, channels, size, bit_depth)[0]


def _fitted(path, channels, size, bit_depth) -> tuple[Tensor, Reading]:
    """Decode a file, and return how it was read."""
    with opened(path) as image:
        is_large = image.width * image.height > LARGE_PIXELS
    with _ONE_LARGE if is_large else contextlib.nullcontext():
        return _read_and_fitted(path, channels, size, bit_depth)


def _read_and_fitted(path, channels, size, bit_depth) -> tuple[Tensor, Reading]:
    from torchvision.transforms.v2.functional import center_crop, resize

    pixels, reading = read_picture(path, channels, bit_depth)
    goal = (size, size) if isinstance(size, int) else size
    scaled = covering_size(pixels.shape[-2], pixels.shape[-1], goal)
    if scaled[0] * scaled[1] > most_pixels():
        raise InputError(
            f"{printable(path)} has {pixels.shape[-1]}×{pixels.shape[-2]} pixels: too narrow to be "
            "scaled and cut; cut it"
        )
    pixels = resize(pixels, list(scaled), antialias=True).clamp(0, 1)
    return center_crop(pixels, list(goal)), reading


def covering_size(height: int, width: int, goal: tuple[int, int]) -> tuple[int, int]:
    """Return the least (height, width) of the same shape, rounded down, that covers `goal`."""
    if goal[1] * height >= goal[0] * width:  # the width decides
        return max(goal[0], int(goal[1] * height / width)), goal[1]
    return goal[0], max(goal[1], int(goal[0] * width / height))


def decode_all(
    paths: Sequence[str],
    channels: int,
    size: int | tuple[int, int],
    workers: int = 4,
    bit_depth: int | None = None,
) -> tuple[Tensor, tuple[Reading, ...]]:
    """Decode several files with `workers` threads: (N, channels, height, width) in [0, 1].

    Also returns how each was read. Raises InputError as `decode` does.
    """
    height, width = (size, size) if isinstance(size, int) else size
    require_memory(
        8 * len(paths) * channels * height * width,
        f"{len(paths):,} images of {height}×{width} pixels",
        "take fewer or smaller ones",
    )
    with ThreadPoolExecutor(max(1, workers)) as pool:
        read = list(pool.map(lambda path: _fitted(path, channels, size, bit_depth), paths))
    return torch.stack([pixels for pixels, _ in read]), tuple(reading for _, reading in read)


def load_auxiliary(
    root: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    bit_depth: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Read all images of a folder with one subfolder per class, and their labels.

    Returns images (N, C, H, W) in [0, 1] and labels (N,).
    Raises InputError unless it has `num_classes` subfolders of readable images.
    """
    folder = image_folder(root)
    if len(folder.classes) != num_classes:
        raise InputError(
            f"{len(folder.classes)} class folders, but the network has {num_classes} classes; give "
            "one subfolder per class, sorted as the classes are"
        )
    channels, height, width = image_shape
    images, _ = decode_all(folder.paths, channels, (height, width), bit_depth=bit_depth)
    return images, torch.tensor(folder.labels)


# Photographs inside scikit-image and scikit-learn --------------------------------------------


def scikit_image_photograph(name: str, which: int | None = None) -> np.ndarray:
    """Return photograph `name` of scikit-image, (H, W) or (H, W, 3) of uint8.

    which: number of the picture where the name has several.
    """
    import skimage.data

    found = getattr(skimage.data, name)()
    return found if which is None else found[which]


def scikit_learn_photograph(name: str) -> np.ndarray:
    """Return photograph `name` of scikit-learn, (H, W, 3) of uint8.

    As `sklearn.datasets.load_sample_image` does, but without that import, which takes as long as
    torch's.
    """
    with Image.open(package_folder("sklearn") / "datasets" / "images" / name) as photo:
        return np.asarray(photo)


#: Public photographs, never a client's: colour ones, then grey ones.
PUBLIC_PHOTOS: tuple[Callable[[], np.ndarray], ...] = (
    partial(scikit_image_photograph, "stereo_motorcycle", 0),
    partial(scikit_image_photograph, "stereo_motorcycle", 1),
    partial(scikit_learn_photograph, "flower.jpg"),
    *(
        partial(scikit_image_photograph, name)
        for name in ("brick", "grass", "gravel", "coins", "moon", "text")
    ),
)


def random_crop(
    photo: Image.Image, size: int | tuple[int, int], draw: np.random.Generator
) -> Tensor:
    """Cut a part out of a photograph and scale it: (channels, H, W) in [0, 1].

    size: the side of a square, or (H, W). The part is 50 to 100 % as high as the largest one of its
    shape, and its corner is real-valued.
    """
    return shaped_crop(photo, size, draw.uniform(0.5, 1.0), draw.uniform(), draw.uniform())


def centre_crop(photo: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """Scale the largest centred part of a photograph: (channels, H, W) in [0, 1]."""
    return shaped_crop(photo, size, 1.0, 0.5, 0.5)


def shaped_crop(
    photo: Image.Image,
    size: int | tuple[int, int],
    share: float,
    x_share: float,
    y_share: float,
) -> Tensor:
    """Cut a part of the shape `size` out of a photograph and scale it: (channels, H, W) in [0, 1].

    share: its height in that of the largest such part. x_share, y_share: as in `crop`.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    height = share * min(photo.height, photo.width * rows / columns)
    width = share * min(photo.width, photo.height * columns / rows)
    return crop(photo, (rows, columns), (height, width), x_share, y_share)


def crop(
    photo: Image.Image,
    sides: tuple[int, int],
    part: tuple[float, float],
    x_share: float,
    y_share: float,
) -> Tensor:
    """Cut a part (height, width) in pixels out of a photograph: (channels, *sides) in [0, 1].

    x_share, y_share: in [0, 1], how far it lies from the left to the right and from the top to the
    bottom edge.
    """
    left, top = x_share * (photo.width - part[1]), y_share * (photo.height - part[0])
    box = (left, top, left + part[1], top + part[0])
    small = photo.resize(sides[::-1], Image.Resampling.BICUBIC, box=box)
    return eight_bit_pixels(small)


def public_photographs(
    count: int, image_shape: tuple[int, int, int], seed: int = 0, first: int = 0
) -> Tensor:
    """Cut crops out of the public photographs in turn: (count, C, H, W) in [0, 1].

    C is 1 or 3. Photograph and place of a crop depend on (seed, number) alone, and the numbers
    count from `first`. Raises InputError where they do not fit into the free memory.
    """
    channels, height, width = image_shape
    require_memory(
        4 * count * channels * max(height, width) ** 2,
        f"{count} public photographs as large as images {image_shape}",
        "take a machine with more memory, or smaller images",
    )
    mode = "L" if channels == 1 else "RGB"
    photos = [Image.fromarray(photo()).convert(mode) for photo in PUBLIC_PHOTOS]
    size = max(height, width)
    crops = [
        random_crop(photos[i % len(photos)], size, np.random.default_rng([seed, i]))
        for i in range(first, first + count)
    ]
    if height == width:
        return torch.stack(crops)
    from torchvision.transforms.v2.functional import center_crop

    return center_crop(torch.stack(crops), [height, width])
