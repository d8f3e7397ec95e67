"""Runs expectation propagation (Minka, 2001) for max-pooled outputs of a convolution.

One Gaussian per image over its pixels stands for the posterior. Its factors say that every position
of the map before pooling lies below the pooled values of its windows, that one position per window
attains the pooled value, that pixels lie in a box, and that neighbouring pixels are alike. Which
position attains the value is not known; its probability follows from the Gaussian, and sharpens
from round to round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.layerwise.convolution import Geometry
from inversion.layerwise.stages import keep, note, same_kind
from inversion.layerwise.stem import block_tridiagonal
from inversion.layerwise.stem.grid_gaussian import (
    Grid,
    add_convolution,
    add_pixels,
    convolution_variance,
    flatten,
    pixel_variance,
    unflatten,
)
from inversion.layerwise.stem.moments import (
    Sites,
    between,
    cavity,
    damped,
    matching_sites,
    maximum_moments,
    no_sites,
)
from inversion.layerwise.stem.smoothness import (
    LEVEL,
    LEVEL_PRECISION,
    add_smoothness,
    gaussian_precisions,
    student_precisions,
)
from inversion.layerwise.stem.windows import Pooling, Windows, read_windows
from utils.journal import FORGETFUL, Journal, reading

#: Rounds of the propagation.
ROUNDS = 10
#: Least error of pooled values relative to the largest: that of the client's float32.
FLOAT_ERROR = 1e-6
#: Values that differ by less count as equal, in units of the error: two errors may add up.
EQUAL = 6
#: Weight of "no candidate attains the value", for windows whose values were compared wrongly.
#: Early the Gaussian itself may be wrong: then one of the candidates must attain it. LATE is the
#: share of the rounds after which the weight applies.
REST, LATE = 1e-6, 0.7
#: Deviation of a site that holds an equality, in units of the filter's norm: as if every pixel,
#: from 0 to 1, were that uncertain.
SITE_WIDTH = 2e-3
#: How many times wider the sites are in the first round. Narrow sites on positions that are not yet
#: certain make early mistakes persist.
WIDENING = 10.0
#: Share of the way that sites move in one round, and what multiplies it after a round that made the
#: image's residual larger.
DAMPING, CAUTION = 0.7, 0.5
#: Upper limit of the precision that the box gives a pixel.
BOX_PRECISION = 1e6
#: Keeps quotients finite where a network's filters or outputs are all zero.
TINY = 1e-30


@dataclass(frozen=True)
class Problem:
    """Holds what stays the same in all rounds. Pixels run from 0 to 1 over the box."""

    grid: Grid
    conv: Geometry
    pool: Pooling
    #: (B, O, h', w'): the pooled values.
    pooled: Tensor
    #: (O, C, k, l): the convolution with BatchNorm's scale and the box's width.
    weight: Tensor
    #: (1, O, h, w): what is added to that convolution's outputs.
    offset: Tensor
    windows: Windows
    #: (B, O, h, w): bounds of the convolution's outputs.
    bound: Tensor
    #: (B, O, h, w): variance of an equality's site in the last round.
    noise: Tensor


@dataclass(frozen=True)
class _State:
    """Holds the factors' Gaussian approximations."""

    #: Of the map before pooling, (B, O, h, w).
    maps: Sites
    #: Of the pixels' box, (B, C, H, W).
    pixels: Sites
    #: Per stencil of the prior, (B, C, rows, columns).
    precisions: list[Tensor]


@dataclass(frozen=True)
class _Course:
    """Holds how far the rounds have come."""

    #: Rounds done.
    number: int
    state: _State
    #: (B, 1, 1, 1): the share of the way that an image's sites move in one round.
    share: Tensor
    #: (B,): residuals of the last round, and the least of all rounds.
    last: Tensor
    least: Tensor
    #: (B, C, H, W): the images of the least residuals.
    best: Tensor


@dataclass(frozen=True)
class _Posterior:
    """Holds the Gaussian that all factors make."""

    #: (B, C, H, W): its mean.
    mean: Tensor
    #: Blocks of its covariance.
    covariance: block_tridiagonal.BlockTridiagonal
    #: (B, C, H, W): variances of the pixels.
    variance: Tensor


