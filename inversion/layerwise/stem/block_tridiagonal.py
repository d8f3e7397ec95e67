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
class Panel:
    """Says which columns of a block row a panel holds, and how far down it reaches."""

    #: Number of the block.
    block: int
    #: First column and last plus one, within the block.
    start: int
    end: int
    #: Rows of the next block that it holds; those of its own block are all from `start` on.
    reach: int


@dataclass(frozen=True)
class Factor:
    """Holds the Cholesky factor L of a matrix L Lᵀ, by panels of columns from left to right."""

    sizes: list[int]
    layout: list[Panel]
    #: Per panel of n columns its part of the diagonal, lower triangular (B, n, n), and the rows
    #: below it that are not 0, (B, m, n).
    top: list[Tensor]
    below: list[Tensor]


def zeros(sizes: list[int], batch: int, like: Tensor) -> BlockTridiagonal:
    """Return the zero matrix with blocks of the given sizes, of `like`'s dtype and device."""
    return BlockTridiagonal(
        tuple(like.new_zeros(batch, size, size) for size in sizes),
        tuple(
            like.new_zeros(batch, below, size)
            for size, below in zip(sizes[:-1], sizes[1:], strict=True)
        ),
    )


def panels(sizes: list[int], width: int | None) -> list[Panel]:
    """Divide the columns of blocks into panels of this width; None for panels that are blocks.

    A narrow panel reaches into the next block down to as many rows as it has columns up to its
    own end: all entries below must be 0.
    """
    found = []
    for j, size in enumerate(sizes):
        following = sizes[j + 1] if j + 1 < len(sizes) else 0
        for start in range(0, size, width or size):
            end = min(start + (width or size), size)
            reach = following if width is None else min(end, following)
            found.append(Panel(j, start, end, reach))
    return found


def factorise(matrix: BlockTridiagonal, width: int | None = None) -> Factor:
    """Compute the Cholesky factor, panel by panel.

    width: of a panel, which divides the size of all blocks but the last; see `panels`. Narrow ones
    leave out what is 0 in a band: with b values to each side the work grows with b² per column
    instead of three times that.

    Raises torch.linalg.LinAlgError for a matrix that is not positive definite.
    """
    sizes = [block.shape[-1] for block in matrix.diagonal]
    layout = panels(sizes, width)
    parts = []
    for panel in layout:
        columns = slice(panel.start, panel.end)
        own = [matrix.diagonal[panel.block][:, panel.start :, columns]]
        if panel.reach:
            own.append(matrix.lower[panel.block][:, : panel.reach, columns])
        parts.append(torch.cat(own, 1))
    top, below = [], []
    for number, part in enumerate(parts):
        size = part.shape[2]
        top.append(torch.linalg.cholesky(part[:, :size]))
        rest = torch.linalg.solve_triangular(top[-1].mT, part[:, size:], upper=True, left=False)
        below.append(rest)
        first = 0
        for later in parts[number + 1 :]:  # what the panel's rows below add to the panels after it
            if first == rest.shape[1]:
                break
            mine = rest[:, first:]
            later[:, : mine.shape[1]].baddbmm_(mine, mine[:, : later.shape[2]].mT, alpha=-1)
            first += later.shape[2]
    return Factor(sizes, layout, top, below)


def solve(factor: Factor, right: Tensor) -> Tensor:
    """Solve L Lᵀ x = right for vectors (B, Σ n_j): (B, Σ n_j)."""
    x, starts = right.unsqueeze(-1).clone(), []
    start = 0
    for top, below in zip(factor.top, factor.below, strict=True):
        starts.append(start)
        end = start + top.shape[-1]
        x[:, start:end] = torch.linalg.solve_triangular(top, x[:, start:end], upper=False)
        x[:, end : end + below.shape[1]] -= below @ x[:, start:end]
        start = end
    for start, top, below in zip(starts[::-1], factor.top[::-1], factor.below[::-1], strict=True):
        end = start + top.shape[-1]
        left = x[:, start:end] - below.mT @ x[:, end : end + below.shape[1]]
        x[:, start:end] = torch.linalg.solve_triangular(top.mT, left, upper=True)
    return x.squeeze(-1)


def selected_inverse(factor: Factor) -> BlockTridiagonal:
    """Compute the blocks of (L Lᵀ)⁻¹ on and next to its diagonal, 0 where no panel reaches.

    It is the recursion of Takahashi et al. (1973), from the last panel up: with L_c a panel's part
    of the diagonal, L_b the rows below it, K = L_b L_c⁻¹ and S the inverse, S_bc = −S_bb K and
    S_cc = (L_c L_cᵀ)⁻¹ − Kᵀ S_bc.
    """
    batch = len(factor.top[0])
    found = zeros(factor.sizes, batch, factor.top[0])
    window = factor.top[0].new_zeros(batch, 0, 0)  # S of the rows after the panel
    panels = zip(factor.layout[::-1], factor.top[::-1], factor.below[::-1], strict=True)
    for panel, top, below in panels:
        columns, height = slice(panel.start, panel.end), below.shape[1]
        window = window[:, :height, :height]
        gain = torch.linalg.solve_triangular(top, below, upper=False, left=False)
        lower = -window @ gain
        own = torch.baddbmm(torch.cholesky_inverse(top), gain.mT, lower, alpha=-1)
        same = factor.sizes[panel.block] - panel.end  # rows below in the same block
        diagonal = found.diagonal[panel.block]
        diagonal[:, columns, columns] = own
        diagonal[:, panel.end :, columns] = lower[:, :same]
        diagonal[:, columns, panel.end :] = lower[:, :same].mT
        if panel.reach:
            found.lower[panel.block][:, : panel.reach, columns] = lower[:, same:]
        window = torch.cat(
            [torch.cat([own, lower.mT], 2), torch.cat([lower, window], 2)], 1
        )  # of which the panel before sees as much as it reaches
    return found
