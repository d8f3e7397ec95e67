"""Distances between the candidate's gradient and the target's.

Both take two gradients as sequences of tensors (one a parameter, same shapes) and read them as
one long vector. They return a differentiable scalar, 0 where the gradients are equal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def joint_norm(gradient: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors read as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))


def cosine_distance(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """1 − cos of the angle between the gradients, in [0, 2] (Geiping et al., 2020, eq. 4).

    Computed as half the squared distance of the unit vectors, which is the same number but
    does not lose its digits near 0, where 1 − cos is a difference of nearly equal ones.
    """
    smallest = torch.finfo(gradient[0].dtype).tiny
    norm = joint_norm(gradient).clamp_min(smallest)
    target_norm = joint_norm(target).clamp_min(smallest)
    return 0.5 * sum(
        (g / norm - t / target_norm).square().sum() for g, t in zip(gradient, target, strict=True)
    )


def squared_l2(gradient: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean distance ‖g − g*‖² (Zhu et al., 2019, eq. 4), ≥ 0."""
    return sum((g - t).square().sum() for g, t in zip(gradient, target, strict=True))


#: `--gradient-loss-fun`: name → distance(gradient, target).
GRADIENT_DISTANCES = {"sim": cosine_distance, "L2": squared_l2}
