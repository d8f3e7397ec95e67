"""Factorises block-tridiagonal matrices, solves with them, and computes blocks of their inverses.

The matrices are symmetric and positive definite. Blocks may differ in size, and every block has a
leading batch dimension B. The cost grows with the number of blocks and with the third power of
their size; a dense matrix would cost the third power of both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockTridiagonal:
    """Holds the blocks on and below the diagonal of a symmetric matrix."""

    #: Per block row j its diagonal block, (B, n_j, n_j).
    diagonal: tuple[Tensor, ...]
    #: Per block row j but the last: block (j + 1, j), (B, n_{j+1}, n_j).
    lower: tuple[Tensor, ...]


@dataclass(frozen=True)
class Factor:
    """Holds the Cholesky factor L of a matrix L Lᵀ, which is block bidiagonal."""

    #: Per block row j the lower triangular block L_jj, (B, n_j, n_j).
    diagonal: tuple[Tensor, ...]
    #: Per block row j but the last: L_{j+1,j} transposed, (B, n_j, n_{j+1}).
    upper: tuple[Tensor, ...]


def zeros(sizes: list[int], batch: int, like: Tensor) -> BlockTridiagonal:
    """Return the zero matrix with blocks of the given sizes, of `like`'s dtype and device."""
    return BlockTridiagonal(
        tuple(like.new_zeros(batch, size, size) for size in sizes),
        tuple(
            like.new_zeros(batch, below, size)
            for size, below in zip(sizes[:-1], sizes[1:], strict=True)
        ),
    )


def factorise(matrix: BlockTridiagonal) -> Factor:
    """Compute the Cholesky factor, block row by block row.

    Raises torch.linalg.LinAlgError for a matrix that is not positive definite.
    """
    diagonal, upper = [], []
    pivot = matrix.diagonal[0]
    for j in range(len(matrix.diagonal)):
        diagonal.append(torch.linalg.cholesky(pivot))
        if j + 1 < len(matrix.diagonal):
            coupling = matrix.lower[j].mT
            upper.append(torch.linalg.solve_triangular(diagonal[j], coupling, upper=False))
            pivot = torch.baddbmm(matrix.diagonal[j + 1], upper[j].mT, upper[j], alpha=-1)
    return Factor(tuple(diagonal), tuple(upper))


def solve(factor: Factor, right: Tensor) -> Tensor:
    """Solve L Lᵀ x = right for vectors (B, Σ n_j): (B, Σ n_j)."""
    sizes = [block.shape[-1] for block in factor.diagonal]
    parts = list(right.unsqueeze(-1).split(sizes, dim=1))
    for j, block in enumerate(factor.diagonal):
        if j > 0:
            parts[j] = parts[j] - factor.upper[j - 1].mT @ parts[j - 1]
        parts[j] = torch.linalg.solve_triangular(block, parts[j], upper=False)
    for j in reversed(range(len(sizes))):
        if j + 1 < len(sizes):
            parts[j] = parts[j] - factor.upper[j] @ parts[j + 1]
        parts[j] = torch.linalg.solve_triangular(factor.diagonal[j].mT, parts[j], upper=True)
    return torch.cat(parts, 1).squeeze(-1)


def selected_inverse(factor: Factor) -> BlockTridiagonal:
    """Compute the blocks of (L Lᵀ)⁻¹ on and next to its diagonal.

    It is the recursion of Takahashi et al. (1973), from the last block up: with
    K = L_jj⁻ᵀ L_{j+1,j}ᵀ and S the inverse, S_{j+1,j} = −S_{j+1,j+1} Kᵀ and
    S_jj = (L_jj L_jjᵀ)⁻¹ − K S_{j+1,j}.
    """
    diagonal = [torch.cholesky_inverse(factor.diagonal[-1])]
    lower: list[Tensor] = []
    for block, upper in zip(factor.diagonal[-2::-1], factor.upper[::-1], strict=True):
        gain = torch.linalg.solve_triangular(block.mT, upper, upper=True)
        lower.append(-diagonal[-1] @ gain.mT)
        diagonal.append(torch.baddbmm(torch.cholesky_inverse(block), gain, lower[-1], alpha=-1))
    return BlockTridiagonal(tuple(diagonal[::-1]), tuple(lower[::-1]))
