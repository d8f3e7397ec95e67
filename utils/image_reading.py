"""One image file → its pixels: the first frame, upright, in its own range, without transparency.

Nothing is done in silence: `Reading.done` says in words what was.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from utils.errors import InputError
from utils.files import printable

#: Formats of Pillow that are read. Of the others some run programs, and some are but stubs.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
#: Modes of Pillow for files of one channel.
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
#: Beginnings of the names of modes of more than 8 bits per value.
DEEP = ("I", "F")
#: A file of 16 bits that uses as many or fewer may hold 10, 12 or 14: its range is not known.
DOUBTFUL_BITS = 14
#: Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


#: Most pixels of an image; with all that is made of them they take about 1 GB.
MOST_PIXELS = 50_000_000
#: JPEG files of more scans than FEW_SCANS are refused where the scans pass more pixels than this.
MOST_SCANNED, FEW_SCANS = 2**30, 20


# What Pillow warns of is refused here, or said in `Reading.done`.
warnings.filterwarnings("ignore", module=r"PIL\b")


class ColourError(InputError):
    """A file in colour where one channel was asked for."""


class DepthError(InputError):
    """A file whose grey values are doubtful, or beyond the bits per value that were given."""


@dataclass(frozen=True)
class Reading:
    """Says how one image file was read."""

    #: Width and height in pixels, upright.
    size: tuple[int, int]
    #: Mode of the file by Pillow's name.
    mode: str
    #: What was done beyond the plain reading: phrases that follow "the image is".
    done: tuple[str, ...]


def read_picture(path: str, channels: int, bit_depth: int | None = None) -> tuple[Tensor, Reading]:
    """Read one image file: pixels (channels, H, W) in [0, 1], upright, and how they were read.

    channels: 1 or 3. bit_depth: bits per grey value in files of more than 8 bits, which are then
    read from 0 to 2^bit_depth − 1, unless they state their own; None for 16. Floats are read from
    0 to 1.

    Transparent pixels are laid on black: encoders mostly store black under full transparency, so
    that this is what reading without the transparency shows as well.

    Raises InputError, naming the file, when it is broken or too large or holds values outside its
    range; ColourError when it has colours where one channel was asked for; DepthError when it holds
    more than bit_depth, or bit_depth is None and it uses DOUBTFUL_BITS or fewer of 16.
    """
    with opened(path) as file:
        mode, done = file.mode, _first_frame(file) + _lost_bits(file)
        bits, inverted = _stated_bits(file), _is_inverted(file)
        image, turned = _upright(file)
        done += turned
        size = image.size
        if mode.startswith(DEEP):
            values = np.asarray(image).astype(np.float32)
        else:
            image, converted = _eight_bit(image, mode)
            done += converted
    if mode.startswith(DEEP):
        highest = _highest(path, mode, values, bits, bit_depth)
        if mode.startswith("I"):
            done += (f"grey of 16 bits and read from 0 to {highest}",)
        if inverted:
            values = highest - values
            done += ("inverted, since 0 means white",)
        pixels = torch.from_numpy(values / highest)[None]
    else:
        pixels = eight_bit_pixels(image)
    pixels, copied = _with_channels(path, pixels, channels)
    return pixels, Reading(size, mode, done + copied)


def eight_bit_pixels(image: Image.Image) -> Tensor:
    """Return the pixels of an 8-bit image: (channels, height, width) in [0, 1]."""
    values = torch.from_numpy(np.array(image))
    return values.view(image.height, image.width, -1).permute(2, 0, 1).float().div_(255)


def is_grey(path: str) -> bool:
    """Tell whether an image file holds one channel. Raises InputError when it is broken."""
    with opened(path) as image:
        return image.mode in GREY_MODES


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Open the image file `path`; whatever Pillow makes of it becomes an InputError naming it."""
    name = printable(path)
    try:
        if not os.path.isfile(path):  # a named pipe would be waited for
            raise InputError(f"{name} is no file")
        if os.path.getsize(path) == 0:
            raise InputError(f"{name} is no readable image (it is empty); remove it")
        # Not by name: Pillow 13 maps uncompressed TIFF files of grey values into memory by it, and
        # then mixes up width and height of those that EXIF turns by a quarter.
        with open(path, "rb") as file, Image.open(file, formats=readable_formats()) as image:
            _check_size(name, image)
            if image.format in ("JPEG", "MPO"):
                _check_scans(name, image, path)
            yield image
    except (InputError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        reason = "its content is of no kind that is read"
        raise InputError(f"{name} is no readable image ({reason}); remove it") from error
    except Exception as error:  # damaged files make Pillow raise almost any type
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise InputError(f"{name} is no readable image ({reason}); remove it") from error


def readable_formats() -> tuple[str, ...]:
    """Return those of FORMATS that the installed Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(name: str, image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} is no readable image (it has {width}×{height} pixels); remove it")
    if width * height > most_pixels():
        raise InputError(
            f"{name} is no readable image ({width}×{height} = {width * height:,} pixels, above "
            f"{most_pixels():,}); scale it down"
        )


def most_pixels() -> int:
    """Return the most pixels of an image: MOST_PIXELS, or Pillow's own limit where it is less."""
    return min(MOST_PIXELS, Image.MAX_IMAGE_PIXELS or MOST_PIXELS)


def _check_scans(name: str, image: Image.Image, path: str) -> None:
    """Raise InputError for a JPEG file whose many scans would take too long."""
    with open(path, "rb") as file:
        scans = file.read().count(b"\xff\xda")
    if scans > FEW_SCANS and scans * image.width * image.height > MOST_SCANNED:
        raise InputError(
            f"{name} is no readable image ({image.width}×{image.height} pixels in {scans} scans); "
            "store it again"
        )


# What is done, and said -------------------------------------------------------------------------


def _first_frame(image: Image.Image) -> tuple[str, ...]:
    if not getattr(image, "is_animated", False):  # `n_frames` would go through all of them
        return ()
    image.seek(0)
    return ("the first of several frames or pages",)


def _upright(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Load an image and turn it as EXIF says; say whether that did anything."""
    orientations = [_tag(image, ExifTags.Base.Orientation, 1)]  # Pillow heeds TIFF's by loading
    image.load()
    try:
        orientations.append(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels of such files are sound, as many old photographs show
        return image, ("taken as stored, for damaged EXIF data",)
    if all(orientation not in range(2, 9) for orientation in orientations):
        return image, ()
    return ImageOps.exif_transpose(image), ("turned upright, as EXIF says",)


def _lost_bits(image: Image.Image) -> tuple[str, ...]:
    """Say where Pillow reads 8 bits of 16, as it does of several channels."""
    deep = any(b > 8 for b in _tag(image, BITS_PER_SAMPLE, ()))
    for tile in image.tile:
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        deep |= ";16" in str(arguments[0]) if arguments else False
    if deep and not image.mode.startswith(DEEP):
        return ("of 16 bits per channel, of which 8 are read",)
    return ()


def _tag(image: Image.Image, tag: int, default):
    """Return a tag of a TIFF file, else the default."""
    return image.tag_v2.get(tag, default) if hasattr(image, "tag_v2") else default


def _stated_bits(image: Image.Image) -> int | None:
    """Return the bits per value that a TIFF file of fewer than 16 states."""
    bits = _tag(image, BITS_PER_SAMPLE, (16,))[0]
    return bits if bits < 16 else None


def _is_inverted(image: Image.Image) -> bool:
    """Tell whether 0 is white in a file of 16 bits, which Pillow heeds up to 8 bits only."""
    return image.mode.startswith("I") and _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO


def _highest(path: str, mode: str, values: np.ndarray, stated, given: int | None) -> int:
    """Return the value of white of a file of integers or floats; check that it is known.

    stated: bits per value that the file states; given: those that the user gives; or None.
    """
    name, highest = printable(path), 1
    if mode.startswith("I"):
        highest = 2 ** (stated or given or 16) - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= highest):
        kind = DepthError if stated is None and given is not None and low >= 0 else InputError
        raise kind(
            f"{name} holds {low:g} to {high:g}, but images of kind {mode} are read from 0 to "
            f"{highest}; rescale it"
        )
    used = int(high).bit_length()
    if mode.startswith("I") and stated is None and given is None and used <= DOUBTFUL_BITS:
        raise DepthError(
            f"{name} holds values up to {int(high)}, {used} bits of 16, and does not say which is "
            "white"
        )
    return highest


def _eight_bit(image: Image.Image, mode: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert an image to L or RGB, on black where it is transparent; say what was done."""
    is_grey = mode in GREY_MODES
    done: tuple[str, ...] = ()
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        if layers.getextrema()[3][0] < 255:
            done = ("partly transparent and laid on black",)
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(ground, layers).convert("RGB")
    if mode == "LAB":
        image = _from_lab(image)
    name = CONVERSIONS.get(mode)
    if name is not None:
        done += (f"converted from {name}",)
    return image.convert("L" if is_grey else "RGB"), done


#: Modes whose conversion to RGB is not a matter of course: mode → its name in the field.
CONVERSIONS = {"CMYK": "CMYK without a colour profile", "LAB": "CIELAB", "YCbCr": "YCbCr"}


def _from_lab(image: Image.Image) -> Image.Image:
    """Convert CIELAB to sRGB, which Image.convert cannot."""
    from PIL import ImageCms  # optional in Pillow; an ImportError of it becomes a refusal

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
    assert converted is not None  # only in place does it return nothing
    return converted


def _with_channels(path: str, pixels: Tensor, channels: int) -> tuple[Tensor, tuple[str, ...]]:
    """Copy one channel to three, or take one of three equal ones; say which."""
    if pixels.shape[0] < channels:
        return pixels.expand(channels, -1, -1), ("grey and copied to three channels",)
    if pixels.shape[0] == channels:
        return pixels, ()
    if not (pixels == pixels[:1]).all():
        raise ColourError(f"{printable(path)} is in colour, among grey ones")
    return pixels[:1], ("of three equal channels and read as grey",)
