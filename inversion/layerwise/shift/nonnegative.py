"""Tells images apart by their inputs alone: a ReLU's outputs are 0 or positive.

As `inversion.layerwise.shift.gauge`, but without the signals: images come up to a positive factor
each and in any order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.layerwise.shift.gauge import SAMPLE, linear_programme, whitened

#: Linear programmes that look for edges of the cone, at most.
MOST_PROGRAMMES = 100
#: The slack of a programme above which noise hides all zeros.
MOST_SLACK = 0.03
#: An edge of the cone counts as one image's if it has more than this share of the most zeros.
PURE = 0.75
#: Norm of a row, in shares of the largest one's, from which it says something.
FAINT = 1e-2
#: Size of a row's number, in shares of the row's norm, up to which it may be a zero.
NEAR_ZERO = 1e-3
#: Zeros lie within this many of their own deviations, which are 1.48 times their median.
SCATTER = 6 * 1.4826
#: Rounds of reweighting, and rounds in which an edge is fitted to its zeros.
REWEIGHTED, SHARPENED = 20, 4


def gauge_by_nonnegativity(inputs: Tensor) -> Tensor:
    """Return W (B, B) with which the inputs of every image are ≥ 0, in any order of the images.

    inputs: (h·w, B, I), outputs of a ReLU up to one B×B matrix: W⁻¹ inputs is each image's input
    up to a positive factor and the order of images. No signal is needed. A column of W⁻ᵀ is an
    edge of the cone {v: v · x ≥ 0 for all rows x}; linear programmes (HiGHS) with random objectives
    find edges, and those on which many rows are 0 are kept: a ReLU's zeros. Where fewer than B
    are found in MOST_PROGRAMMES, directions orthogonal to them stand for the rest. At last every
    edge is fitted to its zeros (`fitted_to_zeros`).
    """
    batch = inputs.shape[1]
    if batch == 1:
        return inputs.new_ones(1, 1) * inputs.sum().sign()
    white, mixing, rows = _telling_rows(inputs)
    found = _independent(_edges(rows), white)
    if len(found) < batch:
        found = torch.cat([found, _complement(found)])
    functionals = torch.linalg.solve_triangular(mixing, found.mT, upper=True)
    return fitted_to_zeros(inputs, torch.linalg.inv(functionals).mT)


def fitted_to_zeros(inputs: Tensor, gauge: Tensor) -> Tensor:
    """Return the W (B, B) near `gauge` that makes the inputs' zeros scatter least.

    inputs, gauge: as in `gauge_by_nonnegativity`. Each image's functional is fitted to the rows
    that it makes 0 but for their own errors, and gets the sign of the inputs' sum.
    """
    white, mixing, rows = _telling_rows(inputs)
    edges = F.normalize((mixing @ torch.linalg.inv(gauge).mT).mT, dim=1)
    found = torch.stack([_sharpened(rows, edge) for edge in edges])
    found = found * (white.sum(0) @ found.mT).sign()[:, None]
    functionals = torch.linalg.solve_triangular(mixing, found.mT, upper=True)
    return torch.linalg.inv(functionals).mT


def _telling_rows(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs' rows `whitened`, their mixing, and the rows that say something, norm 1."""
    white, mixing = whitened(inputs.transpose(1, 2))
    norms = torch.linalg.vector_norm(white, dim=1, keepdim=True)
    keep = norms[:, 0] > FAINT * norms.max()
    return white, mixing, white[keep] / norms[keep]


def _edges(rows: Tensor) -> list[tuple[float, Tensor]]:
    """Find edges of the cone {w: rows · w ≥ 0} with many zeros: the share of zeros, unit w (B,).

    Objectives are drawn orthogonal to the edges with nearly the most zeros. Other edges may mix
    images: then only where all of these are 0 are they. With B edges but some of them mixed, B
    more programmes are tried.
    """
    batch = rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    mean = rows.mean(0)
    edges: list[tuple[float, Tensor]] = []
    slack, spare = 1e-4, batch
    for _ in range(MOST_PROGRAMMES):
        most = max((share for share, _ in edges), default=0.0)
        pure = _independent([edge for edge in edges if edge[0] > PURE * most], rows)
        if len(pure) == batch or spare == 0:
            break
        spare -= len(_independent(edges, rows)) == batch
        free = _complement(pure)
        draw = torch.randn(len(free), generator=generator, dtype=rows.dtype).to(rows.device)
        order = torch.randperm(len(rows), generator=generator)[:SAMPLE].to(rows.device)
        solution = linear_programme(
            draw @ free, rows[order], -slack, float("inf"), mean / mean.square().sum()
        )
        if solution is None:  # noise above the slack
            slack *= 1.5
            if slack > MOST_SLACK:
                break
            continue
        share, edge = _on_zeros(rows, solution, max(1e-3, 3 * slack))
        if share > 0.02 and all((edge @ other).abs() < 1 - 1e-5 for _, other in edges):
            edges.append((share, edge))
    return edges


def _on_zeros(rows: Tensor, functional: Tensor, tolerance: float) -> tuple[float, Tensor]:
    """Refine w on the rows it makes 0, which must span B − 1 directions: share of zeros, unit w.

    The share is 0 where they do not: then w mixes images.
    """
    functional = functional / torch.linalg.vector_norm(functional)
    for last in (False, False, True):
        zero = (rows @ functional).abs() < tolerance
        if zero.sum() < len(functional):
            return 0.0, functional
        _, values, directions = torch.linalg.svd(torch.linalg.qr(rows[zero]).R, full_matrices=False)
        if values[-2] < 1e-2 * values[0]:
            return 0.0, functional
        if last:
            break
        functional = directions[-1]
    return float(zero.to(rows.dtype).mean()), functional


def _sharpened(rows: Tensor, edge: Tensor) -> Tensor:
    """Fit a unit w (B,) to the rows that it makes 0 but for their own scatter.

    Among the numbers near 0 some are small, but no zeros. So the sum of absolute values is lessened
    first, by reweighted least squares, which a few of them do not move; zeros then show by their
    scatter.
    """
    near = rows[(rows @ edge).abs() < NEAR_ZERO]
    for _ in range(REWEIGHTED if len(near) >= 2 * len(edge) else 0):
        sizes = (near @ edge).abs()
        weights = sizes.clamp_min(max(0.1 * float(sizes.median()), 1e-300)).rsqrt()
        edge = torch.linalg.svd(torch.linalg.qr(weights[:, None] * near).R)[2][-1]
    for _ in range(SHARPENED):
        numbers = (rows @ edge).abs()
        near = numbers[numbers < NEAR_ZERO]
        if not len(near):
            break
        zero = numbers <= min(NEAR_ZERO, SCATTER * float(near.median()))
        if zero.sum() < 2 * len(edge):
            break
        edge = torch.linalg.svd(torch.linalg.qr(rows[zero]).R)[2][-1]
    return edge


def _independent(edges: list[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """Choose up to B linearly independent edges (n, B), those with the most zeros first."""
    chosen = like.new_zeros(0, like.shape[1])
    for _, edge in sorted(edges, key=lambda pair: -pair[0]):
        candidate = torch.cat([chosen, edge[None]])
        if len(chosen) < edge.numel() and torch.linalg.svdvals(candidate)[-1] > 1e-3:
            chosen = candidate
    return chosen


def _complement(found: Tensor) -> Tensor:
    """Return an orthonormal basis of the directions orthogonal to the rows of `found` (n, B)."""
    return torch.linalg.svd(found, full_matrices=True)[2][len(found) :]
