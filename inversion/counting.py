"""Counts the memory of an evaluation of the objective on shapes alone, before any is taken."""

import copy
from functools import partial

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from inversion.objective import Objective
from inversion.pixel_gradient import PixelGradient, exact_in_chunks
from utils.live_bytes import peak_bytes
from utils.shard import ALONE


class _OnShapes(TorchFunctionMode):
    """Within it a deep copy has tensors of the same shapes on the device "meta": no memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _shape_of(tensor)
            return memo[id(tensor)]
        if func is Tensor.clone:  # by which a parameter is copied
            return _shape_of(args[0])
        return func(*args, **(kwargs or {}))


def _shape_of(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor.detach(), device="meta")
    return made.requires_grad_() if tensor.requires_grad else made


def on_shapes(objective: Objective, images: int) -> Objective:
    """Return the objective for so many images in one process, with shapes in place of tensors."""
    alone = copy.copy(objective)
    alone.batch_shard, alone.consensus, alone.chunk_size = ALONE, None, None
    with _OnShapes():
        shapes = copy.deepcopy(alone)
    shapes.y = shapes.y.new_empty(images, *shapes.y.shape[1:])
    return shapes


def evaluation_bytes(
    pixel_gradient: PixelGradient, objective: Objective, image_shape: tuple[int, ...], images: int
) -> int:
    """Return the most bytes that one evaluation holds at once, beside images, weights and target.

    images: how many (C, H, W) ones this process has. Nothing is computed. Raises what the network
    raises where it cannot be computed on shapes alone.
    """
    shapes = on_shapes(objective, images)
    x = shapes.target_gradient[0].new_empty(images, *image_shape)
    return peak_bytes(partial(pixel_gradient, shapes, x, 0.0))


def chunk_bytes(objective: Objective, image_shape: tuple[int, ...], images: int) -> int:
    """Return the same for `exact` on a batch of which this process takes `images` at a time.

    Two chunks are counted: the one whose graph is kept between the passes, and another.
    """
    shapes = on_shapes(objective, 2 * images)
    shapes.chunk_size = images
    x = shapes.target_gradient[0].new_empty(2 * images, *image_shape)
    return peak_bytes(partial(exact_in_chunks, shapes, x, 0.0))


def measured_bytes(
    pixel_gradient: PixelGradient, objective: Objective, image_shape: tuple[int, ...], images: int
) -> int:
    """Return the same by evaluating one, two and four images, where shapes do not suffice.

    The numbers of two and four are continued along a line.
    """
    alone = copy.copy(objective.afresh())
    alone.batch_shard, alone.consensus, alone.chunk_size = ALONE, None, None
    counts: dict[int, int] = {}
    for few in sorted({min(images, count) for count in (1, 2, 4)}):
        alone.y = objective.y[:few]
        x = objective.target_gradient[0].new_zeros(few, *image_shape)
        x += torch.linspace(-1, 1, image_shape[-1], dtype=x.dtype, device=x.device)
        counts[few] = peak_bytes(partial(pixel_gradient, alone, x, 0.0))
    if images in counts:
        return counts[images]
    return counts[4] + (images - 4) * (counts[4] - counts[2]) // 2
