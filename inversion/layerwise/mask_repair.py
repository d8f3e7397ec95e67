"""Repairs the masks behind a tensor while it is solved for, by the channels that contradict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from inversion.layerwise.accuracy import MOST_ERROR
from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.convolution import Solution
from inversion.layerwise.masks import (
    CLEAR,
    doubted_channels,
    fitted_signals,
    flipped,
    pursued_flips,
    rounded_mask,
)
from inversion.layerwise.use import Use

#: Corrections of the masks per tensor at most.
REPAIRS = 6
#: Times that channels are left out for each.
LEFT_OUT = 10
#: Flips that are pursued at once.
PURSUED = 30

#: Name of a ReLU → its output (B, O, h, w) before small values were set to zero, and the threshold.
Near = Mapping[str, tuple[Tensor, float]]


@dataclass(frozen=True)
class Found:
    """Holds the input that solves the equations of some uses, with what it took."""

    uses: Sequence[Use]
    u: Tensor
    solution: Solution
    #: Mask entries changed.
    flips: int = 0
    #: Norm of the error of the part that all images share, where that was found by itself.
    offset_error: float = 0.0
    #: Whether that is the only one by the zeros of u alone (`Offset.rests_on_zeros`).
    rests_on_zeros: bool = False
    #: Squared norm of u's error, where a trial with random errors gave it.
    sampled_square: float | None = None

    @cached_property
    def residuals(self) -> list[float]:
        """The relative residual of every use's gradient."""
        return [use.residual(self.u) for use in self.uses]

    @property
    def residual(self) -> float:
        """Return the largest relative residual of a gradient."""
        return max(self.residuals)

    @property
    def expected_error(self) -> float:
        """Return the relative error of u, the images' common part included."""
        error = (self.squared_error + self.offset_error**2) ** 0.5
        return error / max(self.u.norm().item(), 1e-300)

    @cached_property
    def squared_error(self) -> float:
        """Return the squared norm of u's error that the equations' errors cause on average.

        Estimated from what u leaves of them, and from the gradients' own errors.
        """
        if self.sampled_square is not None:
            return self.sampled_square
        left = sum(residual**2 for residual in self.residuals)
        allowed = sum(use.accuracy.error**2 for use in self.uses)
        square = self.solution.gradients.squared_error(left, allowed)
        if self.solution.outputs is not None:
            known = [use for use in self.uses if bool(use.known.any())]
            left = sum(use.outputs_left(self.u) ** 2 for use in known)
            square += self.solution.outputs.squared_error(left, allowed)
        return square

    @property
    def certified(self) -> bool:
        """Whether every number is determined, and the gradients explained, as well as need be."""
        explained = all(
            residual <= use.accuracy.certified
            for use, residual in zip(self.uses, self.residuals, strict=True)
        )
        return self.solution.determined and explained and self.expected_error <= MOST_ERROR

    @property
    def suspicious(self) -> bool:
        """Whether a gradient is explained so badly that a mask may be wrong."""
        return any(
            residual > use.accuracy.suspicious
            for use, residual in zip(self.uses, self.residuals, strict=True)
        )


def with_mask(use: Use, mask: Tensor) -> Use:
    """Return a use with another mask behind it; outputs count as known where it is on."""
    return replace(use, mask=mask, known=use.known * mask)


def doubtful_entries(use: Use, near: Near) -> Tensor:
    """Return 1 where an entry of the mask behind a use may be wrong, (B, O, h, w), else 0.

    An entry whose value stands clear of the threshold is on beyond doubt.
    """
    if use.relu is None or use.relu not in near:
        return torch.ones_like(use.mask)
    raw, threshold = near[use.relu]
    return (raw < CLEAR * threshold).to(use.mask).reshape(use.mask.shape)


def repaired(
    uses: Sequence[Use], solve: Callable[[Sequence[Use], Tensor | None], Found], near: Near
) -> Found:
    """Solve, and correct the masks behind as long as that lessens what is left.

    A wrong mask entry spoils the equations of one output channel. So the channels that are
    explained worst are left out until the rest agrees; what that says about the signals of the
    channels left out corrects their masks. solve(uses, start): with what was found last as a start,
    None at first.
    """
    best = solve(uses, None)
    for _ in range(REPAIRS):
        if not best.solution.determined or not best.suspicious:
            break
        agreeing = _agreeing(best, solve)
        corrected = _corrected(best.uses, agreeing, near)
        changed = sum(
            int((new.mask != old.mask).sum()) for new, old in zip(corrected, best.uses, strict=True)
        )
        if not changed:
            break
        found = solve(corrected, agreeing.u)
        if not found.residual < best.residual:
            break
        best = replace(found, flips=best.flips + changed)
    return best


def _agreeing(found: Found, solve: Callable[[Sequence[Use], Tensor | None], Found]) -> Found:
    """Leave out the channels that are explained worst, bit by bit, until the rest agrees."""
    for _ in range(LEFT_OUT):
        uses = [
            replace(use, trusted=use.trusted * (1 - doubted_channels(use.left_over(found.u))))
            if residual > use.accuracy.suspicious
            else use
            for use, residual in zip(found.uses, found.residuals, strict=True)
        ]
        found = solve(uses, found.u)
        if not found.solution.determined or not found.suspicious:
            break
    return found


def _corrected(uses: Sequence[Use], agreeing: Found, near: Near) -> list[Use]:
    """Return the uses with the masks that the gradients of the channels left out call for.

    A use whose positions are no more than its weights per channel gives its whole signal, others
    single flips.
    """
    masks: dict[str, Tensor] = {}
    for use, trimmed in zip(uses, agreeing.uses, strict=True):
        if use.relu is None or use.relu in masks:
            continue
        doubted = per_channel(1 - trimmed.trusted) * doubtful_entries(use, near)
        mask = use.mask
        if use.arriving[:, 0].numel() <= use.weight[0].numel():
            mask = torch.where(doubted > 0, _mask_from_gradient(use, agreeing.u), mask)
        else:
            change = use.per_flip * (1 - 2 * mask) * doubted
            left = use.left_over(agreeing.u)
            for index in pursued_flips(left, agreeing.u, change, use.geometry, PURSUED):
                mask = flipped(mask, index)
        masks[use.relu] = mask
    return [use if use.relu is None else with_mask(use, masks[use.relu]) for use in uses]


def _mask_from_gradient(use: Use, u: Tensor) -> Tensor:
    """Return the mask behind a use that its gradient calls for at the input u, (B, O, h, w)."""
    signal = fitted_signals(use.gradient, u, use.geometry)
    count, channels, height, width = use.arriving.shape
    signal = signal.reshape(channels, count, height, width).transpose(0, 1)
    bn = use.batchnorm
    if bn is not None and bn.coupled:
        constant, slope = bn.constants(torch.zeros_like(use.arriving))
        z = use.geometry.forward(u, use.weight)
        signal = signal - constant + per_channel(slope) * (z - per_channel(bn.mean))
    if bn is not None:
        signal = signal / per_channel(bn.scale)
    arriving = torch.where(use.arriving == 0, torch.ones_like(signal), use.arriving)
    return rounded_mask(signal / arriving, use.arriving, use.mask)
