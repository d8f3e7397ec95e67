"""Decodes activations linearly: ridge regression from them to pixels, learned on public images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from inversion.layerwise.front import Front

#: Side of the square of positions that a patch is decoded from, odd.
NEIGHBOURHOOD = 3
#: One position in so many is used of an image at least, or more images are seen than help.
_THINNEST = 4
#: The most public images, and features of theirs, that are computed at once.
_IMAGES, _NUMBERS = 32, 2**24
#: Multiplications that the normal equations may take, which bounds the rows of the regression.
_WORK = 4e10


@dataclass(frozen=True)
class Decoder:
    """Holds a linear map from the activations around a position to the pixels it stands for."""

    #: (features, channels · pixels of a patch) of float64.
    weights: Tensor = field(repr=False)
    #: (features,): the mean of the features that the regression saw.
    feature_mean: Tensor = field(repr=False)
    #: (channels · pixels of a patch,): the mean of the patches.
    pixel_mean: Tensor = field(repr=False)
    #: (C, h, w), or (d, 1, 1) for activations (B, d): their mean over the public images.
    activation_mean: Tensor = field(repr=False)
    #: (C, H, W) of the images.
    image_shape: tuple[int, int, int]
    #: (C, 1, 1) each: the box of the images.
    box: tuple[Tensor, Tensor] = field(repr=False)


def linear_decoder(
    front: Front,
    name: str,
    low: Tensor,
    high: Tensor,
    public: Tensor,
    *,
    ridge: float,
    generator: Generator,
) -> Decoder:
    """Learn to decode the activation `name` of a front, by ridge regression on public images.

    A map of h × w positions cuts the images into as many patches of ⌈H/h⌉ × ⌈W/w⌉ pixels, evenly
    spread; where the sides do not divide, patches overlap and are averaged. Position by position,
    with the same weights, the patch is decoded from the channels of the NEIGHBOURHOOD ×
    NEIGHBOURHOOD positions around it, with zeros outside of the map. An activation (B, d) is a map
    of one position. The penalty is `ridge` times the mean diagonal of the features' centred Gram
    matrix, so it does not depend on their unit; the mean is not penalised.

    public: (M, C, H, W) normalised; one `augmented` version of each is seen. low, high: (C, 1, 1),
    the box. The front runs in the type of `public`, the rest is float64. Where the normal equations
    would take more than 4e10 multiplications, fewer positions per image are used, drawn from
    `generator`; were these fewer than a fourth of all, only the first images are used. With fewer
    rows than features the dual problem is solved. Memory: the square of the smaller of both numbers
    and features × patch, both twice (512 channels make a square of 170 MB), in the dual also all
    rows, and the activations of 32 images.
    """
    shape = (public.shape[1], public.shape[2], public.shape[3])
    with torch.no_grad():
        one = _maps(front(public[:1])[name])
        positions = one.shape[-2] * one.shape[-1]
        features = _features(one).shape[-1]
        sums = [one.new_zeros(one.shape[1:], dtype=torch.float64)]
        most = _rows_within_budget(features)
        seen = public[: math.ceil(_THINNEST * most / positions)]
        images = augmented(seen, low, high, generator)
        used = min(positions, math.ceil(most / len(images)))

        def chunks() -> Iterator[tuple[Tensor, Tensor]]:
            at_once = max(1, min(_IMAGES, _NUMBERS // (positions * features)))
            for part in images.split(at_once):
                maps = _maps(front(part)[name])
                sums[0] += maps.double().sum(0)
                order = torch.randperm(positions, generator=generator, device=generator.device)
                chosen = order[:used].to(maps.device)
                x = _features(maps)[:, chosen]
                y = _patches(part, (maps.shape[-2], maps.shape[-1]))[:, chosen]
                yield x.flatten(0, 1).double(), y.flatten(0, 1).double()

        rows = used * len(images)
        solved = _dual(chunks(), ridge) if rows < features else _primal(chunks(), rows, ridge)
    return Decoder(*solved, sums[0] / len(images), shape, (low, high))


def decode(decoder: Decoder, activations: Tensor) -> Tensor:
    """Return the images of activations (B, C, h, w) or (B, d): (B, C, H, W) of float64, boxed."""
    maps = _maps(activations).double()
    rows = _features(maps) - decoder.feature_mean
    patches = rows @ decoder.weights + decoder.pixel_mean
    images = _from_patches(patches, (maps.shape[-2], maps.shape[-1]), decoder.image_shape)
    low, high = (value.to(images) for value in decoder.box)
    return images.clamp(low, high)


def mean_decoding(decoder: Decoder, count: int) -> Tensor:
    """Return `count` times the image of the mean public activation: what the decoder alone makes.

    It is a control: (count, C, H, W) of float64 that have seen nothing of a client.
    """
    return decode(decoder, decoder.activation_mean[None]).repeat(count, 1, 1, 1)


def augmented(images: Tensor, low: Tensor, high: Tensor, generator: Generator) -> Tensor:
    """Return normalised images (M, C, H, W) with other contrast and brightness, half mirrored.

    Contrast is a factor in [0.3, 1.5] per image; brightness adds N(0, 0.6²) per image and channel,
    in normalised units. The box of `low` and `high` (C, 1, 1) clamps them.
    """
    options = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    count, channels = images.shape[:2]
    mirrored = torch.rand(count, 1, 1, 1, **options).to(images) < 0.5
    contrast = 0.3 + 1.2 * torch.rand(count, 1, 1, 1, **options).to(images)
    brightness = 0.6 * torch.randn(count, channels, 1, 1, **options).to(images)
    changed = torch.where(mirrored, images.flip(-1), images) * contrast + brightness
    return changed.clamp(low.to(images), high.to(images))


def _primal(
    chunks: Iterator[tuple[Tensor, Tensor]], rows: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Regress centred targets on centred features: weights, mean of features, mean of targets."""
    first, targets = next(chunks)
    first = F.pad(first, (0, 1), value=1.0)  # a column of ones, for the sums
    gram, cross = first.T @ first, first.T @ targets
    for x, y in chunks:
        x = F.pad(x, (0, 1), value=1.0)
        gram.addmm_(x.T, x)
        cross.addmm_(x.T, y)
    x_mean, y_mean = gram[-1, :-1] / rows, cross[-1] / rows
    gram = gram[:-1, :-1].addr_(x_mean, x_mean, alpha=-rows)
    cross = cross[:-1].addr_(x_mean, y_mean, alpha=-rows)
    return _solve(gram, cross, ridge * gram.trace() / len(gram)), x_mean, y_mean


