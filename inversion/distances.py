"""Distances between the candidate's gradient and the target's.

All take two gradients as sequences of tensors (one a parameter, same shapes), read them as one
long vector, and are 0 where the gradients are equal. A distance is two functions: its value,
differentiable, and value and cotangent ∂distance/∂gradient together in closed form, which need
no graph over all parameters. The tests hold the second to the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def joint_norm(gradient: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors read as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))


def _norms(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both norms, kept off 0 by the smallest number whose square still counts."""
    smallest = torch.finfo(gradient[0].dtype).tiny ** 0.5
    return joint_norm(gradient).clamp_min(smallest), joint_norm(target).clamp_min(smallest)


def cosine_distance(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """1 − cos of the angle between the gradients, in [0, 2] (Geiping et al., 2020, eq. 4).

    Computed as half the squared distance of the unit vectors, which is the same number but
    does not lose its digits near 0, where 1 − cos is a difference of nearly equal ones.
    """
    norm, target_norm = _norms(gradient, target)
    return 0.5 * sum(
        (g / norm - t / target_norm).square().sum() for g, t in zip(gradient, target, strict=True)
    )


def cosine_with_cotangent(
    gradient: Sequence[Tensor], target: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """`cosine_distance` d and its cotangent.

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
    """Squared Euclidean distance ‖g − g*‖² (DLG, Zhu et al., 2019), ≥ 0."""
    return sum((g - t).square().sum() for g, t in zip(gradient, target, strict=True))


def squared_l2_with_cotangent(
    gradient: Sequence[Tensor], target: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """`squared_l2` and its cotangent 2 (g − g*)."""
    gaps = [g - t for g, t in zip(gradient, target, strict=True)]
    return joint_norm(gaps).square(), [gap.mul_(2) for gap in gaps]


def cosine_from_products(square: Tensor, product: Tensor, target_square: float) -> Tensor:
    """`cosine_distance` from ‖g‖², ⟨g, g*⟩ and ‖g*‖²; give float64."""
    smallest = torch.finfo(square.dtype).tiny
    return 1 - product / (square.clamp_min(smallest) * target_square).sqrt()


def squared_l2_from_products(square: Tensor, product: Tensor, target_square: float) -> Tensor:
    """`squared_l2` from ‖g‖², ⟨g, g*⟩ and ‖g*‖²; give float64."""
    return square - 2 * product + target_square


@dataclass(frozen=True)
class Distance:
    """value(gradient, target); value and cotangent of the same; value from inner products.

    `from_products` takes tensors of ‖g‖² and ⟨g, g*⟩ for many gradients, and ‖g*‖². A distance
    that is no function of them has None there, and combinations are then searched by evaluating
    them.
    """

    value: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    with_cotangent: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
    from_products: Callable[[Tensor, Tensor, float], Tensor] | None = None


#: `--gradient-loss-fun`: name → Distance.
GRADIENT_DISTANCES = {
    "sim": Distance(cosine_distance, cosine_with_cotangent, cosine_from_products),
    "L2": Distance(squared_l2, squared_l2_with_cotangent, squared_l2_from_products),
}
