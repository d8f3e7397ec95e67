"""Solves for one tensor of a network from all that the layers behind it say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inversion.layerwise.convolution import polished, solve_gradients, term_equations
from inversion.layerwise.fold import fold, folded, folded_near, folds, unfold
from inversion.layerwise.joint import gradient_rank, solvable, solve_all_equations, too_large
from inversion.layerwise.mask_repair import Found, Near, doubtful_entries, repaired, with_mask
from inversion.layerwise.masks import Rectified, rectify
from inversion.layerwise.offset import common_offset
from inversion.layerwise.outputs import outputs_from_gradient, search_mask
from inversion.layerwise.refine import solve_by_refining
from inversion.layerwise.use import Entries, Use

#: Steps of conjugate gradients on all equations, and where they end.
STEPS, SETTLED = 40, 1e-3
#: Floor of `rectify` where the images' common part was fixed afterwards, which has an error.
OFFSET_FLOOR = 3e-6
#: The same in units of an entry's expected error.
OFFSET_DEPTH = 4.0


@dataclass(frozen=True)
class Solved:
    """Holds a tensor that was solved for, and the masks behind it as they were repaired."""

    #: (B, I, H, W) before small values were set to zero.
    raw: Tensor
    #: What is taken for its value.
    value: Tensor
    #: Below it an entry of a ReLU counts as off; 0 for other tensors.
    threshold: float
    #: Name of a ReLU behind it → the mask that fits best, (B, O, h, w).
    masks: dict[str, Tensor]
    unknowns: int
    equations: int
    rank: int
    condition: float
    #: Norm of what it leaves of a gradient, relative to the gradient's, the largest of all.
    residual: float
    #: Relative error that follows from that residual, or from the gradient's own error.
    expected_error: float
    #: Mask entries changed.
    flips: int
    #: Whether its rank is full, its residual as small as the gradient's error allows, and the
    #: expected error small.
    certified: bool
    #: Whether other solutions with fewer zeros exist, which the tensors before must rule out.
    rests_on_zeros: bool


def solve_tensor(
    uses: Sequence[Use], shape: Sequence[int], entries: Entries, *, rectified: bool, near: Near
) -> Solved:
    """Solve for the tensor u of this shape (B, I, H, W) that the convolutions `uses` take.

    rectified: u is 0 or positive, as behind a ReLU. near: what the ReLUs behind were solved for;
    an entry of a mask that stands clear of its threshold is not turned over.
    """
    coupled = any(use.coupled for use in uses)
    if coupled and folds(uses, shape):
        return _solve_folded(uses, shape, entries, rectified=rectified, near=near)
    if not coupled:
        found = _solve_plain(uses, shape, entries, near, rectified=rectified)
    elif any(_many_positions(use) for use in uses):
        found = solve_by_refining(uses, shape, entries, near, rectified=rectified)
    else:
        found = _solve_by_outputs(uses, shape, rectified=rectified, near=near)
        if not found.certified:  # known entries count in all equations only
            other = solve_by_refining(uses, shape, entries, near, rectified=rectified)
            found = other if other.certified else found
    kept = Rectified(found.u, found.u, 0.0)
    if rectified and (
        _has_offset(uses) or (found.sampled_square is not None and not coupled)
    ):  # nothing is negative then: the error is known otherwise
        scatter = OFFSET_DEPTH * found.squared_error**0.5 / found.u.numel() ** 0.5
        kept = rectify(found.u, max(OFFSET_FLOOR, scatter / max(found.u.max().item(), 1e-300)))
    elif rectified:
        kept = rectify(found.u)
    solution = found.solution
    return Solved(
        raw=found.u,
        value=kept.value,
        threshold=kept.threshold,
        masks={use.relu: use.mask for use in found.uses if use.relu is not None},
        unknowns=solution.unknowns,
        equations=solution.equations,
        rank=solution.rank,
        condition=solution.condition,
        residual=found.residual,
        expected_error=found.expected_error,
        flips=found.flips,
        certified=found.certified,
        rests_on_zeros=found.rests_on_zeros,
    )


def _solve_folded(
    uses: Sequence[Use], shape: Sequence[int], entries: Entries, *, rectified: bool, near: Near
) -> Solved:
    """Solve with every position as an image of its own: 1×1 convolutions do not tell them apart."""
    count, channels, height, width = shape
    solved = solve_tensor(
        [folded(use) for use in uses],
        [count * height * width, channels, 1, 1],
        (fold(entries[0]), fold(entries[1])),
        rectified=rectified,
        near=folded_near(near, shape),
    )
    return replace(
        solved,
        raw=unfold(solved.raw, shape),
        value=unfold(solved.value, shape),
        masks={name: unfold(mask, shape) for name, mask in solved.masks.items()},
    )


def _cut(uses: Sequence[Use]) -> float:
    """Return the least singular value that is used, in shares of the largest."""
    return max(use.accuracy.cut for use in uses)


# Signals that do not depend on what is sought -------------------------------------------------


def _solve_plain(
    uses: Sequence[Use], shape: Sequence[int], entries: Entries, near: Near, *, rectified: bool
) -> Found:
    """Solve the linear equations: densely where that can do, else all of them together."""

    def jointly(rank: int) -> Found | None:
        if not solvable(uses, shape, entries, rank, rectified=rectified):
            return None
        return solve_all_equations(uses, shape, entries, near, rectified=rectified)

    if too_large(uses, shape):
        found = jointly(gradient_rank(uses, shape))
        return _solve_densely(uses, shape, entries, near) if found is None else found
    dense = _solve_densely(uses, shape, entries, near)
    joint = None if dense.solution.determined else jointly(dense.solution.rank)
    return joint if joint is not None and joint.solution.determined else dense


def _solve_densely(
    uses: Sequence[Use], shape: Sequence[int], entries: Entries, near: Near
) -> Found:
    """Decompose the gradients' equations, correct masks, and polish on all equations."""

    def solve(changed: Sequence[Use], _: Tensor | None) -> Found:
        terms = [use.term(use.signal()) for use in changed]
        solution = solve_gradients(terms, shape, _cut(uses))
        return Found(changed, solution.u, solution)

    found = repaired(uses, solve, near)
    if found.solution.rank == 0:
        return found
    terms = [use.term(use.signal()) for use in found.uses]
    more = bool(entries[0].any()) or any(len(term_equations(term, shape)) > 1 for term in terms)
    single = shape[2] * shape[3] == 1
    if not more or (single and found.solution.determined):
        return found  # the solution is the best one already, or as good
    return replace(found, u=polished(terms, *entries, found.u, STEPS, SETTLED))


