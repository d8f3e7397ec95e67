"""Finds where known signals arrive at the output of a 3×3 convolution, by its weight gradient.

The shift method (`inversion.layerwise.shift.factors`) gives the signals up to one B×B matrix, and
that they are the known ones or 0 gives the matrix. All numbers are float64, on the device of the
gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inversion.layerwise.shift.factors import Factors, check_identified, shift_factors
from inversion.layerwise.shift.gauge import gauge_by_signals, match_to_signals
from inversion.layerwise.shift.nonnegative import gauge_by_nonnegativity
from inversion.layerwise.shift.repair import repair_masks

#: A mask is undecided where its signal is below this many deviations of the recovered signals.
SURE = 6.0
#: Deviations are measured where an image's signal is at least this share of its largest.
CLEAR = 0.1
#: Masks explain a gradient that leave at most this many times what the unrounded factors leave.
EXPLAINED = 100.0


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
