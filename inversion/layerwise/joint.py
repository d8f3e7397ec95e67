"""Solves all equations about a tensor together, by conjugate gradients, with an estimate of rank.

For tensors whose null space is too large to be decomposed. Known entries are no unknowns, and a
ReLU's zeros, once they show, are none either.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inversion.layerwise.convolution import MOST_NULL, Solution
from inversion.layerwise.least_squares import Propagation
from inversion.layerwise.mask_repair import Found, Near, repaired
from inversion.layerwise.system import System, improve, joint_system
from inversion.layerwise.use import Entries, Use
from inversion.layerwise.zeros import find_zeros

#: Steps of conjugate gradients at first and in each round of pinning.
FIRST_STEPS, ROUND_STEPS = 60, 15
#: Rounds of pinning at most, and the share of entries that may still change when it ends: at first,
#: when wrong masks behind still make the zeros uncertain, and later.
ROUNDS, STILL, STILL_LATER = 30, 4e-3, 2e-5
#: Steps of the solution with the zeros that were found, and what they leave of the right side.
LAST_STEPS, SETTLED = 150, 1e-9
#: Random starts, their steps at most, and the share of their slope where these end.
PROBES, PROBE_STEPS, PROBE_SETTLED = 2, 300, 1e-6
#: Open directions up to which a tensor is determined. A single open one leaves less than that in
#: all probes with a probability of 0.1 %.
MOST_OPEN = 1e-3
#: Steps of a first probe, and the share of open directions up to which masks are then repaired.
GLANCE_STEPS, PROMISING = 100, 1e-4
#: Zeros per open direction from which a solution cannot have them by chance.
PLENTY = 2.0
#: Equations, in shares of the unknowns, from which solving is tried: with zeros and without.
ENOUGH_WITH_ZEROS, ENOUGH = 0.8, 1.0


def solvable(
    uses: Sequence[Use], shape: Sequence[int], entries: Entries, rank: int, *, rectified: bool
) -> bool:
    """Tell whether all equations together may be enough for a tensor, by their number.

    rank: numbers that the gradients and what was solved with them determine, at most.
    """
    equations = rank + sum(int(use.known.sum()) for use in uses) + int(entries[0].sum())
    return equations >= (ENOUGH_WITH_ZEROS if rectified else ENOUGH) * math.prod(shape)


def gradient_rank(uses: Sequence[Use], shape: Sequence[int]) -> int:
    """Return the largest rank that the gradients' equations of these uses may have."""
    rows = sum(use.gradient[:, 0].numel() for use in uses)
    return min(rows, shape[0] * shape[2] * shape[3]) * shape[1]


def too_large(uses: Sequence[Use], shape: Sequence[int]) -> bool:
    """Tell whether the gradients leave more open than is solved for densely, by their number."""
    return math.prod(shape) - gradient_rank(uses, shape) > MOST_NULL


