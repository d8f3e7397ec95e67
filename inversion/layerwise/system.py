"""Sets up all equations about a tensor as normal equations that conjugate gradients solve fast.

The gradients' equations are whitened, so that they project, and the known outputs weigh alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inversion.layerwise.convolution import (
    Term,
    stacked_gradients,
    stacked_matrices,
    term_equations,
)
from inversion.layerwise.least_squares import Equations, largest_value

#: Singular values of the gradients' equations, in shares of the largest, that get half the weight.
HALF = 1e-3
#: Weight of the known outputs' strongest direction, in units of the gradients'.
OUTPUTS = 4.0
#: Share of what is left to which float32 lessens it before that is computed anew, and the share
#: above which it was of no use.
ONCE, STALLED = 1e-5, 0.5


@dataclass(frozen=True)
class System:
    """Holds the normal equations N u = r of all that is known of a tensor but its known entries."""

    shape: Sequence[int]
    #: u → N u.
    normal: Callable[[Tensor], Tensor]
    #: r, (B, I, H, W).
    right: Tensor
    #: Errors of the gradients' rows, each in shares of its gradient's norm, and one tensor of
    #: errors per term with known outputs → the error of r.
    error: Callable[[Tensor, Sequence[Tensor]], Tensor]
    #: Equations: the gradients' and those of the known outputs.
    equations: int
    #: What the equations are solved for → u, where that is u in other coordinates.
    to_input: Callable[[Tensor], Tensor] = lambda y: y
    #: `normal` in float32, where that is faster; None elsewhere.
    rough: Callable[[Tensor], Tensor] | None = None


def joint_system(terms: Sequence[Term], shape: Sequence[int]) -> System:
    """Return the equations of all terms about u (B, I, H, W) = shape, weighted for solving.

    With M (rows, B·H·W) the gradients' matrix and L Lᵀ = M Mᵀ + δ, the gradients' part is
    L⁻¹ M u = L⁻¹ g: its normal equations are near the projector onto the row space of M. Every
    known output counts alike.
    """
    count, channels, height, width = shape
    matrix = stacked_matrices(terms, shape)
    gram = matrix @ matrix.T
    largest = largest_value(lambda v: gram @ v, gram[:, 0])
    gram.diagonal().add_(max(HALF**2 * largest, 1e-300))
    factor = torch.linalg.cholesky(gram)
    white = torch.linalg.solve_triangular(factor, matrix, upper=False)
    projector = white.T @ white if 2 * len(white) > white.shape[1] else None
    outputs = [found[1] for term in terms if len(found := term_equations(term, shape)) > 1]
    weights = [OUTPUTS / _largest(known, matrix.new_ones(list(shape))) for known in outputs]

    def spread(numbers: Tensor) -> Tensor:
        return numbers.reshape(channels, count, height, width).transpose(0, 1)

    def normal(u: Tensor) -> Tensor:
        flat = u.transpose(0, 1).reshape(channels, -1)
        found = spread(flat @ projector if projector is not None else flat @ white.T @ white)
        for known, weight in zip(outputs, weights, strict=True):
            found = found + weight * known.transpose(known.forward(u))
        return found

    def transposed(rows: Tensor, values: Sequence[Tensor]) -> Tensor:
        found = spread(torch.linalg.solve_triangular(factor, rows, upper=False).T @ white)
        for known, weight, value in zip(outputs, weights, values, strict=True):
            found = found + weight * known.transpose(value)
        return found

    right = transposed(stacked_gradients(terms), [known.target for known in outputs])
    equations = sum(term.gradient.numel() for term in terms)
    equations += sum(int(term.known.sum()) for term in terms if term.known is not None)
    return System(shape, normal, right, transposed, equations)


def _largest(equations: Equations, like: Tensor) -> float:
    def normal(v: Tensor) -> Tensor:
        return equations.transpose(equations.forward(v.reshape(like.shape))).flatten()

    return largest_value(normal, like.flatten())


def improve(
    system: System, right: Tensor, start: Tensor, free: Tensor, steps: int, enough: float
) -> Tensor:
    """Improve the entries of `start` where free (0/1) is 1, so that N u = right there.

    By conjugate gradients (Hestenes & Stiefel, 1952), until the norm of what is left of the
    equations is `enough`, or for that many steps. All tensors are (B, I, H, W).

    Where the system has a float32 version, that one takes the steps: what is left is computed in
    float64, the steps lessen it by ONCE at most, and then it is computed anew (iterative
    refinement; Wilkinson, 1963).
    """
    u, left = start, free * (right - system.normal(start))
    if system.rough is None:
        return u + descend(system.normal, left, free, steps, enough)[0]
    size = left.norm().item()
    while steps > 0 and size > enough:
        goal = max(ONCE, enough / size)
        change, taken = descend(system.rough, (left / size).float(), free.float(), steps, goal)
        u, steps = u + size * change.double(), steps - taken
        left, last = free * (right - system.normal(u)), size
        size = left.norm().item()
        if taken == 0 or not size < STALLED * last:
            break
    return u


def descend(
    normal: Callable[[Tensor], Tensor], left: Tensor, free: Tensor, steps: int, enough: float
) -> tuple[Tensor, int]:
    """Return the change that `left` asks for, by conjugate gradients from zero, and their number.

    normal: u → N u in the type of `left`, which is 0 where free (0/1) is. For the rest see
    `improve`.
    """
    u, direction, square = torch.zeros_like(left), left, left.square().sum()
    for taken in range(steps):
        if not square > enough**2:
            return u, taken
        pulled = free * normal(direction)
        curvature = (direction * pulled).sum()
        if not curvature > 0:
            return u, taken
        rate = square / curvature
        u = u + rate * direction
        left = left - rate * pulled
        new = left.square().sum()
        direction, square = left + (new / square) * direction, new
    return u, steps
