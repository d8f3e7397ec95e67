"""Solves all equations about the input of coupled convolutions together, to second order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inversion.layerwise.accuracy import LARGEST
from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.convolution import Solution
from inversion.layerwise.joint import GLANCE_STEPS, PROBES, openness, sampled_square
from inversion.layerwise.least_squares import Propagation
from inversion.layerwise.linearised import (
    Coordinates,
    coordinates_of,
    damped,
    equations_of,
    linearised,
)
from inversion.layerwise.mask_repair import Found, Near, repaired
from inversion.layerwise.system import System, improve
from inversion.layerwise.use import Entries, Use

#: Rounds of Gauss–Newton, and steps of conjugate gradients in each, at most.
ROUNDS, STEPS = 12, 150
#: Relative change of the tensor at which Gauss–Newton has arrived, and the share of the last
#: residual above which another round is of no use.
SETTLED, USELESS = 1e-8, 0.7
#: Damping (`damped`) of a start, and of each round in units of the residual. Residual above which a
#: ReLU's output is kept from being negative, as long as that still lessens the residual.
DAMPING, OF_RESIDUAL, ROUGH, ALIKE = 0.1, 0.25, 0.02, 0.9
#: Power with which residuals fall at least as long as they are those of the linearisation.
SUPERLINEAR = 1.5
#: How well each round solves its linear equations: as well as the next residual will be, which
#: falls by its square, within limits.
LOOSEST, SHARPENING, TIGHTEST = 1e-2, 0.1, 1e-7
#: Steps from a random start on the linearised equations, to see what they leave open.
PROBE_STEPS = 500


def start_coupled(
    uses: Sequence[Use], entries: Entries, *, rectified: bool
) -> tuple[Tensor, Coordinates]:
    """Return a tensor from which Gauss–Newton starts, (B, I, H, W), and coordinates for it.

    The signals are those of outputs that are known where they are, and elsewhere alike in every
    channel, so that the batch's means are met. The equations are then linear.
    """
    signals = [_guessed_signal(use) for use in uses]
    coordinates = coordinates_of(uses, signals, entries)
    none = torch.zeros_like(entries[1])
    system = linearised(uses, none, signals, entries, coordinates)
    starts = []
    for share in (0.0, DAMPING):
        u, _ = _solved(damped(system, coordinates, share), LOOSEST)
        starts.append(u.clamp_min(0) if rectified else u)
    return min(starts, key=lambda u: _worst(uses, u)), coordinates


def _solved(system: System, tolerance: float) -> tuple[Tensor, bool]:
    """Solve a system up to a share of its right side, and tell whether that was reached."""
    none, enough = torch.zeros_like(system.right), tolerance * system.right.norm().item()
    y = improve(system, system.right, none, torch.ones_like(none), STEPS, enough)
    arrived = (system.right - system.normal(y)).norm().item() <= 2 * enough
    return system.to_input(y), arrived


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
    entries: Entries,
    coordinates: Coordinates,
    *,
    rectified: bool,
) -> Tensor:
    """Improve u (B, I, H, W) on all equations of its coupled convolutions by Gauss–Newton.

    The gradient ∂L/∂w(u, K − κ (w∗u − μ)) = G is quadratic in u; the known outputs, the batch's
    mean at the outputs and the known entries (0/1 and values, of u's shape) are linear. Each round
    solves the linearised equations by conjugate gradients, with less and less damping (Levenberg,
    1944). rectified: u is 0 or positive, by which it comes near from far away. Returns the u of the
    least residual.
    """

    def step(u: Tensor, residual: float) -> tuple[Tensor, bool]:
        system = linearised(uses, u, [use.signal(u) for use in uses], entries, coordinates)
        share = min(DAMPING, OF_RESIDUAL * residual)
        tolerance = min(LOOSEST, max(TIGHTEST, SHARPENING * residual))
        return _solved(damped(system, coordinates, share), tolerance)

    least = _worst(uses, u)
    for _ in range(ROUNDS if rectified else 0):
        if least < ROUGH:
            break
        other = (u + step(u, least)[0]).clamp_min(0)
        found = _worst(uses, other)
        if not found < ALIKE * least:
            break
        u, least = other, found
    for _ in range(ROUNDS):
        change, arrived = step(u, least)
        found, last = _worst(uses, u + change), least
        if found < least:
            u, least = u + change, found
        if change.norm() < SETTLED * u.norm() or not found < USELESS * last:
            break
        if arrived and last**SUPERLINEAR < found < min(use.accuracy.suspicious for use in uses):
            break  # what is left is the equations' own error
    return u


def _worst(uses: Sequence[Use], u: Tensor) -> float:
    return max(use.residual(u) for use in uses)


def solve_by_refining(
    uses: Sequence[Use], shape: Sequence[int], entries: Entries, near: Near, *, rectified: bool
) -> Found:
    """Solve all equations by Gauss–Newton, correct masks, and certify by the equations found there.

    For maps whose positions are more than the channels, where a gradient's column space says
    nothing about the signal.
    """
    unknowns = math.prod(shape)
    start, coordinates = start_coupled(uses, entries, rectified=rectified)
    equations = equations_of(uses, entries)
    if equations < unknowns:
        square = (unknowns - equations) * start.square().mean().item()
        none = Propagation(0.0, equations, equations)
        solution = Solution(start, unknowns, equations, equations, 1.0, none)
        return Found(uses, start, solution, sampled_square=square)

    def solve(changed: Sequence[Use], last: Tensor | None) -> Found:
        u = start if last is None else last
        u = refine_coupled(changed, u, entries, coordinates, rectified=rectified)
        none = Propagation(0.0, equations, unknowns)
        solution = Solution(u, unknowns, equations, unknowns, 1.0, none)
        return Found(changed, u, solution, sampled_square=0.0)

    found = solve(uses, None)
    if found.residual > LARGEST:  # no mask that is nearly right leaves as much
        return _with_error(*_with_rank(found, entries, coordinates, hopeless=True))
    first, trial = _with_rank(found, entries, coordinates, hopeless=False)
    if first.suspicious and first.solution.determined:
        found = repaired(uses, lambda now, u: first if u is None else solve(now, u), near)
        if found.flips > 0:
            first, trial = _with_rank(found, entries, coordinates, hopeless=False)
    return _with_error(first, trial)


@dataclass(frozen=True)
class _Trial:
    """Holds what a trial of the equations' errors takes, after the rank was estimated."""

    system: System
    generator: torch.Generator


def _with_rank(
    found: Found, entries: Entries, coordinates: Coordinates, *, hopeless: bool
) -> tuple[Found, _Trial]:
    """Return what was found with rank and condition by the equations linearised there.

    hopeless: a glance will do.
    """
    signals = [use.signal(found.u) for use in found.uses]
    system = linearised(found.uses, found.u, signals, entries, coordinates)
    generator = torch.Generator().manual_seed(0)
    probes, steps = (1, GLANCE_STEPS) if hopeless else (PROBES, PROBE_STEPS)
    seen = openness(system, torch.ones_like(found.u), generator, probes, steps)
    solution = replace(
        found.solution,
        rank=found.u.numel() - min(seen.count, found.u.numel()),
        condition=seen.condition,
    )
    return replace(found, solution=solution), _Trial(system, generator)


def _with_error(found: Found, trial: _Trial) -> Found:
    """Return what was found with its error, by random errors of those equations."""
    square = sampled_square(trial.system, found, torch.ones_like(found.u), trial.generator)
    return replace(found, sampled_square=square)