# Signals that depend on it through BatchNorm in train mode -------------------------------------


def _solve_by_outputs(
    uses: Sequence[Use], shape: Sequence[int], *, rectified: bool, near: Near
) -> Found:
    """Recover every convolution's outputs, hence its signal, and solve; then again with both.

    For maps whose positions are fewer than the channels.
    """
    masks: dict[str, Tensor] = {}
    flips = 0
    for use in uses:
        if use.coupled and use.relu is not None and use.relu not in masks:
            doubtful = doubtful_entries(use, near)
            masks[use.relu], changed = search_mask(use, doubtful, 2 * use.accuracy.certified)
            flips += changed
    searched = [with_mask(use, masks[use.relu]) if use.relu in masks else use for use in uses]

    def solve(changed: Sequence[Use], _: Tensor | None) -> Found:
        return _from_outputs(changed, shape, rectified=rectified)

    found = solve(searched, None) if _has_offset(uses) else repaired(searched, solve, near)
    return replace(found, flips=flips + found.flips)


def _from_outputs(uses: Sequence[Use], shape: Sequence[int], *, rectified: bool) -> Found:
    """Solve with the outputs that the gradients give, and twice more with the solution's signals.

    Then the outputs that were known before are the only ones that count as equations.
    """
    outputs = [outputs_from_gradient(use) if use.coupled else None for use in uses]
    terms = [
        use.term(use.signal()) if o is None else use.term(o.signal, o.z)
        for use, o in zip(uses, outputs, strict=True)
    ]
    if _has_offset(uses) and rectified:
        solution = solve_gradients(terms, shape, _cut(uses), use_outputs=False)
        offset = common_offset(solution.u, [use for use in uses if use.coupled])
        common = shape[1] * shape[2] * shape[3]  # numbers that the means can say
        if offset.unique and solution.rank >= solution.unknowns - common:
            solution = replace(solution, rank=solution.unknowns)
        return Found(
            uses, offset.u, solution, offset_error=offset.error,
            rests_on_zeros=offset.rests_on_zeros,
        )  # fmt: skip
    solution = solve_gradients(terms, shape, _cut(uses))
    for _ in range(2):
        u = rectify(solution.u).value if rectified else solution.u
        z = [_output(use, u) for use in uses]
        terms = [use.term(use.signal_at(o)) for use, o in zip(uses, z, strict=True)]
        solution = solve_gradients(terms, shape, _cut(uses))
    return Found(uses, solution.u, solution)


def _many_positions(use: Use) -> bool:
    """Tell whether a gradient's row and column space say too little of its outputs and signal.

    The signal's columns lie in that space only if its rank is that of the signal: one less than
    there are positions.
    """
    positions = use.arriving[:, 0].numel()
    return 2 * positions > len(use.weight) + 2 or positions - 1 > use.weight[0].numel()


def _has_offset(uses: Sequence[Use]) -> bool:
    """Tell whether Σ ∂L/∂z = 0 leaves the images' common part open: outputs of one position."""
    coupled = [use for use in uses if use.coupled]
    return bool(coupled) and all(use.arriving.shape[2:].numel() == 1 for use in coupled)


def _output(use: Use, u: Tensor) -> Tensor:
    """Return w∗u, with what is known of it put in."""
    return torch.where(use.known > 0, use.output, use.geometry.forward(u, use.weight))
