"""The stem: photographs from max-pooled activations; each piece of the method by a slow twin."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats

from inversion.layerwise.convolution import Geometry
from inversion.layerwise.stem import block_tridiagonal
from inversion.layerwise.stem.block_tridiagonal import BlockTridiagonal
from inversion.layerwise.stem.grid_gaussian import (
    add_convolution,
    add_pixels,
    convolution_variance,
    flatten,
    grid_for,
    pixel_variance,
    unflatten,
)
from inversion.layerwise.stem.moments import (
    Sites,
    below,
    between,
    cavity,
    group_softmax,
    matching_sites,
    maximum_moments,
)
from inversion.layerwise.stem.posterior import stem_posterior
from inversion.layerwise.stem.propagation import ROUNDS
from inversion.layerwise.stem.smoothness import (
    STENCILS,
    add_smoothness,
    colours,
    gaussian_precisions,
    student_precisions,
)
from inversion.layerwise.stem.stencils import (
    add_differences,
    difference_variance,
    differences,
    stencil_shape,
)
from inversion.layerwise.stem.windows import Pooling, bounds, read_windows, window_positions
from utils.image_files import public_photographs
from utils.metrics import psnr


def square(kernel, stride, padding):
    return Geometry((kernel, kernel), (stride, stride), (padding, padding))


RESNET = square(7, 2, 3), Pooling(3, 2, 1)
SMALL = square(5, 2, 2), Pooling(3, 2, 1)
VGG = square(3, 1, 1), Pooling(2, 2, 0)
#: Image shape, convolution, filters.
SHAPES = [
    ((3, 11, 8), square(7, 2, 3), 5),
    ((1, 6, 5), square(3, 1, 1), 3),
    ((2, 5, 6), square(1, 1, 0), 3),
    ((3, 9, 7), square(5, 2, 2), 4),
    ((3, 9, 9), square(3, 2, 0), 2),
    ((3, 9, 8), Geometry((2, 5), (1, 2), (0, 3)), 4),
    ((2, 8, 5), Geometry((5, 1), (3, 1), (2, 0)), 3),
]
#: Those of the prior, and second differences, which reach two rows down.
ALL_STENCILS = [stencil for stencil, _ in STENCILS] + [
    ((0, 0, 1.0), (0, 1, -2.0), (0, 2, 1.0)),
    ((0, 0, 1.0), (1, 0, -2.0), (2, 0, 1.0)),
]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(matrix):
    """The whole matrix, zero outside its blocks."""
    sizes = [block.shape[-1] for block in matrix.diagonal]
    ends = list(itertools.accumulate(sizes))
    whole = matrix.diagonal[0].new_zeros(len(matrix.diagonal[0]), ends[-1], ends[-1])
    places = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    for place, block in zip(places, matrix.diagonal, strict=True):
        whole[:, place, place] = block
    for above, place, block in zip(places[:-1], places[1:], matrix.lower, strict=True):
        whole[:, place, above], whole[:, above, place] = block, block.mT
    return whole


def jacobian(function, grid):
    """The matrix of a linear function of images."""
    unit = torch.eye(sum(grid.sizes()), dtype=torch.float64)
    return function(unflatten(unit, grid)).flatten(1).T


def weighted(matrix, precision):
    """Jᵀ diag(precision) J per image."""
    return torch.stack([matrix.T @ (row[:, None] * matrix) for row in precision.flatten(1)])


def close(actual, expected, tolerance=1e-10):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


# Linear algebra ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[4], [3, 5], [5, 4, 6, 2]])
def test_block_tridiagonal_algebra_is_that_of_the_dense_matrix(sizes):
    matrix = block_tridiagonal.zeros(sizes, 2, random(1))
    for number, block in enumerate(matrix.diagonal):
        root = random(*block.shape, seed=number)
        block += root @ root.mT + 20 * torch.eye(block.shape[-1])
    for number, block in enumerate(matrix.lower):
        block += random(*block.shape, seed=10 + number)
    factor = block_tridiagonal.factorise(matrix)
    right = random(2, sum(sizes), seed=20)
    inverse = torch.linalg.inv(dense(matrix))
    close(block_tridiagonal.solve(factor, right), (inverse @ right[..., None])[..., 0])
    found = block_tridiagonal.selected_inverse(factor)
    kept = dense(
        BlockTridiagonal(
            *(tuple(torch.ones_like(b) for b in p) for p in (found.diagonal, found.lower))
        )
    )
    close(dense(found), inverse * kept)


def test_a_matrix_that_is_not_positive_definite_is_refused():
    matrix = BlockTridiagonal((-torch.eye(2, dtype=torch.float64)[None],), ())
    with pytest.raises(torch.linalg.LinAlgError):
        block_tridiagonal.factorise(matrix)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("shape", "conv", "filters"), SHAPES)
def test_precisions_and_variances_are_those_of_the_jacobians(shape, conv, filters, narrow):
    """By whole blocks, and by panels of one row that leave out what is 0 in the band."""
    grid, weight = grid_for(shape, conv), random(filters, shape[0], *conv.kernel)
    outputs = conv.forward(torch.zeros(2, *shape, dtype=torch.float64), weight)
    of_conv = jacobian(lambda images: conv.forward(images, weight), grid)
    tau = random(*outputs.shape, seed=1).square()
    matrix = block_tridiagonal.zeros(grid.sizes(), 2, tau)
    add_convolution(matrix, grid, weight, conv, tau)
    expected = weighted(of_conv, tau)
    close(dense(matrix), expected)

    pixels = random(2, *shape, seed=2).square() + 0.1
    add_pixels(matrix, grid, pixels)
    expected = expected + torch.diag_embed(flatten(pixels))
    mix = torch.linalg.qr(random(shape[0], shape[0], seed=3))[0]
    for number, stencil in enumerate(ALL_STENCILS):
        precision = random(2, shape[0], *stencil_shape(grid, stencil), seed=4 + number).square()
        add_differences(matrix, grid, mix, stencil, precision)
        taken = jacobian(lambda x, s=stencil: differences(x, grid, mix, s), grid)
        expected = expected + weighted(taken, precision)
    close(dense(matrix), expected)

    factor = block_tridiagonal.factorise(matrix, grid.row_size if narrow else None)
    covariance = block_tridiagonal.selected_inverse(factor)
    inverse = torch.linalg.inv(expected)
    right = random(2, len(inverse[0]), seed=30)
    close(block_tridiagonal.solve(factor, right), (inverse @ right[..., None])[..., 0])

    def variance(of):
        return torch.einsum("zi,bij,zj->bz", of, inverse, of)

    found = convolution_variance(covariance, grid, weight, conv, tuple(outputs.shape[-2:]))
    close(found.flatten(1), variance(of_conv))
    close(flatten(pixel_variance(covariance, grid)), inverse.diagonal(dim1=1, dim2=2))
    for stencil in ALL_STENCILS:
        taken = jacobian(lambda x, s=stencil: differences(x, grid, mix, s), grid)
        found = difference_variance(covariance, grid, mix, stencil)
        close(found.flatten(1), variance(taken))


def test_differences_are_those_of_the_pixels():
    images = random(1, 3, 4, 5)
    grid, mix = grid_for((3, 4, 5), VGG[0]), colours(3, images)
    close(mix @ mix.T, torch.eye(3, dtype=torch.float64))
    grey = images.sum(1, keepdim=True) / math.sqrt(3)
    for (stencil, _), expected in zip(
        STENCILS,
        (
            grey.diff(dim=-1),
            grey.diff(dim=-2),
            grey[..., 1:, 1:] - grey[..., :-1, :-1],
            grey[..., 1:, :-1] - grey[..., :-1, 1:],
        ),
        strict=True,
    ):
        close(differences(images, grid, mix, stencil)[:, :1], expected)


# The prior -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_prior_does_not_mind_a_flat_image_and_tightens_flat_places(channels):
    shape = (channels, 6, 5)
    grid, images = grid_for(shape, VGG[0]), torch.zeros(2, *shape, dtype=torch.float64)
    images[:, :, :, 3:] = 1
    precisions = gaussian_precisions(2, grid, images)
    matrix = block_tridiagonal.zeros(grid.sizes(), 2, images)
    add_smoothness(matrix, grid, precisions)
    level = flatten(torch.ones_like(images))[..., None]
    close(dense(matrix) @ level, torch.zeros_like(level), 1e-8)
    add_pixels(matrix, grid, torch.ones_like(images))
    covariance = block_tridiagonal.selected_inverse(block_tridiagonal.factorise(matrix))
    right, *_ = student_precisions(images, covariance, grid)
    assert right.shape == (2, channels, 6, 4)
    assert (right[:, 0, :, 2] < right[:, 0, :, 0] / 2).all()


# Moments -------------------------------------------------------------------------------------


def test_truncated_moments_are_those_of_scipy():
    # Standard limits within scipy's own accuracy, then limits far in the tails.
    means, deviations = (
        torch.tensor([[-3.0], [0.2], [0.9], [4.0]]).double(),
        torch.tensor([0.1, 1, 7]),
    )
    mean, variance = torch.broadcast_tensors(means, deviations.double().square())
    found_mean, found_variance = between(mean, variance, 0.0, 1.0)
    upper_mean, upper_variance, log_share = below(mean, variance, torch.full_like(mean, 0.5))
    for place in itertools.product(range(4), range(3)):
        m, d = mean[place].item(), variance[place].sqrt().item()
        if abs(m - 0.5) / d < 12:
            twin = stats.truncnorm(-m / d, (1 - m) / d, m, d)
            assert found_mean[place].item() == pytest.approx(twin.mean(), rel=1e-8)
            assert found_variance[place].item() == pytest.approx(twin.var(), rel=1e-6)
        if (m - 0.5) / d < 12:
            twin = stats.truncnorm(-math.inf, (0.5 - m) / d, m, d)
            assert upper_mean[place].item() == pytest.approx(twin.mean(), rel=1e-8)
            assert upper_variance[place].item() == pytest.approx(twin.var(), rel=1e-6)
            assert log_share[place].item() == pytest.approx(stats.norm.logcdf((0.5 - m) / d))


def test_truncation_far_from_the_mean_stays_in_the_interval():
    mean = torch.tensor([-1e3, -40.0, 41.0, 1e6]).double()
    moved, variance = between(mean, torch.ones_like(mean), 0.0, 1.0)
    assert ((moved >= 0) & (moved <= 1)).all()
    assert ((variance > 0) & (variance < 0.1)).all()
    far, variance, log_share = below(mean, torch.ones_like(mean), torch.zeros_like(mean))
    assert torch.isfinite(far).all()
    assert (variance > 0).all()
    assert torch.isfinite(log_share).all()
    untouched = below(mean, torch.ones_like(mean), torch.full_like(mean, torch.inf))
    close(untouched[0], mean)
    close(untouched[1], torch.ones_like(mean))


def test_softmax_within_groups():
    logits, group = random(7), torch.tensor([2, 0, 2, -1, 0, 2, 5])
    found = group_softmax(logits, group, 6, 0.0)
    close(found[[0, 2, 5]], logits[[0, 2, 5]].softmax(0))
    close(found[[1, 4]], logits[[1, 4]].softmax(0))
    assert (found[3], found[6]) == (0, 1)
    with_rest = group_softmax(logits, group, 6, math.exp(0.7))
    expected = torch.cat([logits[[1, 4]], torch.tensor([0.7]).double()]).softmax(0)[:2]
    close(with_rest[[1, 4]], expected, 1e-6)
    hopeless = group_softmax(logits - 2000, group, 6, 1.0)
    assert hopeless.max() < 1e-300


def test_tilted_moments_are_those_of_numerical_integration():
    mean, variance = torch.tensor([0.1, 0.7, -0.4]).double(), torch.tensor([0.3, 0.1, 0.5]).double()
    bound, noise = torch.full_like(mean, 0.5), torch.full_like(mean, 0.02**2)
    group = torch.tensor([0, 0, -1])
    p, tilted_mean, tilted_variance = maximum_moments(mean, variance, bound, group, 1, noise, 0.0)

    def cavity_density(u, x):
        return stats.norm.pdf(x, mean[u], variance[u].sqrt())

    def equality(x):
        return stats.norm.pdf(x, 0.5, 0.02)

    def integral(function, low, high):
        return integrate.quad(function, low, high, points=[min(high, 0.5)], limit=200)[0]

    # Which of two variables attains the bound: the other lies below it.
    attained = [integral(lambda x, u=u: cavity_density(u, x) * equality(x), 0, 1) for u in (0, 1)]
    lower = [integral(lambda x, u=u: cavity_density(u, x), -5, 0.5) for u in (0, 1)]
    first, second = attained[0] * lower[1], attained[1] * lower[0]
    assert p[0].item() == pytest.approx(first / (first + second), rel=1e-5)
    assert p.sum().item() == pytest.approx(1)

    for u in range(3):
        share = p[u].item()
        below_mass = integral(lambda x, u=u: cavity_density(u, x), -5, 0.5)

        def moment(power, u=u, share=share, mass=below_mass):
            spike = integral(lambda x: x**power * equality(x), 0.3, 0.7)
            rest = integral(lambda x: x**power * cavity_density(u, x), -5, 0.5) / mass
            return share * spike + (1 - share) * rest

        assert tilted_mean[u].item() == pytest.approx(moment(1), abs=1e-6)
        assert tilted_variance[u].item() == pytest.approx(moment(2) - moment(1) ** 2, abs=1e-6)


def test_sites_turn_the_cavity_into_the_tilted_moments():
    mean, variance = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.5, 0.2, 0.4]).double()
    old = Sites(torch.tensor([0.5, 1.0, 0.0]).double(), torch.tensor([0.1, 0.2, 0.0]).double())
    cavity_mean, cavity_variance = cavity(mean, variance, old)
    back = 1 / (1 / cavity_variance + old.precision)
    close(back, variance)
    close(back * (cavity_mean / cavity_variance + old.shift), mean)

    tilted = torch.tensor([0.4, 0.0, 0.0]).double(), torch.tensor([0.1, 9.0, 1e-9]).double()
    sites = matching_sites(*tilted, cavity_mean, cavity_variance, torch.tensor(1e3).double())
    matched = 1 / (1 / cavity_variance + sites.precision)
    assert matched[0].item() == pytest.approx(0.1)
    moved = matched * (cavity_mean / cavity_variance + sites.shift)
    assert moved[0].item() == pytest.approx(0.4)
    assert (sites.precision[1], sites.shift[1]) == (0, 0)  # wider than its cavity
    assert sites.precision[2] == 1e3  # the limit
    assert moved[2].item() == pytest.approx(0, abs=1e-12)


# Windows -------------------------------------------------------------------------------------


def twin_windows(pooled, pool, rows, columns):
    """Bounds, and a frozen set of candidates per window, of one map, by plain loops."""
    members = {
        (i, j): {
            (i * pool.stride - pool.padding + a, j * pool.stride - pool.padding + b)
            for a in range(pool.kernel)
            for b in range(pool.kernel)
        }
        & set(itertools.product(range(rows), range(columns)))
        for i in range(pooled.shape[0])
        for j in range(pooled.shape[1])
    }
    value = {window: pooled[window].item() for window in members}
    bound = {
        u: min([value[w] for w in members if u in members[w]], default=math.inf)
        for u in itertools.product(range(rows), range(columns))
    }
    candidates = {}
    for window in members:
        same, waiting = {window}, [window]
        while waiting:
            here = waiting.pop()
            for other in members:
                if (
                    other not in same
                    and value[other] == value[here]
                    and members[other] & members[here]
                ):
                    same.add(other)
                    waiting.append(other)
        fitting = {u for w in same for u in members[w] if bound[u] == value[window] > 0}
        common = {u for u in fitting if all(u in members[w] for w in same)}
        candidates[window] = frozenset(common or fitting)
    return bound, candidates, members


@pytest.mark.parametrize(
    ("pool", "size"), [(Pooling(3, 2, 1), 9), (Pooling(2, 2, 0), 9), (Pooling(3, 1, 0), 7)]
)
@pytest.mark.parametrize("flat", [False, True])
def test_windows_are_those_of_plain_loops(pool, size, flat):
    images = random(2, 1, size, size)
    if flat:
        images[:, :, :5, :6] = 0.3
    z = square(3, 1, 1).forward(images, random(3, 1, 3, 3, seed=1))
    if flat:
        z = (2 * z).round() / 2  # many equal values
    pooled, arg_max = F.max_pool2d(
        z.relu(), pool.kernel, pool.stride, pool.padding, return_indices=True
    )
    tolerance = torch.full((2, 1, 1, 1), 1e-9, dtype=torch.float64)
    found = read_windows(pooled, pool, (size, size), tolerance)
    used = found.group[found.group >= 0]
    assert used.max() < found.num_groups
    for b, o in itertools.product(range(2), range(3)):
        bound, candidates, members = twin_windows(pooled[b, o], pool, size, size)
        groups = {}
        for u, least in bound.items():
            assert found.bound[b, o][u] == least
            assert z[b, o][u] <= found.bound[b, o][u]
            number = found.group[b, o][u].item()
            if number >= 0:
                groups.setdefault(number, set()).add(u)
        assert {frozenset(g) for g in groups.values()} == {c for c in candidates.values() if c}
        for window in candidates:
            if pooled[b, o][window] > 0 and not flat:
                u = divmod(arg_max[b, o][window].item(), size)
                assert u in candidates[window]
    if not flat:  # images and maps share no group
        owners = torch.arange(6).view(2, 3, 1, 1).expand(found.group.shape)
        pairs = torch.stack([found.group, owners])[:, found.group >= 0].unique(dim=1)
        assert pairs.shape[1] == used.unique().numel()


def test_equal_up_to_the_tolerance_is_equal():
    z = random(1, 2, 8, 8).abs()
    pooled = F.max_pool2d(z, 3, 2, 1)
    exact = read_windows(pooled, Pooling(3, 2, 1), (8, 8), pooled.new_full((1, 1, 1, 1), 1e-9))
    off = pooled + 1e-6 * random(*pooled.shape, seed=1).clamp(-2, 2)
    found = read_windows(off, Pooling(3, 2, 1), (8, 8), pooled.new_full((1, 1, 1, 1), 5e-6))
    assert torch.equal(found.group, exact.group)
    strict = read_windows(off, Pooling(3, 2, 1), (8, 8), pooled.new_full((1, 1, 1, 1), 1e-12))
    assert not torch.equal(strict.group, exact.group)


def test_positions_outside_every_window_have_no_bound():
    pool = Pooling(2, 2, 0)
    pooled = random(1, 1, 2, 2).abs()
    found = bounds(pooled, window_positions(pool, (5, 5)), (5, 5))
    assert torch.isinf(found[0, 0, 4]).all()
    assert torch.equal(F.max_pool2d(found, 2, 2), pooled)
    assert (
        read_windows(pooled, pool, (5, 5), pooled.new_zeros(1, 1, 1, 1)).group[..., 4] < 0
    ).all()


# End to end ----------------------------------------------------------------------------------


def stem_of(images, filters, conv, pool, seed=0):
    """What `stem_posterior` takes, for a random network with BatchNorm, and the true images."""
    channels = images.shape[1]
    low = torch.full((channels, 1, 1), -2.0).double()
    high = torch.full((channels, 1, 1), 2.5).double()
    x = low + (high - low) * images.double()
    weight = random(filters, channels, *conv.kernel, seed=seed) / (conv.kernel[0] * channels)
    scale, shift = random(filters, seed=1).abs() + 0.5, 0.1 * random(filters, seed=2)
    z = conv.forward(x, weight) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    pooled = F.max_pool2d(z.relu(), pool.kernel, pool.stride, pool.padding)
    known = {"conv": conv, "pool": pool, "low": low, "high": high, "error": 1e-6}
    return (pooled, weight, scale, shift, tuple(images.shape[1:])), known


def scored(stem, known, images):
    return psnr((stem.images - known["low"]) / (known["high"] - known["low"]), images.double())


@pytest.mark.parametrize(
    ("channels", "layers", "size", "filters", "margin"),
    [
        (3, RESNET, (12, 12), 64, 19),
        (1, (square(5, 2, 3), RESNET[1]), (14, 10), 24, 12),
        (1, (square(5, 2, 3), RESNET[1]), (14, 10), 64, 35),  # more filters than window values
        (3, VGG, (11, 12), 16, 11),
        (3, (Geometry((3, 5), (1, 2), (1, 2)), VGG[1]), (11, 16), 64, 22),
    ],
)
def test_images_come_back(channels, layers, size, filters, margin):
    """Better than the true mean colours by a margin: about a third under what was measured."""
    images = public_photographs(2, (channels, *size), seed=3)
    given, known = stem_of(images, filters, *layers)
    stem = stem_posterior(*given, **known)
    flat = images.mean((2, 3), keepdim=True).expand(images.shape)
    gain = scored(stem, known, images) - psnr(flat, images)
    assert gain.mean() > margin


def test_images_are_independent_and_alike_every_time(monkeypatch):
    images = public_photographs(3, (3, 8, 8), seed=4)
    given, known = stem_of(images, 8, *SMALL)
    pooled, *rest = given
    together = stem_posterior(*given, **known)
    again = stem_posterior(*given, **known)
    assert torch.equal(together.images, again.images)
    alone = stem_posterior(pooled[1:2], *rest, **known)
    close(alone.images[0], together.images[1], 1e-8)
    monkeypatch.setattr("inversion.layerwise.stem.posterior.MEMORY", 0)
    in_turn = stem_posterior(*given, **known)
    for field in dataclasses.fields(together):
        close(getattr(in_turn, field.name), getattr(together, field.name), 1e-8)


def test_an_interruption_ends_the_rounds_with_the_best_images_until_then(monkeypatch):
    images = public_photographs(2, (3, 8, 8), seed=4)
    given, known = stem_of(images, 8, *SMALL)
    residuals, errors = [], []
    for rounds in (1, 3, ROUNDS):
        asked = iter(range(1, ROUNDS))
        stem = stem_posterior(
            *given, should_stop=lambda asked=asked, rounds=rounds: next(asked) == rounds, **known
        )
        residuals.append(stem.residual)
        errors.append((stem.images - stem_posterior(*given, **known).images).norm().item())
        assert len([*asked]) == max(0, ROUNDS - 1 - rounds)
    assert (residuals[0] > residuals[1]).all()
    assert (residuals[1] >= residuals[2]).all()
    assert errors[0] > errors[1] > errors[2] == 0


def test_the_right_images_leave_no_residual_and_wrong_values_leave_one():
    images = public_photographs(1, (3, 12, 12), seed=6)
    given, known = stem_of(images, 64, *RESNET)
    pooled, *rest = given
    right = stem_posterior(*given, **known)
    wrong = stem_posterior(pooled.flip(1), *rest, **known)
    assert right.residual < 0.02
    assert wrong.residual > 10 * right.residual
    x = right.images
    pooled_again = stem_of((x - known["low"]) / (known["high"] - known["low"]), 64, *RESNET)[0][0]
    own = (pooled_again - pooled).norm() / pooled.norm()
    assert right.residual.item() == pytest.approx(own.item(), rel=1e-6)


def test_no_harm_comes_from_odd_values():
    """Wrong, zero and contradictory values, dead filters: a finite image inside the box."""
    images = public_photographs(2, (3, 8, 8), seed=5)
    given, known = stem_of(images, 6, *SMALL)
    pooled, weight, scale, shift, shape = given
    dead = scale * torch.tensor([1, 1, 0, 1, 1, 1])
    for values, factors in (
        (pooled * (1 + 0.01 * random(*pooled.shape)), scale),
        (pooled * 10 * random(*pooled.shape).abs(), scale),
        (torch.zeros_like(pooled), scale),
        (-pooled, scale),
        (pooled * 1e6, scale),
        (pooled, dead),
        (pooled, 0 * scale),
    ):
        stem = stem_posterior(values, weight, factors, shift, shape, **known)
        for field in dataclasses.fields(stem):
            assert getattr(stem, field.name).isfinite().all()
        assert (stem.images >= known["low"] - 1e-9).all()
        assert (stem.images <= known["high"] + 1e-9).all()


def test_values_that_do_not_fit_are_refused():
    given, known = stem_of(torch.rand(1, 1, 6, 6), 3, *VGG)
    pooled, *rest = given
    with pytest.raises(ValueError, match="the stem makes"):
        stem_posterior(pooled[..., 1:], *rest, **known)
    with pytest.raises(ValueError, match="not all pooled values are finite"):
        stem_posterior(pooled * torch.nan, *rest, **known)
