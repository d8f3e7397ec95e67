"""Solving a gradient layer by layer: the head, a convolution, BatchNorm, ReLU masks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian

from inversion.layerwise.accuracy import ARITHMETIC, LARGEST, LEAST, Accuracy
from inversion.layerwise.batchnorm import (
    BatchNorm,
    Use,
    common_offset,
    outputs_from_gradient,
    refine_coupled,
)
from inversion.layerwise.convolution import (
    Geometry,
    Term,
    gradient_matrix,
    preconditioner,
    solve_gradients,
    term_equations,
)
from inversion.layerwise.head import head_features
from inversion.layerwise.least_squares import (
    Equations,
    conjugate_gradients,
    inverse_square,
    known_entries,
)
from inversion.layerwise.masks import (
    doubted_channels,
    fitted_signals,
    flipped,
    pursued_flips,
    rectify,
    rounded_mask,
)
from inversion.layerwise.solve import search_mask, solve_tensor

SAME = Geometry((3, 3), (1, 1), (1, 1))
#: Of a gradient in float64, with room for what the equations' conditions cost.
EXACT = Accuracy(1e-10)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rectified(*shape, seed=0):
    return numbers(*shape, seed=seed).relu()


def error(found, true):
    return ((found - true).norm() / true.norm()).item()


# The head --------------------------------------------------------------------------------------


def head_gradient(features, weight, bias, y, smoothing=0.0, scales=None):
    """∂L/∂W and ∂L/∂b, by autograd, with every image's part multiplied by its factor."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    losses = F.cross_entropy(
        features @ weight.T + bias, y, reduction="none", label_smoothing=smoothing
    )
    loss = (losses if scales is None else scales * losses).mean()
    return torch.autograd.grad(loss, [weight, bias])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", [False, True])
def test_the_head_gives_every_images_features(biased, smoothing, trained):
    y = torch.tensor([4, 0, 7, 2])
    features, weight = rectified(4, 30), 0.1 * numbers(9, 30, seed=1)
    if trained:  # weights that see the label, so that its probability is large
        weight[y] += 0.15 * (features - features.mean(0))
    bias = 0.3 * numbers(9, seed=2) if biased else torch.zeros(9, dtype=torch.float64)
    probabilities = (features @ weight.T + bias).softmax(1)
    assert (probabilities[range(4), y].mean() > 0.6) == trained
    gradient, _ = head_gradient(features, weight, bias, y, smoothing)
    head = head_features(weight, bias if biased else None, gradient, y, smoothing)
    assert head.rank == 4
    assert head.residual < 1e-12
    assert error(head.features, features) < 1e-8
    torch.testing.assert_close(head.probabilities, probabilities)
    labels = (1 - smoothing) * F.one_hot(y, 9) + smoothing / 9
    torch.testing.assert_close(head.signal, (probabilities - labels) / 4)
    singular = torch.linalg.svdvals(head.signal)
    assert head.condition == pytest.approx((singular[0] / singular[-1]).item())


def test_repeated_labels_of_a_symmetric_head_have_too_small_a_rank():
    """Images that the head cannot tell apart have one direction together: their sum is found."""
    y = torch.tensor([1, 1, 5])
    features, weight = numbers(3, 20), torch.zeros(6, 20, dtype=torch.float64)
    gradient, _ = head_gradient(features, weight, torch.zeros(6, dtype=torch.float64), y)
    head = head_features(weight, None, gradient, y)
    assert head.rank == 2
    assert head.residual < 1e-12
    torch.testing.assert_close(head.features[:2].sum(0), features[:2].sum(0))
    torch.testing.assert_close(head.features[2], features[2])
    assert not torch.allclose(head.features[0], features[0])


def test_more_images_than_classes_have_too_small_a_rank():
    y = torch.tensor([0, 1, 2, 0, 1])
    features, weight, bias = numbers(5, 20), 0.1 * numbers(3, 20, seed=1), numbers(3, seed=2)
    head = head_features(weight, bias, head_gradient(features, weight, bias, y)[0], y)
    assert head.rank == 2  # the rows of P − Y sum to 0
    assert torch.isfinite(head.features).all()


@pytest.mark.parametrize("scales", [[1.0, 0.3, 0.05], [0.2, 0.2, 0.2]])
def test_the_head_finds_the_factors_of_a_client_that_clips(scales):
    y, scales = torch.tensor([3, 0, 5]), torch.tensor(scales, dtype=torch.float64)
    features, weight, bias = rectified(3, 30), 0.1 * numbers(8, 30, seed=1), numbers(8, seed=2)
    gradient, of_bias = head_gradient(features, weight, bias, y, scales=scales)
    head = head_features(weight, bias, gradient, y, scaled_by=of_bias)
    assert error(head.features, features) < 1e-8
    unscaled = (head.probabilities - F.one_hot(y, 8)) / 3
    torch.testing.assert_close(head.signal, scales[:, None] * unscaled)
    assert error(head_features(weight, bias, gradient, y).features, features) > 0.1


