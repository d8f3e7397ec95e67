"""Linear least squares: of a matrix, and over equations that are given as functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def least_norm(matrix: Tensor, target: Tensor) -> Tensor:
    """Return the x (n, c) of the least norm that lessens ‖matrix x − target‖ most.

    matrix: (m, n), of any rank; target: (m, c). On the CPU wherever they lie: torch has no method
    for matrices of less than full rank elsewhere.
    """
    found = torch.linalg.lstsq(matrix.cpu(), target.cpu(), driver="gelsd").solution
    return found.to(matrix)


@dataclass(frozen=True)
class Equations:
    """Holds linear equations forward(u) = target, the transpose of forward, and their weight."""

    forward: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]
    target: Tensor
    #: Their weight in the sum of squares.
    weight: float


def relative(
    forward: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor], target: Tensor
) -> Equations:
    """Return equations with the weight 1 / ‖target‖², 0 where there is nothing to meet."""
    return Equations(forward, transpose, target, inverse_square(target))


def inverse_square(target: Tensor) -> float:
    """Return 1 / ‖target‖², or 0 for a target of zeros."""
    square = target.square().sum().item()
    return 1 / square if square > 0 else 0.0


def known_entries(known: Tensor, value: Tensor) -> Equations:
    """Return the equations u = value where known (0 or 1, of u's shape) is 1."""
    return relative(lambda u: u * known, lambda r: r * known, value * known)


def conjugate_gradients(
    equations: Sequence[Equations],
    start: Tensor,
    steps: int,
    tolerance: float = 1e-13,
    precondition: Callable[[Tensor], Tensor] = lambda slope: slope,
) -> Tensor:
    """Improve `start` to lessen Σ weight ‖forward(u) − target‖² by CGLS, `steps` times at most.

    Conjugate gradients on the normal equations (Hestenes & Stiefel, 1952); it ends where their
    residual has fallen to `tolerance` of the first one. precondition: a symmetric positive map near
    the inverse of the normal equations.
    """
    u = start
    left = [e.target - e.forward(u) for e in equations]

    def pulled(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [e.weight * e.transpose(r) for e, r in zip(equations, values, strict=True)]
        ).sum(0)

    slope = pulled(left)
    direction = precondition(slope)
    square = (slope * direction).sum()
    first = square
    for _ in range(steps):
        if not square > tolerance**2 * first:
            break
        along = [e.forward(direction) for e in equations]
        curvature = sum(e.weight * a.square().sum() for e, a in zip(equations, along, strict=True))
        if not curvature > 0:
            break
        rate = square / curvature
        u = u + rate * direction
        left = [r - rate * a for r, a in zip(left, along, strict=True)]
        slope = pulled(left)
        better = precondition(slope)
        new = (slope * better).sum()
        direction, square = better + (new / square) * direction, new
    return u