def problem_for(
    pooled: Tensor,
    grid: Grid,
    conv: Geometry,
    pool: Pooling,
    weight: Tensor,
    offset: Tensor,
    error: float,
) -> Problem:
    """Gather bounds, groups and the width of the sites. weight, offset: of pixels from 0 to 1."""
    largest = pooled.amax((1, 2, 3), keepdim=True)
    error = max(error, FLOAT_ERROR)
    windows = read_windows(
        pooled, pool, (offset.shape[-2], offset.shape[-1]), EQUAL * error * largest
    )
    norm = weight.flatten(1).norm(dim=1).view(1, -1, 1, 1)
    width = torch.maximum(SITE_WIDTH * norm, 3 * error * largest)
    # A filter of zeros has no width of its own.
    noise = width.clamp_min(float(SITE_WIDTH * norm.max()) / 1000 + TINY).square()
    bound = windows.bound - offset
    noise = noise.expand_as(bound)
    return Problem(grid, conv, pool, pooled, weight, offset, windows, bound, noise)


def propagate(
    problem: Problem,
    should_stop: Callable[[], bool],
    journal: Journal = FORGETFUL,
    name: str = "stem",
) -> tuple[Tensor, Tensor]:
    """Run ROUNDS rounds; per image return the one that explains the pooled values best.

    Sites move together. Where filters outnumber the values in a window they overshoot, and the
    residual rises: then the image's sites move less from there on. should_stop: asked before every
    round but the first; true ends it there. journal: where the rounds are saved as `name`, and from
    where killed ones go on.
    Returns images (B, C, H, W) from 0 to 1, and their residuals (B,).
    """
    course, saved = _begin(problem), journal.recall(name)
    if saved is not None:
        course = _course_from(saved, course)
    while course.number < ROUNDS:
        stop = course.number > 0 and should_stop()
        keep(journal, name, partial(_plain, course), stop=stop)
        if stop:
            break
        course = _round(problem, course)
    else:
        note(journal, name, _plain(course))
    return course.best, course.least


def _begin(problem: Problem) -> _Course:
    state, like = _start(problem), problem.bound
    share = like.new_full((len(like), 1, 1, 1), DAMPING)
    last = like.new_full((len(like),), torch.inf)
    return _Course(0, state, share, last, last, torch.zeros_like(state.pixels.shift))


def _round(problem: Problem, course: _Course) -> _Course:
    """Look at the images of the sites as they are, and move the sites unless it is the last one."""
    number, state, share = course.number, course.state, course.share
    posterior = _posterior(problem, state)
    images = posterior.mean.clamp(0, 1)
    residual = _residual(problem, images)
    improved = residual < course.least
    best = torch.where(improved.view(-1, 1, 1, 1), images, course.best)
    least = torch.where(improved, residual, course.least)
    if number < ROUNDS - 1:
        rose = (residual > course.last).view(-1, 1, 1, 1)
        share = torch.where(rose, CAUTION * share, share)
        state = _next(problem, number, share, state, posterior)
    return _Course(number + 1, state, share, residual, least, best)


def _plain(course: _Course) -> dict:
    """Return how far the rounds have come as plain values and tensors."""
    state = course.state
    sites = {"maps": state.maps, "pixels": state.pixels}
    return {
        "number": course.number,
        **{name: [of.precision, of.shift] for name, of in sites.items()},
        "precisions": list(state.precisions),
        "share": course.share, "last": course.last, "least": course.least, "best": course.best,
    }  # fmt: skip


def _course_from(saved: Any, begun: _Course) -> _Course:
    """Read back what `_plain` wrote. begun: as the rounds began. Raises StateError."""
    with reading("the rounds of the stem"):
        state = begun.state
        maps, pixels = (
            Sites(same_kind(precision, of.precision), same_kind(shift, of.shift))
            for of, (precision, shift) in (
                (state.maps, saved["maps"]), (state.pixels, saved["pixels"]),
            )
        )  # fmt: skip
        pairs = zip(saved["precisions"], state.precisions, strict=True)
        return _Course(
            range(ROUNDS + 1)[int(saved["number"])],
            _State(maps, pixels, [same_kind(*pair) for pair in pairs]),
            same_kind(saved["share"], begun.share),
            same_kind(saved["last"], begun.last),
            same_kind(saved["least"], begun.least),
            same_kind(saved["best"], begun.best),
        )


