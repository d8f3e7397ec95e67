"""Tells images apart: finds the B×B matrix that the factors of a convolution's gradient leave open.

`inversion.layerwise.shift` splits a weight gradient into signals D (O, h·w, B) and inputs
X (h·w, B, I), both up to one B×B matrix that all positions share: D W and W⁻¹ X fit as well. The
matrix W here turns D into the true signals, column b into those of image b.
"""

import numpy as np
import torch
from torch import Tensor

from inversion.layerwise.shift.taps import least_squares

#: The largest batch whose 2^B patterns of bits are all tried.
MOST_ENUMERATED = 10
#: Rows of a linear programme, and rows on which a pattern of bits is refined before the choice.
SAMPLE = 3000
#: Rows on which every pattern of bits is scored, and how many of the best patterns are refined.
SCORED, REFINED = 300, 8
#: Linear programmes that look for edges of the cone, at most.
MOST_PROGRAMMES = 100
#: An edge of the cone counts as one image's if it has more than this share of the most zeros.
PURE = 0.75


def bit_distance(numbers: Tensor) -> Tensor:
    """Return how far each number lies from the nearer of 0 and 1."""
    return torch.minimum(numbers.abs(), (numbers - 1).abs())


def gauge_by_signals(outputs: Tensor, routed: Tensor) -> Tensor:
    """Return W (B, B) with (outputs W)[o, p, b] = routed[b, o, p] · (0 or 1).

    outputs: (O, h·w, B), the signals up to W. routed: (B, O, h, w), the signal of each image where
    its mask is on. Up to MOST_ENUMERATED images, all 2^B patterns of bits at B rows of `outputs`
    that differ most are tried for every image, and scored by how many other rows they turn into
    0 or 1. Beyond, a linear programme seeks w with 0 ≤ rows · w ≤ 1 and the largest mean. Both are
    refined by least squares on the rounded numbers. Where nothing fits, W is arbitrary.
    """
    white, mixing = _whitened(outputs)
    search = _by_enumeration if outputs.shape[2] <= MOST_ENUMERATED else _by_box
    columns = [
        search(rows) if len(rows) >= white.shape[1] else white.new_zeros(white.shape[1])
        for rows in (_strong_rows(white, image) for image in routed)
    ]
    return torch.linalg.solve_triangular(mixing, torch.stack(columns, 1), upper=True)


def gauge_by_nonnegativity(inputs: Tensor) -> Tensor:
    """Return W (B, B) with which the inputs of every image are ≥ 0, in any order of the images.

    inputs: (h·w, B, I), outputs of a ReLU up to one B×B matrix: W⁻¹ inputs is each image's input
    up to a positive factor and the order of images. No signal is needed. A column of W⁻ᵀ is an
    edge of the cone {v: v · x ≥ 0 for all rows x}; linear programmes (HiGHS) with random objectives
    find edges, and those on which many rows are 0 are kept: a ReLU's zeros. Where fewer than B
    are found in MOST_PROGRAMMES, directions orthogonal to them stand for the rest.
    """
    batch = inputs.shape[1]
    if batch == 1:
        return inputs.new_ones(1, 1) * inputs.sum().sign()
    white, mixing = _whitened(inputs.transpose(1, 2))
    norms = torch.linalg.vector_norm(white, dim=1, keepdim=True)
    keep = norms[:, 0] > 1e-2 * norms.max()
    edges = _edges(white[keep] / norms[keep])
    found = _independent(edges, white)
    if len(found) < batch:
        found = torch.cat([found, _complement(found)])
    found = found * (white.sum(0) @ found.mT).sign()[:, None]
    functionals = torch.linalg.solve_triangular(mixing, found.mT, upper=True)
    return torch.linalg.inv(functionals).mT


def match_to_signals(outputs: Tensor, gauge: Tensor, routed: Tensor) -> Tensor:
    """Return `gauge` with its columns scaled and put into the order of the images of `routed`.

    outputs, routed: as in `gauge_by_signals`. gauge: (B, B), right up to factors and order. With
    r = (outputs gauge)[:, :, k] / routed[b], the factor that makes r zeros and ones is Σ r² / Σ r;
    the pairing minimises the sum of the distances to 0 and 1 (Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment

    white, mixing = _whitened(outputs)
    mixed, factors, costs = mixing @ gauge, [], []
    rows = [_strong_rows(white, image) for image in routed]
    for image in rows:
        ratios = image @ mixed
        factor = ratios.square().sum(0) / ratios.sum(0)
        scaled = ratios / factor
        costs.append(bit_distance(scaled).sum(0) / scaled.abs().sum(0))
        factors.append(factor)
    cost = torch.nan_to_num(torch.stack(costs), nan=1.0, posinf=1.0, neginf=1.0)
    _, order = linear_sum_assignment(cost.cpu().numpy())
    columns = [_refined(rows[b], mixed[:, k] / factors[b][k]) for b, k in enumerate(order.tolist())]
    return torch.linalg.solve_triangular(mixing, torch.stack(columns, 1), upper=True)


def _whitened(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (n, B) of `values` (…, B) times R⁻¹, with orthonormal columns, and R."""
    return torch.linalg.qr(values.reshape(-1, values.shape[-1]))