def solve_jointly(
    system: System, entries: Entries, *, rectified: bool, start: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Solve a system for u, (B, I, H, W), and tell whether the search for zeros has settled.

    rectified: u is 0 or positive; its zeros are found on the way (`find_zeros`) and pinned. Wrong
    ones contradict the equations. start: zeros are pinned at first where it is exactly 0.
    """
    known, value = entries
    sought = 1 - known
    u = value * known if start is None else start
    free = sought if start is None or not rectified else sought * (u != 0).to(u)
    enough = SETTLED * system.right.norm().item()
    steps, settled = FIRST_STEPS if start is None else ROUND_STEPS, not rectified
    for _ in range(ROUNDS if rectified else 0):
        u = improve(system, system.right, u, free, steps, enough)
        steps = ROUND_STEPS
        zero = find_zeros(u, free, system.right - system.normal(u)) * sought
        now = sought - zero
        changed = int((now != free).sum())
        free, u = now, u * (1 - zero)
        settled = changed <= STILL * u.numel()
        if changed <= (STILL if start is None else STILL_LATER) * u.numel():
            break
    return improve(system, system.right, u, free, LAST_STEPS, enough), settled


@dataclass(frozen=True)
class Openness:
    """Says what the equations leave open of a tensor's entries that are sought."""

    #: Estimate of the number of open directions, those that converge slowly included.
    directions: float
    #: Largest singular value of the weighted equations over that of the slowest direction seen:
    #: a lower bound of their condition.
    condition: float

    @property
    def count(self) -> int:
        """Return the number of open directions, 0 where the estimate is as small as for none."""
        return 0 if self.directions <= MOST_OPEN else max(1, round(self.directions))


def openness(
    system: System, free: Tensor, generator: torch.Generator, probes: int, steps: int
) -> Openness:
    """Estimate how many directions the equations leave open, by solving N u = 0 from random starts.

    A direction that is open keeps its random component, so that ‖u‖² is, on average, the trace of
    the projector onto the open ones: their number (Hutchinson's estimate of a trace, 1989). What is
    left of slow directions adds to it. free: 0/1, (B, I, H, W), the entries that are sought.
    """
    largest, least, directions = 0.0, math.inf, 0.0
    for _ in range(probes):
        z = torch.randn(free.shape, generator=generator, dtype=free.dtype).to(free) * free
        slope = free * system.normal(z)
        enough = PROBE_SETTLED * slope.norm().item()
        left = improve(system, torch.zeros_like(z), z, free, steps, enough)
        directions += left.square().sum().item() / probes
        largest = max(largest, _stretch(system, slope))
        least = min(least, _stretch(system, left))
    return Openness(directions, (largest / max(least, 1e-300)) ** 0.5 if largest > 0 else 1.0)


def _stretch(system: System, direction: Tensor) -> float:
    """Return Rayleigh's quotient of the normal equations, infinite for a direction of zeros."""
    square = direction.square().sum().item()
    if not square > 0:
        return math.inf
    return max(0.0, (direction * system.normal(direction)).sum().item() / square)


def sampled_square(system: System, found: Found, free: Tensor, generator: torch.Generator) -> float:
    """Return the squared norm of u's error that random errors of the equations cause, by a trial.

    A parametric bootstrap: the equations are solved once more with random errors in their place.
    Their variance is that of what u leaves, allowing for the numbers that u fitted, or the
    gradient's own, whichever is larger. free: 0/1, (B, I, H, W), the entries that are sought.
    """

    def normal_numbers(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like)

    unknowns = int(free.sum())
    fitted = system.equations / max(1, system.equations - unknowns)
    rows, values = [], []
    for use, residual in zip(found.uses, found.residuals, strict=True):
        numbers = normal_numbers(use.gradient.permute(0, 2, 3, 1)).reshape(-1, free.shape[1])
        size = max(fitted * residual**2, use.accuracy.error**2) ** 0.5
        rows.append(size / use.gradient.numel() ** 0.5 * numbers)
        if bool(use.known.any()):
            left = (use.output - use.geometry.forward(found.u, use.weight)) * use.known
            variance = fitted * left.square().sum() / use.known.sum()
            values.append(variance.sqrt() * normal_numbers(left) * use.known)
    right = free * system.error(torch.cat(rows), values)
    enough = 1e-3 * right.norm().item()
    moved = improve(system, right, torch.zeros_like(free), free, PROBE_STEPS, enough)
    return system.to_input(moved).square().sum().item()


def solve_all_equations(
    uses: Sequence[Use], shape: Sequence[int], entries: Entries, near: Near, *, rectified: bool
) -> Found:
    """Solve all equations about a tensor together, correct the masks behind, and certify.

    Signals must not depend on what is sought. For the meaning of the arguments see `solve_tensor`.
    """
    unknowns, known = math.prod(shape), int(entries[0].sum())
    sought = 1 - entries[0]
    generator = torch.Generator().manual_seed(0)

    def free_of(u: Tensor) -> Tensor:
        return sought * (u != 0).to(u) if rectified else sought

    def solve(changed: Sequence[Use], last: Tensor | None) -> Found:
        system = joint_system([use.term(use.signal()) for use in changed], shape)
        u, settled = solve_jointly(system, entries, rectified=rectified, start=last)
        left_open = 0.0 if settled else float(unknowns)
        if last is None:  # whether it is worth while to go on, for the time being
            left_open = openness(system, free_of(u), generator, 1, GLANCE_STEPS).directions
        rank = unknowns if left_open <= PROMISING * unknowns else unknowns - round(left_open)
        none = Propagation(0.0, system.equations, rank)
        solution = Solution(u, unknowns, system.equations + known, rank, 1.0, none)
        return Found(changed, u, solution, sampled_square=left_open * u.square().mean().item())

    found = repaired(uses, solve, near)
    if not found.solution.determined:
        return found
    system = joint_system([use.term(use.signal()) for use in found.uses], shape)
    free = free_of(found.u)
    seen = openness(system, free, generator, PROBES, PROBE_STEPS)
    zeros, rests_on_zeros = int((sought - free).sum()), False
    if zeros:
        without = openness(system, sought, generator, 1, FIRST_STEPS)
        rests_on_zeros = zeros < PLENTY * without.directions
    solution = replace(found.solution, rank=unknowns - seen.count, condition=seen.condition)
    square = sampled_square(system, found, free, generator)
    return replace(found, solution=solution, sampled_square=square, rests_on_zeros=rests_on_zeros)
