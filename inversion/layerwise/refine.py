"""Solves all equations about the input of coupled convolutions together, to second order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.linearised import Coordinates, coordinates_of, linearised
from inversion.layerwise.system import improve
from inversion.layerwise.use import Use

#: Rounds of Gauss–Newton, and steps of conjugate gradients in each, at most.
ROUNDS, STEPS = 12, 150
#: Relative change of the tensor at which Gauss–Newton has arrived, and the share of the last
#: residual above which another round is of no use.
SETTLED, USELESS = 1e-8, 0.5
#: Power with which residuals fall at least as long as they are those of the linearisation.
SUPERLINEAR = 1.5
#: How well each round solves its linear equations: as well as the next residual will be, which
#: falls by its square, within limits.
LOOSEST, SHARPENING, TIGHTEST = 1e-2, 0.1, 1e-7


def start_coupled(
    uses: Sequence[Use], entries: tuple[Tensor, Tensor], *, rectified: bool
) -> tuple[Tensor, Coordinates]:
    """Return a tensor from which Gauss–Newton starts, (B, I, H, W), and coordinates for it.

    The signals are those of outputs that are known where they are, and elsewhere alike in every
    channel, so that the batch's means are met. The equations are then linear.
    """
    signals = [_guessed_signal(use) for use in uses]
    coordinates = coordinates_of(uses, signals, entries)
    none = torch.zeros_like(entries[1])
    system = linearised(uses, none, signals, entries, coordinates)
    enough = LOOSEST * system.right.norm().item()
    u = system.to_input(improve(system, system.right, none, torch.ones_like(none), STEPS, enough))
    return (u.clamp_min(0) if rectified else u), coordinates


def _guessed_signal(use: Use) -> Tensor:
    """Return ∂L/∂z with what is known of z, and the rest of the batch's mean elsewhere."""
    if not use.coupled:
        return use.signal()
    assert use.batchnorm is not None
    mean, known = use.batchnorm.mean, use.known
    missing = (1 - known).sum((0, 2, 3))
    rest = mean * known[:, 0].numel() - (use.output * known).sum((0, 2, 3))
    guess = torch.where(missing > 0, rest / missing.clamp_min(1), mean)
    return use.signal_at(torch.where(known > 0, use.output, per_channel(guess)))


def refine_coupled(
    uses: Sequence[Use],
    u: Tensor,
    entries: tuple[Tensor, Tensor],
    coordinates: Coordinates,
) -> Tensor:
    """Improve u (B, I, H, W) on all equations of its coupled convolutions by Gauss–Newton.

    The gradient ∂L/∂w(u, K − κ (w∗u − μ)) = G is quadratic in u; the known outputs, the batch's
    mean at the outputs and the known entries (0/1 and values, of u's shape) are linear. Each round
    solves the linearised equations by conjugate gradients. Returns the u of the least residual.
    """
    best, least = u, _worst(uses, u)
    for _ in range(ROUNDS):
        system = linearised(uses, best, [use.signal(best) for use in uses], entries, coordinates)
        tolerance = min(LOOSEST, max(TIGHTEST, SHARPENING * least))
        enough = tolerance * system.right.norm().item()
        none = torch.zeros_like(u)
        y = improve(system, system.right, none, torch.ones_like(u), STEPS, enough)
        step, arrived = system.to_input(y), (system.right - system.normal(y)).norm() <= 2 * enough
        last, found = least, _worst(uses, best + step)
        if found < least:
            best, least = best + step, found
        if step.norm() < SETTLED * best.norm() or not found < USELESS * last:
            break
        if arrived and last**SUPERLINEAR < found < min(use.accuracy.suspicious for use in uses):
            break  # what is left is the equations' own error
    return best


def _worst(uses: Sequence[Use], u: Tensor) -> float:
    return max(use.residual(u) for use in uses)
