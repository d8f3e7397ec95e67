"""Linear least squares, of matrices and of functions, and the error of what they find."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor


def least_norm(matrix: Tensor, target: Tensor) -> Tensor:
    """Return the x (n, c) of the least norm that lessens ‖matrix x − target‖ most.

    matrix: (m, n), of any rank; target: (m, c). On the CPU wherever they lie: torch has no method
    for matrices of less than full rank elsewhere.

    Raises torch.linalg.LinAlgError for numbers that are not finite.
    """
    if not (matrix.isfinite().all() and target.isfinite().all()):  # LAPACK's own check says less
        raise torch.linalg.LinAlgError("least squares of numbers that are not finite")
    found = torch.linalg.lstsq(matrix.cpu(), target.cpu(), driver="gelsd").solution
    return found.to(matrix)


def memory_of_system(rows: int, columns: int) -> int:
    """Return the bytes that a system of so many equations and unknowns takes while it is solved.

    About: the matrix and the factors of its decomposition, and four square matrices over the
    unknowns, of float64.
    """
    return 8 * (3 * rows * columns + 4 * columns**2)


def disturbed(g: Tensor, error: float, generator: torch.Generator) -> Tensor:
    """Add random numbers to a tensor, whose norm is `error` of the tensor's."""
    noise = torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g)
    return g + error * g.norm() / noise.norm() * noise


@dataclass(frozen=True)
class Propagation:
    """Says how errors of equations A x = b become errors of the x that solves them best.

    With independent errors of variance v in b, E ‖δx‖² = v tr (AᵀA)⁻¹; an unbiased estimate of v
    is what x leaves, ‖A x − b‖², divided by the number of equations less that of unknowns (the
    theory of linear regression).
    """

    #: tr (AᵀA)⁻¹.
    trace: float
    equations: int
    #: Unknowns that they determine.
    rank: int

    def squared_error(self, left: float, allowed: float) -> float:
        """Return E ‖δx‖² from ‖A x − b‖² and from the square that errors of b alone would have.

        The larger of the two estimates of v counts: as many unknowns as equations leave nothing,
        whatever their errors.
        """
        spare = self.equations - self.rank
        variance = max(left / spare if spare > 0 else 0.0, allowed / self.equations)
        return variance * self.trace


def fast_in_single(like: Tensor) -> bool:
    """Tell whether float32 is several times faster than float64 where this tensor lies.

    So it is on CPUs, whose convolutions have fast kernels for float32 alone. On a GPU float32 may
    stand for a narrower type.
    """
    return like.device.type == "cpu"


def add_gram(normal: Tensor, rows: Tensor, factor: float) -> None:
    """Add factor · rows rowsᵀ to the lower triangle of a matrix (n, n) in place; rows: (n, m).

    Both are float64 and contiguous. On the CPU the upper triangle, which is half of the work, is
    left as it is.
    """
    if normal.device.type != "cpu":
        normal.addmm_(rows, rows.T, alpha=factor)
    elif rows.shape[1]:  # what is the lower triangle row by row is the upper one for BLAS
        dsyrk(factor, rows.numpy().T, 1.0, normal.numpy().T, trans=1, overwrite_c=1)


#: Share of the largest eigenvalue below which a direction counts as open.
OPEN = 1e-10


def solve_symmetric(normal: Tensor, right: Tensor) -> tuple[Tensor, int, float, float]:
    """Solve positive semi-definite equations: solution, rank, trace of the inverse, condition.

    The condition is that of the equations whose normal equations these are: its root.

    By Cholesky's factors where the matrix has full rank, which its least eigenvalue tells (by
    inverse iteration), else by the eigenvectors that count.
    """
    factor, failed = torch.linalg.cholesky_ex(normal)
    if not bool(failed):
        largest = largest_value(lambda v: normal @ v, right)
        least = 1 / largest_value(lambda v: torch.cholesky_solve(v[:, None], factor)[:, 0], right)
        if least > OPEN * largest:
            found = torch.cholesky_solve(right[:, None], factor)[:, 0]
            trace = _trace(lambda v: torch.cholesky_solve(v, factor), right)
            return found, len(right), trace, (largest / least) ** 0.5
    values, vectors = torch.linalg.eigh(normal)
    kept = values > OPEN * values[-1]
    if not bool(kept.any()):
        return torch.zeros_like(right), 0, 0.0, 1.0
    found = vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept])
    condition = (values[-1] / values[kept][0]).sqrt().item()
    return found, int(kept.sum()), values[kept].reciprocal().sum().item(), condition


#: Singular values of equations, in shares of the largest, down to which their normal equations are
#: solved instead: float64 then keeps nine digits.
WELL = 1e-3


def solve_well(normal: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Solve many normal equations (N, r, r) x = right (N, r); return x, and which are well solved.

    By Cholesky's factors L, without a loop. ‖A⁻¹‖ ≤ ‖L⁻¹‖², so that the eigenvalues of A are at
    least 1/‖L⁻¹‖² in Frobenius' norm, and at most the trace: a system whose quotient of both is
    below the square of WELL, or whose matrix is not definite, is not well solved, (N,).
    """
    factor, failed = torch.linalg.cholesky_ex(normal)
    unit = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    inverse = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)
    least = 1 / inverse.square().sum((1, 2))
    well = (failed == 0) & (least > WELL**2 * normal.diagonal(dim1=1, dim2=2).sum(1))
    found = (inverse.mT @ (inverse @ right[..., None]))[..., 0]
    return found, well & found.isfinite().all(1)


#: Vectors by which a trace is estimated.
PROBES = 8


def _trace(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Estimate the trace of a symmetric map by probing it with random signs (Hutchinson, 1989)."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(like), PROBES), generator=generator)
    probes = (2 * signs - 1).to(like)
    return (probes * apply(probes)).sum().item() / PROBES


def largest_value(apply: Callable[[Tensor], Tensor], like: Tensor, rounds: int = 20) -> float:
    """Return the largest eigenvalue of a symmetric map, by power iteration from a fixed start."""
    v = torch.linspace(0.5, 1.5, len(like), dtype=like.dtype, device=like.device)
    size = 0.0
    for _ in range(rounds):
        v = apply(v / v.norm())
        size = v.norm().item()
    return max(size, 1e-300)


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