def test_the_head_of_a_wrong_label_leaves_much():
    features, weight, bias = rectified(3, 30), 0.1 * numbers(8, 30, seed=1), numbers(8, seed=2)
    gradient, _ = head_gradient(features, weight, bias, torch.tensor([3, 0, 5]))
    assert head_features(weight, bias, gradient, torch.tensor([3, 0, 6])).residual > LARGEST


# A convolution ---------------------------------------------------------------------------------

GEOMETRIES = [
    SAME,
    Geometry((1, 1)),
    Geometry((1, 1), (2, 2)),
    Geometry((3, 3), (2, 2), (1, 1)),
    Geometry((2, 3), (1, 2), (0, 1)),
    Geometry((5, 5), (2, 2), (2, 2)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
def test_the_matrix_of_a_convolution_is_that_of_its_weight_gradient(geometry, size):
    u = numbers(2, 3, *size).requires_grad_()
    weight = numbers(4, 3, *geometry.kernel, seed=1).requires_grad_()
    z = F.conv2d(u, weight, stride=geometry.stride, padding=geometry.padding)
    d = numbers(*z.shape, seed=2)
    by_weight, by_input = torch.autograd.grad(z, [weight, u], d)
    torch.testing.assert_close(geometry.forward(u, weight), z)
    torch.testing.assert_close(geometry.weight_gradient(u, d), by_weight)
    torch.testing.assert_close(geometry.backward(d, weight, u.shape), by_input)
    matrix = gradient_matrix(d, *size, geometry)
    for channel in range(3):
        rows = matrix @ u[:, channel].flatten()
        torch.testing.assert_close(rows.reshape(4, *geometry.kernel), by_weight[:, channel])


def term_of(u, outputs, geometry=SAME, seed=0, share=0.0):
    """The equations of a convolution about its input u, a share of its outputs known."""
    weight = numbers(outputs, u.shape[1], *geometry.kernel, seed=seed + 1)
    z = geometry.forward(u, weight)
    d = numbers(*z.shape, seed=seed + 2)
    known = (torch.rand(z.shape, generator=torch.Generator().manual_seed(seed)) < share).double()
    gradient = geometry.weight_gradient(u, d)
    return Term(geometry, weight, gradient, d, known, torch.where(known > 0, z, 1e3))


def dense(terms, shape):
    """The best u, and the rank, of all equations of all terms in one matrix."""
    rows, right = [], []
    for term in terms:
        on = term.known > 0
        for apply, target in (
            (lambda u, t=term: t.geometry.weight_gradient(u, t.signal).flatten(), term.gradient),
            (lambda u, t=term, on=on: t.geometry.forward(u, t.weight)[on], term.output[on]),
        ):
            matrix = jacobian(apply, torch.zeros(shape, dtype=torch.float64))
            rows.append(matrix.reshape(matrix.shape[0], -1))
            right.append(target.flatten())
    rows, right = torch.cat(rows), torch.cat(right)
    found = torch.linalg.lstsq(rows, right[:, None], driver="gelsd").solution
    return found.reshape(shape), int(torch.linalg.matrix_rank(rows))


@pytest.mark.parametrize(("outputs", "terms"), [(6, 1), (3, 2)])
def test_determined_equations_give_the_input(outputs, terms):
    u = numbers(2, 3, 4, 4)
    given = [term_of(u, outputs, seed=10 * n) for n in range(terms)]
    found = solve_gradients(given, u.shape, 1e-6)
    assert (found.unknowns, found.rank, found.equations) == (96, 96, 54 * 3)
    assert found.determined
    assert found.residual < 1e-12
    assert error(found.u, u) < 1e-10
    matrix = torch.cat(
        [gradient_matrix(t.signal, 4, 4, SAME) / t.gradient.norm() for t in given]
    )
    assert found.condition == pytest.approx(torch.linalg.cond(matrix).item())


@pytest.mark.parametrize("geometry", [SAME, Geometry((3, 3), (2, 2), (1, 1))])
def test_known_outputs_fill_what_the_gradient_leaves_open(geometry):
    u = numbers(2, 3, 4, 4)
    given = [term_of(u, 2, geometry, share=1.0), term_of(u, 9, Geometry((1, 1), (2, 2)), share=0.9)]
    best, rank = dense(given, u.shape)
    found = solve_gradients(given, u.shape, 1e-6)
    assert found.rank == rank
    assert found.equations == sum(t.gradient.numel() + int(t.known.sum()) for t in given)
    assert error(found.u, best) < 1e-8
    alone = solve_gradients(given, u.shape, 1e-6, use_outputs=False)
    assert alone.rank < rank
    assert alone.residual < 1e-12
    assert found.determined == (rank == u.numel())
    if found.determined:
        assert error(found.u, u) < 1e-8


def test_a_rank_deficit_without_outputs_is_reported():
    u = numbers(2, 3, 4, 4)
    term = term_of(u, 2)
    found = solve_gradients([replace(term, known=None, output=None)], u.shape, 1e-6)
    matrix = gradient_matrix(term.signal, 4, 4, SAME)
    assert found.rank == 3 * int(torch.linalg.matrix_rank(matrix)) < found.unknowns
    assert not found.determined
    least = torch.linalg.pinv(matrix) @ term.gradient.permute(0, 2, 3, 1).reshape(-1, 3)
    torch.testing.assert_close(found.u, least.T.reshape(3, 2, 4, 4).transpose(0, 1))


def test_directions_below_the_cut_are_not_used():
    """Two images with nearly the same signal: their sum is determined, their difference is not."""
    u = numbers(2, 3, 4, 4)
    term = term_of(u, 6)
    signal = torch.stack([term.signal[0], term.signal[0] + 1e-6 * term.signal[1]])
    term = replace(term, signal=signal, gradient=SAME.weight_gradient(u, signal))
    coarse, fine = (solve_gradients([term], u.shape, cut) for cut in (1e-4, 1e-9))
    assert (coarse.rank, fine.rank) == (48, 96)
    assert coarse.condition < 1e4 < fine.condition
    assert error(fine.u, u) < 1e-5
    assert error(coarse.u.sum(0), u.sum(0)) < 1e-5


def test_the_equations_of_a_term_are_met_and_transposed():
    u = numbers(2, 3, 4, 4)
    term = term_of(u, 4, share=0.5)
    equations = [*term_equations(term, u.shape), known_entries((u > 0).double(), u)]
    assert len(equations) == 3
    for e in equations:
        torch.testing.assert_close(e.forward(u), e.target)
        assert e.weight == pytest.approx(1 / e.target.square().sum().item())
        v, r = numbers(*u.shape, seed=7), numbers(*e.target.shape, seed=8)
        torch.testing.assert_close((e.forward(v) * r).sum(), (v * e.transpose(r)).sum())
    assert len(term_equations(replace(term, known=None), u.shape)) == 1


def test_the_preconditioner_inverts_the_damped_normal_equations():
    u = numbers(2, 3, 4, 4)
    terms = [term_of(u, 6), term_of(u, 2, seed=5)]
    matrix = torch.cat([gradient_matrix(t.signal, 4, 4, SAME) / t.gradient.norm() for t in terms])
    normal = matrix.T @ matrix
    normal += 1e-2 * torch.linalg.eigvalsh(normal)[-1] * torch.eye(32, dtype=torch.float64)
    found = preconditioner(terms, u.shape, damping=0.1)(u)
    for channel in range(3):
        back = normal @ found[:, channel].flatten()
        torch.testing.assert_close(back, u[:, channel].flatten())


# Least squares ---------------------------------------------------------------------------------


def test_nothing_to_meet_weighs_nothing():
    assert inverse_square(torch.zeros(3)) == 0
    assert inverse_square(torch.tensor([3.0, 4.0])) == pytest.approx(1 / 25)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients_find_the_least_squares(preconditioned):
    parts = [(numbers(30, 12, seed=s), numbers(30, seed=s + 1), w) for s, w in ((0, 1.0), (9, 0.2))]
    parts[0][0][:, :4] *= 20
    equations = [Equations(lambda u, a=a: a @ u, lambda r, a=a: a.T @ r, b, w) for a, b, w in parts]
    whole = torch.cat([w**0.5 * a for a, _, w in parts])
    best = torch.linalg.lstsq(whole, torch.cat([w**0.5 * b for _, b, w in parts])[:, None]).solution
    options, steps = {}, 60
    if preconditioned:
        inverse = torch.linalg.inv(whole.T @ whole)
        options, steps = {"precondition": lambda slope: inverse @ slope}, 1
    start = numbers(12, seed=4)
    found = conjugate_gradients(equations, start, steps, **options)
    assert error(found, best[:, 0]) < 1e-8
    if not preconditioned:
        assert error(conjugate_gradients(equations, start, 1), best[:, 0]) > 1e-3
    loose = conjugate_gradients(equations, start, 60, tolerance=2.0)
    assert torch.equal(loose, start)