def _strong_rows(white: Tensor, routed: Tensor) -> Tensor:
    """Return the rows, divided by the signal, where an image's signal (O, h, w) is strong.

    Strong: above .3 of its largest, or among the largest 30 %. Rows that are 0 say nothing.
    """
    signal = routed.flatten()
    size = signal.abs()
    strongest = torch.topk(size, max(1, int(0.3 * len(size)))).values[-1]
    strong = (size >= torch.minimum(0.3 * size.max(), strongest)) & (size > 0)
    rows = white[strong] / signal[strong, None]
    norms = torch.linalg.vector_norm(rows, dim=1)
    return rows[norms > 1e-3 * norms.max()] if len(rows) else rows


def _sampled(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return at most `count` of the rows, drawn without replacement from a stated seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return rows[order.to(rows.device)]


def _refined(rows: Tensor, functional: Tensor, rounds: int = 3) -> Tensor:
    """Fit w (B,) to the rounded numbers rows · w, leaving out those far from 0 and 1."""
    for _ in range(rounds):
        numbers = rows @ functional
        bits = (numbers > 0.5).to(rows.dtype)
        sure = (numbers - bits).abs() < 0.25
        if sure.sum() < len(functional) or not bits[sure].any():
            break
        functional = least_squares(rows[sure], bits[sure, None])[:, 0]
    return functional


def _pivots(rows: Tensor) -> Tensor:
    """Return B of the rows (n, B), each the farthest from the span of those before."""
    left, chosen = rows.clone(), []
    for _ in range(rows.shape[1]):
        chosen.append(int(torch.linalg.vector_norm(left, dim=1).argmax()))
        unit = left[chosen[-1]] / torch.linalg.vector_norm(left[chosen[-1]])
        left = left - (left @ unit)[:, None] * unit
    return rows[chosen]


def _by_enumeration(rows: Tensor) -> Tensor:
    """Find the w (B,) with rows · w ∈ {0, 1} by trying all bits at B rows."""
    batch = rows.shape[1]
    sample = _sampled(rows, SAMPLE)
    basis = torch.linalg.inv(_pivots(sample))
    numbers = torch.arange(1, 2**batch, device=rows.device)[:, None]
    bits = ((numbers >> torch.arange(batch, device=rows.device)) & 1).to(rows.dtype)
    near = bit_distance(bits @ (_sampled(rows, SCORED, seed=1) @ basis).mT) < 0.1
    best = torch.topk(near.to(rows.dtype).mean(1), min(REFINED, len(bits))).indices
    found = [_refined(sample, basis @ bits[i]) for i in best.tolist()]
    errors = [_misfit(sample, functional) for functional in found]
    return _refined(rows, found[errors.index(min(errors))])


def _misfit(rows: Tensor, functional: Tensor) -> float:
    """Return the mean distance of rows · w from 0 and 1, in shares of the mean size."""
    numbers = rows @ functional
    return float(bit_distance(numbers).sum() / numbers.abs().sum().clamp_min(1e-300))


def _by_box(rows: Tensor) -> Tensor:
    """Find the w (B,) with 0 ≤ rows · w ≤ 1 and the largest mean; ever wider under noise."""
    sample = _sampled(rows, SAMPLE)
    best = (float("inf"), rows.new_zeros(rows.shape[1]))
    for slack in (1e-4, 1e-3, 1e-2, 1e-1):
        solution = _linear_programme(sample.mean(0), sample, -slack, 1 + slack)
        if solution is None:
            continue
        functional = _refined(sample, solution)
        misfit = _misfit(sample, functional)
        best = min(best, (misfit, functional), key=lambda pair: pair[0])
        if misfit < 0.01:
            break
    return _refined(rows, best[1])


def _linear_programme(
    objective: Tensor, rows: Tensor, lower: float, upper: float, unit: Tensor | None = None
) -> Tensor | None:
    """Maximise objective · w for lower ≤ rows · w ≤ upper [and unit · w = 1]; None on failure."""
    from scipy.optimize import linprog  # a second, which most attacks do not need

    matrix = rows.cpu().numpy()
    sides = [(matrix, upper), (-matrix, -lower)]
    bounded = [(side, bound) for side, bound in sides if np.isfinite(bound)]
    answer = linprog(
        -objective.cpu().numpy(),
        A_ub=np.concatenate([side for side, _ in bounded]),
        b_ub=np.concatenate([np.full(len(side), bound) for side, bound in bounded]),
        A_eq=None if unit is None else unit.cpu().numpy()[None],
        b_eq=None if unit is None else [1.0],
        bounds=(None, None),
        method="highs",
    )
    if answer.status != 0:
        return None
    return torch.from_numpy(answer.x).to(rows)


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
        solution = _linear_programme(
            draw @ free, rows[order], -slack, float("inf"), mean / mean.square().sum()
        )
        if solution is None:  # noise above the slack
            slack *= 1.5
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