def _next(
    problem: Problem, number: int, share: Tensor, state: _State, posterior: _Posterior
) -> _State:
    """Return the factors' approximations after round `number`, sites moved by a share of the way.

    share: (B, 1, 1, 1).
    """
    noise = problem.noise * WIDENING ** (2 - 2 * number / (ROUNDS - 1))
    maps = _update_maps(problem, noise, REST if number >= LATE * ROUNDS else 0.0, state, posterior)
    precisions = state.precisions
    if number > 0:
        # The first mean is so smooth that its differences would say "no edges".
        precisions = student_precisions(posterior.mean, posterior.covariance, problem.grid)
    pixels = _update_pixels(state, posterior)
    return _State(damped(state.maps, maps, share), damped(state.pixels, pixels, share), precisions)


def _residual(problem: Problem, images: Tensor) -> Tensor:
    """Return the relative error of the images' own pooled values: (B,)."""
    pool = problem.pool
    outputs = problem.conv.forward(images, problem.weight) + problem.offset
    own = F.max_pool2d(outputs.relu(), pool.kernel, pool.stride, pool.padding)
    size = problem.pooled.flatten(1).norm(dim=1).clamp_min(TINY)
    return (own - problem.pooled).flatten(1).norm(dim=1) / size


def _start(problem: Problem) -> _State:
    """Return the first sites: only maxima whose position is certain say something."""
    group, grid = problem.windows.group, problem.grid
    members = torch.bincount(group[group >= 0], minlength=problem.windows.num_groups)
    single = (group >= 0) & (members[group.clamp_min(0)] == 1)
    maps = Sites(
        torch.where(single, 1 / problem.noise, 0),
        torch.where(single, problem.bound / problem.noise, 0),
    )
    blank = problem.bound.new_zeros(len(group), grid.channels, grid.rows, grid.columns)
    return _State(maps, no_sites(blank), gaussian_precisions(len(group), grid, blank))


def _posterior(problem: Problem, state: _State) -> _Posterior:
    """Multiply all factors: the Gaussian over the pixels."""
    grid, conv, batch = problem.grid, problem.conv, len(problem.bound)
    matrix = block_tridiagonal.zeros(grid.sizes(), batch, problem.bound)
    add_convolution(matrix, grid, problem.weight, conv, state.maps.precision)
    add_smoothness(matrix, grid, state.precisions)
    add_pixels(matrix, grid, state.pixels.precision + LEVEL_PRECISION)
    right = conv.backward(state.maps.shift, problem.weight, state.pixels.shift.shape)
    right = right + state.pixels.shift + LEVEL_PRECISION * LEVEL
    factor = block_tridiagonal.factorise(matrix, grid.row_size)
    mean = unflatten(block_tridiagonal.solve(factor, flatten(right)), grid)
    covariance = block_tridiagonal.selected_inverse(factor)
    return _Posterior(mean, covariance, pixel_variance(covariance, grid))


def _update_maps(
    problem: Problem, noise: Tensor, rest: float, state: _State, posterior: _Posterior
) -> Sites:
    """Return the next sites of the map before pooling."""
    mean = problem.conv.forward(posterior.mean, problem.weight)
    variance = convolution_variance(
        posterior.covariance,
        problem.grid,
        problem.weight,
        problem.conv,
        (mean.shape[-2], mean.shape[-1]),
    )
    # An output that sees only padding has no variance.
    mean, variance = cavity(mean, variance.clamp_min(1e-6 * float(problem.noise.min())), state.maps)
    windows = problem.windows
    _, tilted_mean, tilted_variance = maximum_moments(
        mean, variance, problem.bound, windows.group, windows.num_groups, noise, rest
    )
    return matching_sites(tilted_mean, tilted_variance, mean, variance, 1 / noise)


def _update_pixels(state: _State, posterior: _Posterior) -> Sites:
    """Return the next sites of the pixels' box."""
    mean, variance = cavity(posterior.mean, posterior.variance, state.pixels)
    inside = between(mean, variance, 0.0, 1.0)
    return matching_sites(*inside, mean, variance, mean.new_tensor(BOX_PRECISION))