def _dual(chunks: Iterator[tuple[Tensor, Tensor]], ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_primal` does, by a system of as many equations as there are rows."""
    x, y = (torch.cat(values) for values in zip(*chunks, strict=True))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x -= x_mean
    gram = x @ x.T
    return x.T @ _solve(gram, y - y_mean, ridge * gram.trace() / x.shape[1]), x_mean, y_mean


def _solve(gram: Tensor, right: Tensor, penalty: Tensor) -> Tensor:
    gram.diagonal().add_(penalty)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def _rows_within_budget(features: int) -> int:
    """Return how many rows the regression may have: R·k² or, dual with R < k, R²·k."""
    primal = _WORK / features**2
    return int(primal if primal >= features else (_WORK / features) ** 0.5)


def _maps(activations: Tensor) -> Tensor:
    return activations[..., None, None] if activations.dim() == 2 else activations


def _features(maps: Tensor) -> Tensor:
    """Return the neighbourhoods of all positions: (B, h · w, features)."""
    sides = [min(NEIGHBOURHOOD, 2 * side - 1) for side in maps.shape[-2:]]
    return F.unfold(maps, sides, padding=[side // 2 for side in sides]).transpose(1, 2)


def _patches(images: Tensor, positions: tuple[int, int]) -> Tensor:
    """Return the patches of images (B, C, H, W): (B, h · w, C · pixels)."""
    index = _pixels_of(positions, images.shape[-2:]).to(images.device)
    return images.flatten(2)[:, :, index].transpose(1, 2).flatten(2)


def _from_patches(patches: Tensor, positions: tuple[int, int], image_shape) -> Tensor:
    """Put patches (B, h · w, C · pixels) together, averaged where they overlap: (B, C, H, W)."""
    channels, *sides = image_shape
    index = _pixels_of(positions, sides).to(patches.device)
    values = patches.unflatten(2, (channels, -1)).transpose(1, 2).flatten(2)
    total = values.new_zeros(len(values), channels, math.prod(sides))
    total.index_add_(2, index.flatten(), values)
    return (total / index.flatten().bincount(minlength=total.shape[-1])).unflatten(2, sides)


def _pixels_of(positions: tuple[int, int], sides) -> Tensor:
    """Return the flat indices of the pixels of every position's patch: (h · w, pixels)."""
    rows, columns = (_pixels_of_axis(*axis) for axis in zip(positions, sides, strict=True))
    both = rows[:, None, :, None] * sides[1] + columns[None, :, None, :]
    return both.flatten(2).flatten(0, 1)


def _pixels_of_axis(positions: int, side: int) -> Tensor:
    length = -(-side // positions)
    starts = torch.linspace(0, side - length, positions, dtype=torch.float64).round().long()
    return starts[:, None] + torch.arange(length)
