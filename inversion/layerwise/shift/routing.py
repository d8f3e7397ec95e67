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

from inversion.layerwise.shift.gauge import (
    gauge_by_nonnegativity,
    gauge_by_signals,
    match_to_signals,
)
from inversion.layerwise.shift.repair import repair_masks
from inversion.layerwise.shift.taps import (
    TAPS,
    inputs_for,
    outputs_for,
    relative_norm,
    shifted_inputs,
    tap_slices,
)

#: A mask is undecided where its signal is below this many deviations of the recovered signals.
SURE = 6.0
#: Deviations are measured where an image's signal is at least this share of its largest.
CLEAR = 0.1
#: Rounds of alternating least squares after the positions are solved one after the other.
POLISH = 2
#: Masks explain a gradient that leave at most this many times what the unrounded factors leave.
EXPLAINED = 100.0


@dataclass(frozen=True)
class Factors:
    """Holds the factors of a weight gradient, both up to one B×B matrix: D W and W⁻¹ X fit too."""

    #: (O, h·w, B) signals at the convolution's output, D.
    outputs: Tensor
    #: (h·w, B, I) inputs of the convolution, X.
    inputs: Tensor
    #: √(Σ_k ‖G_k − D S_k X‖²) / ‖G‖.
    residual: float
    #: Singular values N and N + 1 of the gradient (O, 9·I) in shares of the first, N = B·h·w.
    gap: tuple[float, float]


@dataclass(frozen=True)
class Routing:
    """Holds the masks behind a convolution.

    Wrong masks show: the residual of float32 gradients is about 1e-7 when all are right.
    """

    #: (B, O, h, w) bool: where the signal arrives.
    masks: Tensor
    #: (B, O, h, w) bool: where the signal is too small to tell; the mask is no more than a guess.
    undecided: Tensor
    #: ‖G − Σ (routed ∘ masks) ⊗ patches‖ / ‖G‖, with the inputs that fit best.
    residual: float
    #: As in `Factors`.
    gap: tuple[float, float]


def check_identified(gradient: Tensor, height: int, width: int, batch: int) -> None:
    """Raise ValueError unless shifts can tell the positions apart.

    gradient: (O, I, 3, 3) with N = batch · height · width ≤ min(O, I), on a map of more than one
    position.
    """
    if gradient.dim() != 4 or gradient.shape[2:] != (3, 3):
        raise ValueError(f"a gradient of shape {tuple(gradient.shape)} is none of 3×3 taps")
    outputs, inputs = gradient.shape[:2]
    needed = batch * height * width
    if height * width < 2:
        raise ValueError("a 1×1 map has no shifts")
    if needed > min(outputs, inputs):
        raise ValueError(
            f"{batch} images of {height}×{width} positions need {needed} channels, but the "
            f"convolution has {inputs} → {outputs}"
        )


def shift_factors(gradient: Tensor, height: int, width: int, batch: int) -> Factors:
    """Split the weight gradient of a 3×3 convolution into signals and inputs.

    gradient: (O, I, 3, 3), stride 1, padding 1, of `batch` images on height × width maps. It is
    compressed to its N leading directions on both sides, the positions are solved one after the
    other from the corner, and POLISH rounds of alternating least squares on Σ ‖G_k − D S_k X‖²
    even out what errors add up on the way.

    Raises ValueError as `check_identified` does, and torch.linalg.LinAlgError for numbers that are
    not finite or a gradient of too small a rank.
    """
    check_identified(gradient, height, width, batch)
    slices, shape = tap_slices(gradient), (height, width, batch)
    needed = batch * height * width
    left, values = _leading(torch.einsum("koi,kpi->op", slices, slices), needed)
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


