"""Finds the offset common to all images, which a gradient leaves open where output maps are 1×1."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from inversion.layerwise.use import Use

#: Share of the largest number below which an offset counts as zero.
ZERO = 1e-6
#: Distance, in units of a column's norm, up to which there are several solutions.
SEVERAL = 1e-7


@dataclass(frozen=True)
class Offset:
    """Holds a tensor with the part that all its images share, and how far that is determined."""

    #: (B, I, H, W).
    u: Tensor
    #: Whether no other part with the same zeros meets the means.
    unique: bool
    #: Whether one with fewer zeros does: the zeros must then be borne out by other equations.
    rests_on_zeros: bool
    #: Bound of the norm of its error, from what it leaves of the means.
    error: float


def common_offset(u: Tensor, uses: Sequence[Use]) -> Offset:
    """Fix what Σ ∂L/∂z = 0 leaves open where outputs have one position: the images' common part.

    u: (B, I, H, W), right up to a number per channel and position. With ReLU, u = u − min + e with
    e ≥ 0; the batch's mean at the convolutions behind says W∗(mean(u) + e) = μ: non-negative least
    squares M e = t (Lawson & Hanson, 1974).

    With its zeros given, e is unique if the other columns of M are independent. Without that, it is
    if no v ≠ 0 with M v = 0 is non-negative where e is 0. The least ‖M v‖ over such v, with
    Σ v = 1 there and v free elsewhere, tells that, and by how much an error of t can move e:
    ‖δe‖₁ ≤ ‖δt‖ / that distance on the zeros. A part with fewer zeros would switch entries of the
    tensor on, which the gradients before it contradict.
    """
    u = u - u.amin(0, keepdim=True)
    shape, mean = u.shape[1:], u.mean(0, keepdim=True)
    unit = torch.eye(shape.numel(), dtype=u.dtype, device=u.device).reshape(-1, *shape)
    matrices, targets = [], []
    for use in uses:
        assert use.batchnorm is not None
        matrices.append(use.geometry.forward(unit, use.weight).mean((2, 3)).T)
        present = use.geometry.forward(mean, use.weight).mean((2, 3))[0]
        targets.append(use.batchnorm.mean - present)
    matrix, target = torch.cat(matrices).cpu().numpy(), torch.cat(targets).cpu().numpy()
    try:
        found, left = nnls(matrix, target, maxiter=20 * shape.numel())
        zero = found <= ZERO * max(found.max(), u.max().item())
        least, distance = _distances(matrix[:, zero], matrix[:, ~zero])
    except (RuntimeError, ValueError):  # it does not arrive, or meets infinite numbers
        return Offset(u, False, False, u.norm().item())
    size = float(np.linalg.norm(matrix, axis=0).mean())
    u = u + torch.from_numpy(found).to(u).reshape(1, *shape)
    rests_on_zeros = distance <= SEVERAL
    nearest = least if rests_on_zeros else min(least, distance)
    error = len(u) ** 0.5 * float(left) / (size * max(nearest, 1e-300))
    return Offset(u, least > SEVERAL, rests_on_zeros, error)


def _distances(zero: np.ndarray, free: np.ndarray) -> tuple[float, float]:
    """Return the least ‖F w‖ over ‖w‖ = 1, and ‖Z v + F w‖ over v ≥ 0 with Σ v = 1 and any w.

    In units of a column's norm; the second by non-negative least squares on what is left of Z
    outside the column space of F, with a row of ones for the sum.
    """
    size = float(np.linalg.norm(np.hstack([zero, free]), axis=0).mean())
    if free.shape[1]:
        basis, triangle = np.linalg.qr(free)
        least = float(np.linalg.svd(triangle, compute_uv=False)[-1]) / size
        if free.shape[1] > free.shape[0] or least <= SEVERAL:
            return 0.0, 0.0
        zero = zero - basis @ (basis.T @ zero)
    else:
        least = np.inf
    if not zero.shape[1]:
        return least, np.inf
    rows = np.vstack([zero / size, np.ones(zero.shape[1])])
    shares, _ = nnls(rows, np.append(np.zeros(len(zero)), 1.0), maxiter=20 * zero.shape[1])
    moved = zero @ shares / max(float(shares.sum()), 1e-300)
    return least, float(np.linalg.norm(moved)) / size
