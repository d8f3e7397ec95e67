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

from models.comparing import above_zero, cosine_distance, joint_norm


@dataclass(frozen=True)
class Aim:
    """Holds the gradient that candidates are compared with, or a part of it.

    Outside the part the candidates' gradients are 0. The target's need not be 0 there: noise may
    have been added to it.
    """

    gradient: tuple[Tensor, ...]
    #: Norm of the whole target, at least the smallest number whose square is not rounded to 0.
    norm: Tensor
    #: Squared norm of the target outside the part.
    outside: Tensor

    @staticmethod
    def at(target: Sequence[Tensor]) -> "Aim":
        """Aim at the whole of a gradient."""
        norm = above_zero(joint_norm(target))
        return Aim(tuple(target), norm, torch.zeros_like(norm))

    def within(self, parts: Sequence[tuple[slice, ...] | None]) -> "Aim":
        """Aim at the same gradient, of which candidates have only a part per parameter."""
        kept, outside = [], self.outside
        for target, part in zip(self.gradient, parts, strict=True):
            kept.append(target if part is None else target[part].contiguous())
            if part is not None:
                rest = target.clone()
                rest[part] = 0
                outside = outside + torch.linalg.vector_norm(rest).square()
        return Aim(tuple(kept), self.norm, outside)


def cosine_with_cotangent(
    gradient: Sequence[Tensor], aim: Aim, *, overwrite: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return `cosine_distance` d and its cotangent.

    With n = ‖g‖ and m = ‖g*‖ the difference of the unit vectors is r = g/n − g*/m, and since
    ⟨g/n, r⟩ = d the cotangent is (r − d g/n) / n. With the gap p = g* − g m/n it is
    −(1 − d)/(n m) p − d/(n m) g*. overwrite: the cotangent takes the gradient's memory.
    """
    norm = above_zero(joint_norm(gradient))
    gaps = _gaps(gradient, aim.gradient, -aim.norm / norm, overwrite)
    square = joint_norm(gaps).square() + aim.outside
    distance = 0.5 * square / aim.norm.square()
    both = 1 / (norm * aim.norm)
    scale, share = (distance - 1) * both, -distance * both
    for gap, target in zip(gaps, aim.gradient, strict=True):
        gap.mul_(scale).addcmul_(target, share)
    return distance, gaps


def _gaps(
    gradient: Sequence[Tensor], target: Sequence[Tensor], factor: Tensor, overwrite: bool
) -> list[Tensor]:
    """Return target + factor · gradient, in new memory or in the gradient's."""
    scaled = [g.mul_(factor) if overwrite else g * factor for g in gradient]
    return [gap.add_(t) for gap, t in zip(scaled, target, strict=True)]


def squared_l2(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Return the squared Euclidean distance ‖g − g*‖² (DLG, Zhu et al., 2019), ≥ 0."""
    squares = ((g - t).square().sum() for g, t in zip(gradient, target, strict=True))
    return sum(squares, gradient[0].new_zeros(()))


def squared_l2_with_cotangent(
    gradient: Sequence[Tensor], aim: Aim, *, overwrite: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return `squared_l2` and its cotangent 2 (g − g*). overwrite: as in cosine_with_cotangent."""
    both = zip(gradient, aim.gradient, strict=True)
    gaps = [g.sub_(t) if overwrite else g - t for g, t in both]
    return joint_norm(gaps).square() + aim.outside, [gap.mul_(2) for gap in gaps]


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
    #: (gradient, aim, overwrite=) → the same distance and its derivative by the gradient, without a
    #: graph.
    with_cotangent: Callable[..., tuple[Tensor, list[Tensor]]]
    #: (‖g‖², ⟨g, g*⟩, ‖g*‖²) → distances, for many gradients g at once. None for a distance that is
    #: no function of these; `combine` then evaluates combinations one by one.
    from_products: Callable[[Tensor, Tensor, float], Tensor] | None = None


#: name in `inversion.settings.GRADIENT_DISTANCES` → Distance.
GRADIENT_DISTANCES = {
    "sim": Distance(cosine_distance, cosine_with_cotangent, cosine_from_products),
    "L2": Distance(squared_l2, squared_l2_with_cotangent, squared_l2_from_products),
}
