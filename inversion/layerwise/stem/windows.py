"""Reads what max-pooled values say about the map before pooling.

The pooled value of a window bounds every position in it and is taken by one of them. Windows may
overlap. Values count as equal if they differ by a tolerance or less.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pooling:
    """Describes a square max-pooling layer."""

    #: Side of a window.
    kernel: int
    #: Distance between windows.
    stride: int
    #: Rows and columns added at every border, which never hold the maximum.
    padding: int


@dataclass(frozen=True)
class Windows:
    """Holds bounds and candidates of the maxima, per position of the map before pooling."""

    #: (B, O, h, w): the least pooled value of the windows that hold the position, infinite where
    #: no window does.
    bound: Tensor
    #: (B, O, h, w): number of the group of positions of which one attains its bound, −1 for none.
    group: Tensor
    #: Upper end of the groups' numbers.
    num_groups: int


def window_positions(
    pool: Pooling, map_shape: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """Return each window's positions, flat indices into the map: (windows, kernel²), −1 outside."""
    rows, columns = map_shape
    indices = torch.arange(1, rows * columns + 1, dtype=torch.float64, device=device)
    padded = F.pad(indices.view(1, 1, rows, columns), [pool.padding] * 4)
    return F.unfold(padded, pool.kernel, stride=pool.stride)[0].T.round().long() - 1


def bounds(pooled: Tensor, positions: Tensor, map_shape: tuple[int, int]) -> Tensor:
    """Return the least pooled value of the windows that hold each position: (B, O, h, w).

    pooled: (B, O, h', w'); positions: (windows, kernel²) of `window_positions`.
    """
    batch, channels = pooled.shape[:2]
    size = map_shape[0] * map_shape[1]
    least = pooled.new_full((batch * channels, size + 1), torch.inf)  # the last is "outside"
    places = positions.remainder(size + 1).flatten().expand(batch * channels, -1)
    values = pooled.reshape(batch * channels, -1).repeat_interleave(positions.shape[1], 1)
    return least.scatter_reduce(1, places, values, "amin")[:, :size].view(
        batch, channels, *map_shape
    )


def connected_windows(pooled: Tensor, pool: Pooling, tolerance: Tensor) -> Tensor:
    """Label overlapping windows of equal pooled values alike: (B, O, h', w') of window numbers.

    A label is the least flat index (within the map of its image and channel) of the windows that
    are connected by steps between overlapping windows of equal values.
    tolerance: (B, 1, 1, 1).
    """
    rows, columns = pooled.shape[-2:]
    reach = (pool.kernel - 1) // pool.stride
    label = torch.arange(rows * columns, device=pooled.device).view(1, 1, rows, columns)
    label = label.expand(pooled.shape).contiguous()
    steps = [
        (down, right)
        for down in range(-reach, reach + 1)
        for right in range(-reach, reach + 1)
        if (down, right) != (0, 0)
    ]
    margin = [reach] * 4
    values = F.pad(pooled, margin, value=torch.inf)

    def neighbour(padded: Tensor, down: int, right: int) -> Tensor:
        return padded[..., reach + down :, reach + right :][..., :rows, :columns]

    equal = [(neighbour(values, *step) - pooled).abs() <= tolerance for step in steps]
    while True:
        padded, least = F.pad(label, margin), label
        for step, same in zip(steps, equal, strict=True):
            least = torch.where(same, torch.minimum(least, neighbour(padded, *step)), least)
        least = least.flatten(2).gather(2, least.flatten(2)).view_as(least)
        if torch.equal(least, label):
            return label
        label = least


def read_windows(
    pooled: Tensor, pool: Pooling, map_shape: tuple[int, int], tolerance: Tensor
) -> Windows:
    """Find the bounds of all positions, and the groups of positions that hold one maximum each.

    A position may hold a window's maximum only if its bound equals the pooled value. Overlapping
    windows of equal values share their maximum: only positions in all of them remain. If there are
    none, several positions attain the same value (a flat part of the image), and all of them
    remain in one group.

    pooled: (B, O, h', w') ≥ 0; map_shape: (h, w); tolerance: (B, 1, 1, 1), up to where values count
    as equal and as zero.
    """
    batch, channels = pooled.shape[:2]
    positions = window_positions(pool, map_shape, pooled.device)
    bound = bounds(pooled, positions, map_shape)
    label = connected_windows(pooled, pool, tolerance).view(batch * channels, -1, 1)
    inside = positions >= 0
    places = positions.clamp_min(0).flatten().expand(batch * channels, -1)
    value = pooled.reshape(batch * channels, -1, 1)
    limit = tolerance.expand(batch, channels, 1, 1).reshape(-1, 1, 1)
    at_places = bound.reshape(batch * channels, -1).gather(1, places)
    at_places = at_places.view(batch * channels, *positions.shape)
    attains = ((at_places - value).abs() <= limit) & (value > limit) & inside
    attaining = attains.flatten(1)
    labels = label.expand_as(attains).flatten(1)

    size = map_shape[0] * map_shape[1]
    unused = label.shape[1]  # the label of positions that attain no window's value
    members = labels.new_zeros(len(labels), size).scatter_add(1, places, attaining.long())
    own = labels.new_full((len(labels), size), unused).scatter_reduce(
        1, places, torch.where(attaining, labels, unused), "amin"
    )
    windows = labels.new_zeros(len(labels), unused + 1)
    windows.scatter_add_(1, label.squeeze(-1), torch.ones_like(label.squeeze(-1)))
    common = (members == windows.gather(1, own)) & (own < unused)
    shared = windows.new_zeros(windows.shape).scatter_add(1, own, common.long()) > 0
    candidate = (own < unused) & (common | ~shared.gather(1, own))
    first = torch.arange(len(own), device=own.device)[:, None] * unused
    group = torch.where(candidate, own + first, -1)
    return Windows(bound, group.view(bound.shape), len(own) * unused)
