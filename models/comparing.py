"""Compares gradients, each read as one long vector: norms, angles, and whether a batch gave one."""

from collections.abc import Sequence

import torch
from torch import Tensor

#: Cosine distance up to which two gradients can be those of one batch but for rounding, the share
#: of a flat batch's distance that it must stay below, and the distance that is only rounding: of
#: the computation, and of the numbers sent, in squares of their relative rounding error.
SAME_BATCH, SHARE_OF_FLAT, ROUNDING, ROUNDED_BY = 1e-3, 0.1, 1e-10, 0.1


def joint_norm(gradient: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors read as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))


def float64_norm(gradient: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all tensors read as one vector, summed in float64."""
    return sum(g.double().square().sum().item() for g in gradient) ** 0.5


def above_zero(norm: Tensor) -> Tensor:
    """Return a norm, at least the smallest number whose square is not rounded to 0."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny ** 0.5)


def cosine_distance(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Return 1 − cos of the angle between the gradients, in [0, 2] (Geiping et al., 2020, eq. 4).

    It is computed as half the squared distance of the unit vectors, which is the same number but
    does not lose its digits near 0, where 1 − cos is a difference of nearly equal numbers.
    """
    norm, target_norm = (above_zero(joint_norm(each)) for each in (gradient, target))
    gaps = (g / norm - t / target_norm for g, t in zip(gradient, target, strict=True))
    return 0.5 * sum((gap.square().sum() for gap in gaps), norm.new_zeros(()))


def same_batch_limit(of_flat: float, resolution: float) -> float:
    """Return the cosine distance up to which two gradients can be those of one batch.

    How near the gradients of different images lie depends on the network: those of a random LeNet
    have a distance of 1e-5 where the labels are equal. So the distance must also be far below
    `of_flat`, that of flat images of the same labels and mean colours. resolution: relative
    rounding error of the numbers compared.
    """
    rounding = max(ROUNDING, ROUNDED_BY * resolution**2)
    return min(SAME_BATCH, max(rounding, SHARE_OF_FLAT * of_flat))
