"""Solves signals and inputs of a 3×3 convolution out of its weight gradient alone (shift method).

`inversion.layerwise.shift.taps` writes the gradient as G_k = D S_k X, with the signals D (O, N) and
the inputs X (N, I), N = B·h·w. Zero padding makes positions differ: with Y = X⁻¹ on the row space,
G_k Y[p] is D[p − δ_k], or 0 where p − δ_k lies outside the map. So a null space gives the corner,
and every other position follows. D and X then hold up to one B×B matrix, which
`inversion.layerwise.shift.gauge` finds. All numbers are float64, on the device of the gradient.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.layerwise.shift.taps import (
    TAPS,
    inputs_for,
    outputs_for,
    relative_norm,
    shifted_inputs,
    tap_slices,
)

#: Rounds of alternating least squares after the positions are solved one after the other.
POLISH = 2


@dataclass(frozen=True)
class Factors:
    """Holds the factors of a weight gradient, both up to one B×B matrix: D W and W⁻¹ X fit too."""

    #: (O, h·w, B) signals at the convolution's output, D.
    outputs: Tensor
    #: (h·w, B, I) inputs of the convolution, X.
    inputs: Tensor
    #: √(Σ_k ‖G_k − D S_k X‖²) / ‖G‖.
    residual: float
    #: Singular values N and N + 1 of the gradient (O, 9·I) in shares of the first, N = B·h·w (one
    #: less where the signals are centred).
    gap: tuple[float, float]


def check_identified(
    gradient: Tensor, height: int, width: int, batch: int, *, centred: bool = False
) -> None:
    """Raise ValueError unless shifts can tell the positions apart.

    gradient: (O, I, 3, 3) with N = batch · height · width ≤ min(O, I), on a map of more than one
    position. centred: as in `shift_factors`; N may be O + 1 then.
    """
    if gradient.dim() != 4 or gradient.shape[2:] != (3, 3):
        raise ValueError(f"a gradient of shape {tuple(gradient.shape)} is none of 3×3 taps")
    outputs, inputs = gradient.shape[:2]
    needed = batch * height * width
    if height * width < 2:
        raise ValueError("a 1×1 map has no shifts")
    if needed > min(outputs + centred, inputs):
        raise ValueError(
            f"{batch} images of {height}×{width} positions need {needed} channels, but the "
            f"convolution has {inputs} → {outputs}"
        )


def shift_factors(
    gradient: Tensor, height: int, width: int, batch: int, *, centred: bool = False
) -> Factors:
    """Split the weight gradient of a 3×3 convolution into signals and inputs.

    gradient: (O, I, 3, 3), stride 1, padding 1, of `batch` images on height × width maps. It is
    compressed to its N leading directions on both sides, the positions are solved one after the
    other from the corner, and POLISH rounds of alternating least squares on Σ ‖G_k − D S_k X‖²
    even out what errors add up on the way. centred: the signals of every output channel sum to 0,
    as BatchNorm makes them in train mode, so that they have one direction fewer.

    Raises ValueError as `check_identified` does, and torch.linalg.LinAlgError for numbers that are
    not finite or a gradient of too small a rank.
    """
    check_identified(gradient, height, width, batch, centred=centred)
    slices, shape = tap_slices(gradient), (height, width, batch)
    needed = batch * height * width
    directions = needed - centred
    left, values = _leading(torch.einsum("koi,kpi->op", slices, slices), directions)
    right, _ = _leading(torch.einsum("koi,koj->ij", slices, slices), needed)
    small = left.mT @ slices @ right
    scale = torch.linalg.vector_norm(small).clamp_min(torch.finfo(small.dtype).tiny)
    small = small / scale
    outputs = _propagated(small, shape)
    for _ in range(POLISH):
        inputs = inputs_for(small, outputs, shape)
        outputs = outputs_for(small, inputs, shape)
    inputs = inputs_for(small, outputs, shape)
    outputs, inputs = scale * left @ outputs, inputs @ right.mT
    fit = outputs @ shifted_inputs(inputs, shape)
    if not fit.isfinite().all():
        raise torch.linalg.LinAlgError("the gradient has too small a rank to be split")
    return Factors(
        outputs.reshape(-1, height * width, batch),
        inputs.reshape(height * width, batch, -1),
        relative_norm(slices - fit, slices),
        values,
    )


def _leading(gram: Tensor, count: int) -> tuple[Tensor, tuple[float, float]]:
    """Return the leading eigenvectors (n, count), and the gap behind them as in `Factors`."""
    values, vectors = torch.linalg.eigh(gram)
    singular = values.flip(0).clamp_min(0).sqrt()
    singular = F.pad(singular / singular[0].clamp_min(torch.finfo(gram.dtype).tiny), (0, 1))
    return vectors.flip(1)[:, :count], (float(singular[count - 1]), float(singular[count]))


def _propagated(slices: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Solve the signals D (n, N) of slices (9, n, N) position by position, n ≤ N directions.

    Position p has the unknown y = X⁻¹[p] (N, B), and G_k y is D[p − δ_k]: 0 where p − δ_k lies
    outside, known where an earlier position gave it. At the corner all that is known is 0, and the
    basis of the null space fixes the B×B matrix. Positions with the same known taps share one QR.
    """
    height, width, batch = shape
    known: dict[tuple[int, int], Tensor] = {}
    solvers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for place in ((row, column) for row in range(height) for column in range(width)):
        sources = [(place[0] - row, place[1] - column) for row, column in TAPS]
        outside = [not (0 <= row < height and 0 <= column < width) for row, column in sources]
        used = tuple(k for k in range(9) if outside[k] or sources[k] in known)
        if used not in solvers:
            solvers[used] = torch.linalg.qr(slices[list(used)].flatten(0, 1))
        q, r = solvers[used]
        if not known:
            solution = torch.linalg.svd(r)[2][-batch:].mT
        else:
            zero = slices.new_zeros(slices.shape[1], batch)
            sides = torch.cat([known.get(sources[k], zero) for k in used])
            solution = torch.linalg.solve_triangular(r, q.mT @ sides, upper=True)
        for k in range(9):
            if not outside[k]:
                known.setdefault(sources[k], slices[k] @ solution)
    return torch.cat([known[row, column] for row in range(height) for column in range(width)], 1)