def routing_masks(gradient: Tensor, routed: Tensor, height: int, width: int) -> Routing:
    """Recover where the known signals `routed` arrive at a convolution's output.

    gradient: (O, I, 3, 3), Σ (routed ∘ mask) ⊗ patches of the inputs. routed: (B, O, h, w), the
    signal at each position if the position is chosen: behind global average pooling and ReLU the
    same everywhere, behind max-pooling that of the position's window. The masks are the recovered
    signals divided by `routed`, rounded, and repaired by `repair_masks`. Images are told apart by
    `gauge_by_signals`. Where the result leaves more than EXPLAINED times what the unrounded factors
    leave (two images have almost the same signals), by `gauge_by_nonnegativity` too, and the better
    of both is returned. Where nothing fits, the residual is large; nothing is raised.

    Raises ValueError as `check_identified` does, and where the shapes do not agree.
    """
    if routed.dim() != 4 or routed.shape[1:] != (gradient.shape[0], height, width):
        raise ValueError(
            f"signals of shape {tuple(routed.shape)} for {gradient.shape[0]} channels of "
            f"{height}×{width} positions"
        )
    check_identified(gradient, height, width, len(routed))
    gradient, routed = gradient.double(), routed.double()
    if not (gradient.isfinite().all() and routed.isfinite().all() and gradient.any()):
        return _nothing(routed)
    try:
        factors = shift_factors(gradient, height, width, len(routed))
        gauge = gauge_by_signals(factors.outputs, routed)
        found = [_routing(gradient, routed, factors, gauge)]
        if found[0].residual > EXPLAINED * factors.residual and len(routed) > 1:
            gauge = gauge_by_nonnegativity(factors.inputs)
            gauge = match_to_signals(factors.outputs, gauge, routed)
            found.append(_routing(gradient, routed, factors, gauge))
    except torch.linalg.LinAlgError:
        return _nothing(routed)
    return min(found, key=lambda routing: routing.residual)


def _routing(gradient: Tensor, routed: Tensor, factors: Factors, gauge: Tensor) -> Routing:
    """Round the signals that `gauge` (B, B) makes of the factors, and repair the masks.

    Repaired masks are kept only where they explain the gradient or leave less than half of what
    the rounded ones do.
    """
    masks, undecided = _rounded(factors.outputs @ gauge, routed)
    repaired, _, residual = repair_masks(gradient, routed, masks)
    if residual > EXPLAINED * factors.residual:  # `routed` may be off: flips would make up for it
        unrepaired = repair_masks(gradient, routed, masks, rounds=0)[2]
        if residual > 0.5 * unrepaired:
            repaired, residual = masks, unrepaired
    return Routing(repaired, undecided, residual, factors.gap)


def _leading(gram: Tensor, count: int) -> tuple[Tensor, tuple[float, float]]:
    """Return the leading eigenvectors (n, count), and the gap behind them as in `Factors`."""
    values, vectors = torch.linalg.eigh(gram)
    singular = values.flip(0).clamp_min(0).sqrt()
    singular = F.pad(singular / singular[0].clamp_min(torch.finfo(gram.dtype).tiny), (0, 1))
    return vectors.flip(1)[:, :count], (float(singular[count - 1]), float(singular[count]))


def _propagated(slices: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Solve the signals D (N, N) of slices (9, N, N) position by position.

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


def _rounded(signals: Tensor, routed: Tensor) -> tuple[Tensor, Tensor]:
    """Round signals (O, h·w, B): masks, and where they are undecided, both (B, O, h, w).

    The deviation of an image's recovered signals is taken where `routed` is above CLEAR of its
    largest: 1.48 times the median error, as of a normal variable.
    """
    signals = signals.permute(2, 0, 1).reshape(routed.shape)
    masks = signals.abs() > (signals - routed).abs()
    errors = (signals - masks * routed).abs()
    undecided = torch.ones_like(masks)
    for b, size in enumerate(routed.abs()):
        clear = (size >= CLEAR * size.max()) & (size > 0)
        if clear.any():
            undecided[b] = size <= SURE * 1.4826 * errors[b][clear].median()
    return masks, undecided


def _nothing(routed: Tensor) -> Routing:
    """Return the Routing that explains nothing."""
    never = torch.zeros_like(routed, dtype=torch.bool)
    return Routing(never, ~never, residual=1.0, gap=(0.0, 0.0))
