"""Reading images: files, folders with one subfolder per class, and the public photographs.

torchvision and scikit-image take seconds to import, so each is imported inside the functions that
need it.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import InputError
from utils.files import package_folder

#: Modes of PIL for files of one channel.
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")


class ColourError(InputError):
    """A file in colour where one channel was asked for."""


def decode(path: str, channels: int, size: int | tuple[int, int]) -> Tensor:
    """Read one image file: (channels, H, W) in [0, 1].

    size: the side of square images, or (H, W). The image is scaled until it just covers that, and
    the centre cut out. Grey files of 8 bits, of 16 bits
    (0 to 65535, also inside 32-bit integers) and floats (0 to 1) keep their range.

    Raises InputError, naming the file, when it is broken or too large or holds values outside that
    range, and ColourError when it has colours where one channel was asked for.
    """
    from torchvision.transforms.v2.functional import center_crop, resize

    with _opened(path) as image:
        image.load()
    is_grey = image.mode in GREY_MODES
    if channels == 1 and not is_grey:
        raise ColourError(f"{path} is in colour, among grey ones")
    if image.mode.startswith(("I", "F")):
        highest = 65535 if image.mode.startswith("I") else 1
        values = np.asarray(image).astype(np.float32)
        if not (values.min() >= 0 and values.max() <= highest):
            raise InputError(
                f"{path} holds {values.min():g} to {values.max():g}, but images of kind "
                f"{image.mode} are read from 0 to {highest}; rescale it"
            )
        pixels = torch.from_numpy(values / highest)[None]
    else:
        pixels = _pixels(image.convert("L" if is_grey else "RGB"))
    if pixels.shape[0] < channels:
        pixels = pixels.expand(channels, -1, -1)
    height, width = (size, size) if isinstance(size, int) else size
    scaled = [height]
    if height != width:
        factor = max(height / pixels.shape[1], width / pixels.shape[2])
        sides = zip((height, width), pixels.shape[1:], strict=True)
        scaled = [max(side, round(factor * found)) for side, found in sides]
    pixels = resize(pixels, scaled, antialias=True).clamp(0, 1)
    return center_crop(pixels, [height, width])


def _pixels(image: Image.Image) -> Tensor:
    """Return the pixels of an 8-bit image: (channels, height, width) in [0, 1]."""
    values = torch.from_numpy(np.array(image))
    return values.view(image.height, image.width, -1).permute(2, 0, 1).float() / 255


def is_grey(path: str) -> bool:
    """Tell whether an image file holds one channel. Raises InputError when it is broken."""
    with _opened(path) as image:
        return image.mode in GREY_MODES


@contextmanager
def _opened(path: str):
    """Open the image file `path`; whatever goes wrong with it becomes an InputError naming it."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no readable image ({error}); remove it") from error


def decode_all(
    paths: Sequence[str], channels: int, size: int | tuple[int, int], workers: int = 4
) -> Tensor:
    """Decode several files with `workers` threads: (N, channels, H, W) in [0, 1].

    Raises InputError as `decode` does.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return torch.stack(list(pool.map(lambda path: decode(path, channels, size), paths)))


def image_folder(root: str) -> tuple[list[str], list[int], int]:
    """List a folder with one subfolder per class: files, class indices, number of classes.

    Raises InputError for a missing folder, no class, or a class without images.
    """
    from torchvision.datasets import ImageFolder

    if not os.path.isdir(root):
        raise InputError("no such folder; give one with one subfolder per class")
    try:
        folder = ImageFolder(root)
    except OSError as error:  # no class, a class without images, no permission
        raise InputError(
            f"needs one subfolder per class with images in each: {' '.join(str(error).split())}"
        ) from error
    return [p for p, _ in folder.samples], [c for _, c in folder.samples], len(folder.classes)


def load_auxiliary(
    root: str, num_classes: int, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Read all images of a folder with one subfolder per class, and their labels.

    Returns images (N, C, H, W) in [0, 1] and labels (N,).
    Raises InputError unless it has `num_classes` subfolders of readable images.
    """
    from torchvision.transforms.v2.functional import center_crop

    paths, labels, found = image_folder(root)
    if found != num_classes:
        raise InputError(
            f"{found} class folders, but the network has {num_classes} classes; give one "
            "subfolder per class, sorted as the classes are"
        )
    channels, height, width = image_shape
    images = decode_all(paths, channels, max(height, width))
    return center_crop(images, [height, width]), torch.tensor(labels)


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
    return _pixels(small)


def public_photographs(
    count: int, image_shape: tuple[int, int, int], seed: int = 0, first: int = 0
) -> Tensor:
    """Cut crops out of the public photographs in turn: (count, C, H, W) in [0, 1].

    C is 1 or 3. Photograph and place of a crop depend on (seed, number) alone, and the numbers
    count from `first`.
    """
    channels, height, width = image_shape
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
