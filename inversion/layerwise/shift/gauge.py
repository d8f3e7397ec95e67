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
    white, mixing = whitened(outputs)
    search = _by_enumeration if outputs.shape[2] <= MOST_ENUMERATED else _by_box
    columns = [
        search(rows) if len(rows) >= white.shape[1] else white.new_zeros(white.shape[1])
        for rows in (_strong_rows(white, image) for image in routed)
    ]
    return torch.linalg.solve_triangular(mixing, torch.stack(columns, 1), upper=True)


def match_to_signals(outputs: Tensor, gauge: Tensor, routed: Tensor) -> Tensor:
    """Return `gauge` with its columns scaled and put into the order of the images of `routed`.

    outputs, routed: as in `gauge_by_signals`. gauge: (B, B), right up to factors and order. With
    r = (outputs gauge)[:, :, k] / routed[b], the factor that makes r zeros and ones is Σ r² / Σ r;
    the pairing minimises the sum of the distances to 0 and 1 (Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment

    white, mixing = whitened(outputs)
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


def whitened(values: Tensor) -> tuple[Tensor, Tensor]:
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
        solution = linear_programme(sample.mean(0), sample, -slack, 1 + slack)
        if solution is None:
            continue
        functional = _refined(sample, solution)
        misfit = _misfit(sample, functional)
        best = min(best, (misfit, functional), key=lambda pair: pair[0])
        if misfit < 0.01:
            break
    return _refined(rows, best[1])


def linear_programme(
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
