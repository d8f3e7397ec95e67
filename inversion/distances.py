"""Distances between the candidate's gradient and the target's.

All take two gradients as sequences of tensors (one per parameter, same shapes), read them as one
long vector, and are 0 where the gradients are equal. A distance is two functions: its value,
differentiable, and value and cotangent ∂distance/∂gradient together in closed form, which need
no graph over all parameters. The tests hold the second to the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def joint_norm(gradient: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors read as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))


def _norms(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return both norms, at least the smallest number whose square is not rounded to 0."""
    smallest = torch.finfo(gradient[0].dtype).tiny ** 0.5
    return joint_norm(gradient).clamp_min(smallest), joint_norm(target).clamp_min(smallest)


def cosine_distance(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Return 1 − cos of the angle between the gradients, in [0, 2] (Geiping et al., 2020, eq. 4).

    It is computed as half the squared distance of the unit vectors, which is the same number but
    does not lose its digits near 0, where 1 − cos is a difference of nearly equal numbers.
    """
    norm, target_norm = _norms(gradient, target)
    gaps = (g / norm - t / target_norm for g, t in zip(gradient, target, strict=True))
    return 0.5 * sum((gap.square().sum() for gap in gaps), norm.new_zeros(()))


def cosine_with_cotangent(
    gradient: Sequence[Tensor], target: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return `cosine_distance` d and its cotangent.

    With n = ‖g‖ and m = ‖g*‖ the difference of the unit vectors is r = g/n − g*/m, and since
    ⟨g/n, r⟩ = d the cotangent is (r − d g/n) / n.
    """
    norm, target_norm = _norms(gradient, target)
    ratio = target_norm / norm
    gaps = [torch.addcmul(t, g, ratio, value=-1) for g, t in zip(gradient, target, strict=True)]
    distance = 0.5 * (joint_norm(gaps) / target_norm).square()  # the gaps are −m r
    scale, share = -1 / (norm * target_norm), distance / norm.square()
    for gap, g in zip(gaps, gradient, strict=True):
        gap.mul_(scale).addcmul_(g, share, value=-1)
    return distance, gaps


def squared_l2(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Return the squared Euclidean distance ‖g − g*‖² (DLG, Zhu et al., 2019), ≥ 0."""
    squares = ((g - t).square().sum() for g, t in zip(gradient, target, strict=True))
    return sum(squares, gradient[0].new_zeros(()))


def squared_l2_with_cotangent(
    gradient: Sequence[Tensor], target: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return `squared_l2` and its cotangent 2 (g − g*)."""
    gaps = [g - t for g, t in zip(gradient, target, strict=True)]
    return joint_norm(gaps).square(), [gap.mul_(2) for gap in gaps]


def cosine_from_products(square: Tensor, product: Tensor, target_square: float) -> Tensor:
    """Return `cosine_distance` from ‖g‖², ⟨g, g*⟩ and ‖g*‖², which should be float64."""
    smallest = torch.finfo(square.dtype).tiny
    return 1 - product / (square.clamp_min(smallest) * target_square).sqrt()


def squared_l2_from_products(square: Tensor, product: Tensor, target_square: float) -> Tensor:
    """Return `squared_l2` from ‖g‖², ⟨g, g*⟩ and ‖g*‖², which should be float64."""
    return square - 2 * product + target_square


@dataclass(frozen=True)
class Distance:
    """Holds the functions of one gradient distance."""

    #: (gradient, target) → distance, a differentiable scalar.
    value: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    #: (gradient, target) → the same distance and its derivative by the gradient, without a graph.
    with_cotangent: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
    #: (‖g‖², ⟨g, g*⟩, ‖g*‖²) → distances, for many gradients g at once. None for a distance that is
    #: no function of these; `combine` then evaluates combinations one by one.
    from_products: Callable[[Tensor, Tensor, float], Tensor] | None = None


#: name in `inversion.settings.GRADIENT_DISTANCES` → Distance.
GRADIENT_DISTANCES = {
    "sim": Distance(cosine_distance, cosine_with_cotangent, cosine_from_products),
    "L2": Distance(squared_l2, squared_l2_with_cotangent, squared_l2_from_products),
}
