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

from models.comparing import cosine_distance, joint_norm, norms_above_zero


def cosine_with_cotangent(
    gradient: Sequence[Tensor], target: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return `cosine_distance` d and its cotangent.

    With n = ‖g‖ and m = ‖g*‖ the difference of the unit vectors is r = g/n − g*/m, and since
    ⟨g/n, r⟩ = d the cotangent is (r − d g/n) / n.
    """
    norm, target_norm = norms_above_zero(gradient, target)
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
