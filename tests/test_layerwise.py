"""Solving a gradient layer by layer: the head, a convolution, BatchNorm, ReLU masks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian

from inversion.layerwise.accuracy import ARITHMETIC, LARGEST, LEAST, MOST_NOISE, Accuracy
from inversion.layerwise.batchnorm import BatchNorm
from inversion.layerwise.convolution import (
    Geometry,
    Term,
    gradient_matrix,
    preconditioner,
    solve_gradients,
    term_equations,
)
from inversion.layerwise.head import head_features
from inversion.layerwise.head_search import LEAST_PROBABILITY, HeadEquations, HeadGradient
from inversion.layerwise.least_squares import (
    Equations,
    Propagation,
    conjugate_gradients,
    inverse_square,
    known_entries,
    largest_value,
    least_norm,
    solve_symmetric,
)
from inversion.layerwise.masks import (
    doubted_channels,
    fitted_signals,
    flipped,
    pursued_flips,
    rectify,
    rounded_mask,
)
from inversion.layerwise.offset import common_offset
from inversion.layerwise.outputs import outputs_from_gradient, search_mask
from inversion.layerwise.solve import solve_tensor
from inversion.layerwise.use import Use

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


def confident(y, by):
    """Features of 9 classes, and a head that sees their labels, the more the larger `by`."""
    features, weight = rectified(4, 30), 0.1 * numbers(9, 30, seed=1)
    weight[y] += by * (features - features.mean(0))
    return features, weight, 0.3 * numbers(9, seed=2)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", [False, True])
def test_the_head_gives_every_images_features(biased, smoothing, trained):
    y = torch.tensor([4, 0, 7, 2])
    features, weight, bias = confident(y, 0.15 if trained else 0.0)
    bias = bias if biased else 0 * bias
    probabilities = (features @ weight.T + bias).softmax(1)
    assert (probabilities[range(4), y].mean() > 0.2) == trained
    gradient, _ = head_gradient(features, weight, bias, y, smoothing)
    head = head_features(weight, bias if biased else None, gradient, y, smoothing)
    assert head.rank == 4
    assert head.residual < 1e-12
    assert error(head.features, features) < 1e-8
    torch.testing.assert_close(head.probabilities, probabilities)
    labels = (1 - smoothing) * F.one_hot(y, 9).double() + smoothing / 9
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
    head = head_features(weight, bias, gradient, y, bias_gradient=of_bias, clipped=True)
    assert error(head.features, features) < 1e-8
    unscaled = (head.probabilities - F.one_hot(y, 8)) / 3
    torch.testing.assert_close(head.signal, scales[:, None] * unscaled)
    assert error(head_features(weight, bias, gradient, y).features, features) > 0.1


@pytest.mark.parametrize("biased", [True, False])
def test_the_head_of_a_confident_network_is_searched(biased):
    """The fixed point runs away from its solution then."""
    y = torch.tensor([4, 0, 7, 2])
    features, weight, bias = confident(y, 0.6)
    certainty = (features @ weight.T + bias).softmax(1)[range(4), y]
    assert 0.7 < certainty.min() < certainty.max() < 0.999
    gradient, of_bias = head_gradient(features, weight, bias, y)
    given = of_bias if biased else None
    stayed = head_features(weight, bias, gradient, y, bias_gradient=given, tolerance=1e9)
    assert stayed.residual > 0.01
    assert error(stayed.features, features) > 0.1
    head = head_features(weight, bias, gradient, y, bias_gradient=given, tolerance=1e-6)
    assert head.residual < 1e-9
    assert error(head.features, features) < 1e-6


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", ["logarithm", "probability"])
def test_the_searchs_slopes_are_those_of_automatic_differentiation(kind, biased):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = F.one_hot(torch.tensor([2, 0, 4]), 5).double()
    given = HeadGradient(
        drawn(5, 7), drawn(5), drawn(5, 7), drawn(5) if biased else None, labels
    )  # fmt: skip
    equations = HeadEquations(given, drawn(5, 3), drawn(3, 5))
    names = {"logarithm": "by_logarithms", "probability": "by_probabilities"}
    numbers = 0.1 * drawn(9)
    wanted = equations.sides(numbers)[1]
    assert bool((wanted < LEAST_PROBABILITY).any())
    assert bool((wanted > LEAST_PROBABILITY).any())
    slow = jacobian(getattr(equations, names[kind]), numbers)
    assert torch.allclose(getattr(equations, f"{kind}_slopes")(numbers), slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("classes", "count"), [(2, 1), (4, 3)])
def test_the_biass_gradient_tells_the_right_head_from_another(classes, count):
    """With one image less than classes the weights' gradient alone has several solutions."""
    y = torch.arange(count)
    several = 0
    for seed in range(8):
        features = rectified(count, 20, seed=seed)
        weight, bias = 0.3 * numbers(classes, 20, seed=seed + 1), numbers(classes, seed=seed + 2)
        weight[:count] += 0.2 * (features - features.mean(0))
        gradient, of_bias = head_gradient(features, weight, bias, y)
        alone = head_features(weight, bias, gradient, y, tolerance=1e-8)
        several += alone.residual < 1e-8 and error(alone.features, features) > 0.01
        head = head_features(weight, bias, gradient, y, bias_gradient=of_bias, tolerance=1e-8)
        assert head.residual > 1e-8 or error(head.features, features) < 1e-4
    assert several > 0


def test_the_heads_expected_error_is_what_noise_makes_of_it():
    y, level = torch.tensor([4, 0, 7, 2]), 1e-4
    features, weight, bias = confident(y, 0.15)
    gradient, of_bias = head_gradient(features, weight, bias, y)
    errors, expected = [], []
    for seed in range(20):
        noise, of = numbers(*gradient.shape, seed=100 + seed), numbers(9, seed=200 + seed)
        head = head_features(
            weight, bias, gradient + level * gradient.norm() / noise.norm() * noise, y,
            bias_gradient=of_bias + level * of_bias.norm() / of.norm() * of,
            tolerance=10 * level, error=level,
        )  # fmt: skip
        errors.append(error(head.features, features))
        expected.append(head.expected_error)
    assert 0.5 < torch.tensor(errors).mean() / torch.tensor(expected).mean() < 2


def test_the_head_of_a_wrong_label_leaves_much():
    features, weight, bias = rectified(3, 30), 0.1 * numbers(8, 30, seed=1), numbers(8, seed=2)
    gradient, _ = head_gradient(features, weight, bias, torch.tensor([3, 0, 5]))
    assert head_features(weight, bias, gradient, torch.tensor([3, 0, 6])).residual > LARGEST


# Dense systems ---------------------------------------------------------------------------------


def test_the_solution_of_the_least_norm_is_that_of_the_pseudoinverse():
    matrix = numbers(6, 3, seed=1) @ numbers(3, 5, seed=2)
    target = numbers(6, 2, seed=3)
    torch.testing.assert_close(least_norm(matrix, target), torch.linalg.pinv(matrix) @ target)


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
    assert error(found.u, u) < 1e-10
    matrix = torch.cat([gradient_matrix(t.signal, 4, 4, SAME) / t.gradient.norm() for t in given])
    assert found.condition == pytest.approx(torch.linalg.cond(matrix).item())
    trace = 3 * torch.linalg.inv(matrix.T @ matrix).trace().item()
    assert found.gradients == Propagation(pytest.approx(trace), 54 * 3, 96)
    assert found.outputs is None


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
    for term in given:
        left = term.gradient - term.geometry.weight_gradient(alone.u, term.signal)
        assert left.norm() < 1e-12 * term.gradient.norm()
    assert found.determined == (rank == u.numel())
    if found.determined:
        assert error(found.u, u) < 1e-8


def test_an_error_grows_by_the_trace_of_the_inverse():
    """Of one regression with many right sides, and of one that leaves no equation to spare."""
    matrix, level = numbers(30, 8, seed=1), 1e-3
    how = Propagation(torch.linalg.inv(matrix.T @ matrix).trace().item(), 30, 8)
    true, expected = [], []
    for seed in range(200):
        noise = level * numbers(30, seed=1000 + seed)
        x = torch.linalg.lstsq(matrix, noise[:, None]).solution[:, 0]  # the truth is 0
        true.append(x.square().sum().item())
        expected.append(how.squared_error((matrix @ x - noise).square().sum().item(), 0.0))
    assert 0.8 < sum(true) / sum(expected) < 1.25
    assert replace(how, equations=8).squared_error(0.0, 8 * level**2) == pytest.approx(
        level**2 * how.trace
    )


def test_a_trace_is_estimated_by_a_few_probes():
    matrix = numbers(60, 40, seed=1)
    normal, right = matrix.T @ matrix, numbers(40, seed=2)
    found, rank, trace, condition = solve_symmetric(normal, right)
    torch.testing.assert_close(found, torch.linalg.solve(normal, right))
    assert rank == 40
    assert trace == pytest.approx(torch.linalg.inv(normal).trace().item(), rel=0.3)
    assert condition == pytest.approx(torch.linalg.cond(matrix).item(), rel=0.05)
    flat = matrix.clone()
    flat[:, 7] = flat[:, 3]
    normal = flat.T @ flat
    found, rank, trace, condition = solve_symmetric(normal, normal @ right)
    inverse = torch.linalg.pinv(normal, hermitian=True)
    torch.testing.assert_close(found, inverse @ (normal @ right))
    assert rank == 39
    assert trace == pytest.approx(inverse.trace().item())
    values = torch.linalg.svdvals(flat)
    assert condition == pytest.approx((values[0] / values[38]).item())


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
    largest = largest_value(lambda v: normal @ v, normal[:, 0])
    assert largest == pytest.approx(torch.linalg.eigvalsh(normal)[-1].item(), rel=0.02)
    normal = normal + 1e-2 * largest * torch.eye(32, dtype=torch.float64)
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


# BatchNorm -------------------------------------------------------------------------------------


def batchnorm_of(z, train, seed=0):
    """A BatchNorm layer that has seen z, and its output."""
    channels = z.shape[1]
    weight, bias = 1 + 0.3 * numbers(channels, seed=seed), 0.3 * numbers(channels, seed=seed + 1)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    if train:
        var, mean = torch.var_mean(z.detach(), (0, 2, 3), correction=0)
        y = F.batch_norm(z, None, None, weight, bias, True, eps=1e-3)
    else:
        mean, var = (
            numbers(channels, seed=seed + 2),
            0.5 + numbers(channels, seed=seed + 3).square(),
        )
        y = F.batch_norm(z, mean, var, weight, bias, eps=1e-3)
    return BatchNorm(weight, bias, mean, var, 1e-3), y


def in_train_mode(layer, gradient_of_weight, gradient_of_bias):
    detached = replace(layer, weight=layer.weight.detach(), bias=layer.bias.detach())
    return replace(detached, weight_gradient=gradient_of_weight, bias_gradient=gradient_of_bias)


def test_batchnorm_in_train_mode_passes_back_what_autograd_does():
    z, dy = numbers(4, 3, 2, 5).requires_grad_(), numbers(4, 3, 2, 5, seed=9)
    layer, y = batchnorm_of(z, train=True)
    dz, of_weight, of_bias = torch.autograd.grad(y, [z, layer.weight, layer.bias], dy)
    layer = in_train_mode(layer, of_weight, of_bias)
    assert layer.coupled
    torch.testing.assert_close(layer.signal(dy, z), dz)
    constant, slope = layer.constants(dy)
    centred = z - layer.mean.view(1, -1, 1, 1)
    torch.testing.assert_close(constant - slope.view(1, -1, 1, 1) * centred, dz)
    torch.testing.assert_close(layer.input_of(y), z)


def test_batchnorm_in_eval_mode_is_an_affine_map():
    z, dy = numbers(4, 3, 2, 5).requires_grad_(), numbers(4, 3, 2, 5, seed=9)
    layer, y = batchnorm_of(z, train=False)
    assert not layer.coupled
    torch.testing.assert_close(layer.signal(dy, None), torch.autograd.grad(y, z, dy)[0])
    torch.testing.assert_close(layer.input_of(y), z)


def use_of(u, outputs, *, train, geometry=SAME, seed=0):
    """All that is known of conv → BatchNorm → ReLU behind u, and the true signal at the conv."""
    weight = numbers(outputs, u.shape[1], *geometry.kernel, seed=seed + 10) / u.shape[1]
    weight.requires_grad_()
    z = geometry.forward(u, weight)
    z.retain_grad()
    layer, y = batchnorm_of(z, train, seed)
    y.relu()
    arriving, mask = numbers(*y.shape, seed=seed + 20), (y.detach() > 0).double()
    (y.relu() * arriving).sum().backward()
    layer = (
        in_train_mode(layer, layer.weight.grad, layer.bias.grad)
        if train
        else replace(layer, weight=layer.weight.detach(), bias=layer.bias.detach())
    )
    ones = torch.ones(outputs, dtype=torch.float64)
    output = torch.where(mask > 0, z.detach(), 1e3)
    use = Use(
        "conv", geometry, weight.detach(), weight.grad, arriving, mask, layer, EXACT, mask, output,
        ones, "relu",
    )  # fmt: skip
    return use, z.grad


@pytest.mark.parametrize("train", [False, True])
def test_a_use_says_the_signal_and_leaves_nothing_at_the_truth(train):
    u = rectified(3, 4, 4, 4)
    use, dz = use_of(u, 6, train=train)
    assert use.coupled == train
    torch.testing.assert_close(use.signal(u), dz)
    assert use.residual(u) < 1e-12
    off = flipped(use.mask, 17)
    assert torch.equal(flipped(use.mask.mT.contiguous().mT, 17), off)  # in memory transposed
    change = replace(use, mask=off).signal(u) - use.signal(u)
    assert change.flatten()[17] == pytest.approx(
        (use.per_flip * (1 - 2 * use.mask)).flatten()[17].item()
    )
    assert int((change.abs() > 1e-12).sum()) == 1
    part = replace(use, trusted=torch.tensor([1.0, 0, 1, 1, 0, 1]).double())
    assert not part.left_over(0 * u)[[1, 4]].any()
    assert part.left_over(0 * u)[[0, 2, 3, 5]].norm() > 0
    assert not part.term(dz).signal[:, 1].any()


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((2, 4, 2, 2), 24), ((4, 6, 3, 3), 96)],
    ids=["together", "one by one"],
)
def test_outputs_follow_from_a_coupled_gradient(shape, outputs):
    u = rectified(*shape)
    use, dz = use_of(u, outputs, train=True)
    found = outputs_from_gradient(use)
    assert found.residual < 1e-10
    assert error(found.z, SAME.forward(u, use.weight)) < 1e-7
    assert error(found.signal, dz) < 1e-7
    wrong = outputs_from_gradient(use, flipped(use.mask, 5))
    assert wrong.residual > 1e-4
    assert int(wrong.left.abs().argmax()) == 5
    assert wrong.left.norm() > 1e4 * found.left.norm()


def test_the_images_common_part_follows_from_the_batchs_mean():
    u = rectified(5, 4, 2, 2)
    geometry = Geometry((3, 3), (2, 2), (1, 1))
    use, _ = use_of(u, 24, train=True, geometry=geometry)
    assert use.arriving.shape[2:] == (1, 1)
    moved = u + numbers(1, 4, 2, 2, seed=5)
    assert error(moved, u) > 0.1
    found = common_offset(moved, [use])
    assert found.unique
    assert not found.rests_on_zeros
    assert error(found.u, u) < 1e-9
    assert found.error < 1e-6


def test_a_common_part_that_the_means_leave_open_rests_on_its_zeros():
    """Two images leave most of 36 common numbers free, and four means do not say them."""
    u = rectified(2, 4, 3, 3)
    use, _ = use_of(u, 4, train=True, geometry=Geometry((3, 3), (3, 3)))
    moved = u + numbers(1, 4, 3, 3, seed=5)
    found = common_offset(moved, [use])
    assert found.rests_on_zeros
    assert error(found.u, u) > 1e-3


def test_a_common_part_is_unique_by_its_zeros_alone():
    """With many images every number is 0 in one of them, which is the smallest that it can be."""
    u = rectified(9, 4, 3, 3)
    u[
        torch.arange(36) % 9, torch.arange(36) // 9, torch.arange(36) // 3 % 3, torch.arange(36) % 3
    ] = 0
    assert (u.amin(0) == 0).all()
    use, _ = use_of(u, 12, train=True, geometry=Geometry((3, 3), (3, 3)))
    weight = use.weight.abs()  # every change upwards shows in every mean
    use = replace(use, weight=weight, batchnorm=replace(
        use.batchnorm, mean=use.geometry.forward(u, weight).mean((0, 2, 3))))  # fmt: skip
    found = common_offset(u + numbers(1, 4, 3, 3, seed=5), [use])
    assert found.unique
    assert error(found.u, u) < 1e-9


# Masks -----------------------------------------------------------------------------------------


def test_what_is_as_near_to_zero_as_the_negative_values_is_off():
    raw = torch.tensor([-1e-3, 1.5e-3, 1.7e-3, 2.0, 0.0])
    found = rectify(raw)
    assert found.mask.tolist() == [0, 0, 1, 1, 0]
    assert found.value.tolist() == pytest.approx([0, 0, 1.7e-3, 2.0, 0])
    assert found.threshold == pytest.approx(1.6e-3)
    assert rectify(torch.tensor([1e-9, 1.0])).mask.tolist() == [0, 1]
    assert rectify(torch.tensor([1e-2, 1.0]), floor=0.1).mask.tolist() == [0, 1]


def test_a_wrong_entry_makes_its_channel_doubted():
    u = rectified(3, 4, 4, 4)
    use, _ = use_of(u, 12, train=False)
    for index in (0, 70, 200):
        wrong = replace(use, mask=flipped(use.mask, index))
        doubted = doubted_channels(wrong.left_over(u) + 1e-9)
        assert doubted.nonzero().flatten().tolist() == [index // 16 % 12]


def test_a_few_channels_are_doubted_and_the_worst_always():
    left = torch.ones(8, 2, 3, 3)
    assert doubted_channels(left).sum() == 1
    left[[1, 4, 6]] *= torch.tensor([9.0, 7, 8]).view(3, 1, 1, 1)
    assert doubted_channels(left).nonzero().flatten().tolist() == [1, 6]  # a quarter at most


@pytest.mark.parametrize("geometry", [SAME, Geometry((3, 3), (2, 2), (1, 1))])
def test_the_signals_follow_from_gradient_and_input(geometry):
    u = rectified(2, 6, 4, 4)
    term = term_of(u, 5, geometry)
    found = fitted_signals(term.gradient, u, geometry)
    torch.testing.assert_close(found, term.signal.transpose(0, 1).reshape(5, -1))


@pytest.mark.parametrize("wrong", [[3], [40, 41], [5, 150, 159]])
def test_wrong_entries_are_pursued(wrong):
    u = rectified(3, 4, 4, 4)
    use, _ = use_of(u, 12, train=False)
    mask = use.mask
    for index in wrong:
        mask = flipped(mask, index)
    spoilt = replace(use, mask=mask)
    change = spoilt.per_flip * (1 - 2 * mask)
    found = pursued_flips(spoilt.left_over(u), u, change, SAME, 10)
    assert sorted(found) == wrong
    assert len(pursued_flips(spoilt.left_over(u), u, change, SAME, 1)) == 1
    assert pursued_flips(use.left_over(u), u, 0 * change, SAME, 10) == []


def test_estimates_are_rounded_where_they_are_clear():
    estimate = torch.tensor([0.1, 0.9, 0.5, 1.2, 0.0, 1.0]).view(1, 1, 2, 3)
    arriving = torch.tensor([1.0, 1, 1, -1, 1e-5, 1e-5]).view(1, 1, 2, 3)
    mask = torch.tensor([1.0, 0, 1, 0, 1, 0]).view(1, 1, 2, 3)
    assert rounded_mask(estimate, arriving, mask).flatten().tolist() == [0, 1, 1, 1, 1, 0]


# One tensor ------------------------------------------------------------------------------------

#: Mode and kind of equations → shape of the tensor, outputs, wrong entries of the mask.
CASES = {
    "eval": (False, (3, 4, 4, 4), 12, [70]),
    "eval, three wrong": (False, (3, 4, 4, 4), 24, [70, 200, 500]),
    "train, few positions": (True, (2, 4, 2, 2), 24, [29]),
    "train, many positions": (True, (3, 4, 6, 6), 16, [301]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_is_solved_for_and_wrong_masks_are_repaired(case):
    train, shape, outputs, wrong = CASES[case]
    u = rectified(*shape)
    use, _ = use_of(u, outputs, train=train)
    mask = use.mask
    for index in wrong:
        mask = flipped(mask, index)
    spoilt = replace(use, mask=mask, known=use.known * mask)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    entries = nothing if case != "train, many positions" else ((u > 0.3).double(), u)
    for given, flips in ((use, 0), (spoilt, len(wrong))):
        found = solve_tensor([given], u.shape, entries, rectified=True, near={})
        assert found.certified
        assert found.flips == flips
        assert torch.equal(found.masks["relu"], use.mask)
        assert found.rank == found.unknowns == u.numel()
        assert error(found.value, u) < 1e-5
        assert torch.equal(found.value > 0, u > 0)
        assert found.residual <= EXACT.certified


def test_a_tensor_that_no_mask_explains_is_not_certified():
    u = rectified(3, 4, 4, 4)
    use, _ = use_of(u, 12, train=False)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    other = replace(use, gradient=numbers(*use.gradient.shape, seed=77))
    found = solve_tensor([other], u.shape, nothing, rectified=True, near={})
    assert not found.certified
    assert found.residual > LARGEST


def test_wrong_mask_entries_behind_a_coupled_convolution_show_themselves():
    use, _ = use_of(rectified(2, 4, 2, 2), 24, train=True)
    wrong = replace(use, mask=flipped(flipped(flipped(use.mask, 29), 3), 101))
    all_may_be_wrong = torch.ones_like(use.mask)
    mask, flips = search_mask(wrong, all_may_be_wrong, 1e-8)
    assert flips == 3
    assert torch.equal(mask, use.mask)
    assert search_mask(use, all_may_be_wrong, 1e-8)[1] == 0
    mask, flips = search_mask(wrong, flipped(all_may_be_wrong, 3), 1e-8)
    assert mask.view(-1)[3] == wrong.mask.view(-1)[3]
    assert flips == 2


def test_a_mask_entry_whose_value_is_clear_is_not_turned_over():
    """A gradient that calls for another mask is not believed where the value itself is known."""
    u = rectified(3, 4, 4, 4)
    use, _ = use_of(u, 24, train=False)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    entry = int((use.arriving * (1 - use.mask)).abs().argmax())
    spoilt = replace(use, mask=flipped(use.mask, entry))
    for value, stays in ((1e-9, False), (1.0, True)):
        raw = torch.where(spoilt.mask > 0, 1.0, -1e-9).double()
        raw.view(-1)[entry] = value
        near = {"relu": (raw, 1e-8)}
        found = solve_tensor([spoilt], u.shape, nothing, rectified=True, near=near)
        assert found.flips == (0 if stays else 1)
        assert found.certified != stays


def test_an_expected_error_is_what_noise_makes_of_a_tensor():
    """Of the gradient of one convolution, where there are hardly more equations than numbers."""
    u = rectified(2, 3, 5, 5)
    use, _ = use_of(u, 7, train=False)
    assert use.gradient[:, 0].numel() < 1.3 * u[:, 0].numel()
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    errors, expected = [], []
    for seed in range(20):
        noise = numbers(*use.gradient.shape, seed=100 + seed)
        disturbed = use.gradient + 1e-6 * use.gradient.norm() / noise.norm() * noise
        given = replace(
            use, gradient=disturbed, known=0 * use.known, accuracy=Accuracy(1e-16, 1e-6)
        )
        found = solve_tensor([given], u.shape, nothing, rectified=False, near={})
        errors.append(error(found.raw, u))
        expected.append(found.expected_error)
    ratio = torch.tensor(errors).square().mean() / torch.tensor(expected).square().mean()
    assert 0.5 < ratio.sqrt() < 2


def silenced(u, outputs, geometry, silence):
    """A coupled use of u without a ReLU, whose signals `silence` (dy → dy) makes say too little.

    ∂L/∂γ is 0, so that ∂L/∂z is ∂L/∂y times the scale.
    """
    use, _ = use_of(u, outputs, train=True, geometry=geometry)
    z = geometry.forward(u, use.weight)
    centred = z - z.mean((0, 2, 3), keepdim=True)
    dy = silence(numbers(*z.shape, seed=31))
    open_to_change = silence(centred)  # in the space of such signals
    share = (dy * centred).sum((0, 2, 3)) / (open_to_change * centred).sum((0, 2, 3))
    dy = dy - share.view(1, -1, 1, 1) * open_to_change
    layer = replace(
        use.batchnorm, weight_gradient=0 * use.batchnorm.mean, bias_gradient=dy.sum((0, 2, 3))
    )
    ones = torch.ones_like(dy)
    use = replace(use, arriving=dy, mask=ones, batchnorm=layer, known=0 * ones, output=0 * ones)
    return replace(use, gradient=geometry.weight_gradient(u, use.signal(u)))


def one_signal_for_two(dy):
    """Give two images the same signal, their mean."""
    return torch.cat([dy[:2].mean(0, keepdim=True).expand_as(dy[:2]), dy[2:]])


def none_for_one(dy):
    """Take one image's signal away, and the mean of the others'."""
    return torch.cat([0 * dy[:1], dy[1:] - dy[1:].mean((0, 2, 3), keepdim=True)])


@pytest.mark.parametrize(
    ("count", "channels", "geometry", "silence"),
    [(5, 4, Geometry((3, 3), (2, 2), (1, 1)), one_signal_for_two), (3, 8, SAME, none_for_one)],
    ids=["outputs of one position", "outputs of several"],
)
def test_what_a_coupled_gradient_leaves_open_is_not_certified(count, channels, geometry, silence):
    """Neither the images' common part nor outputs that were guessed stand in for equations.

    24 means of the batch do not complete the 32 numbers of one image that are open.
    """
    u = rectified(count, channels, 2, 2)
    use = silenced(u, 24, geometry, silence)
    assert use.residual(u) < 1e-12
    matrix = gradient_matrix(use.signal(u), 2, 2, geometry)
    common = 4 if geometry.stride == (2, 2) else 0
    assert int(torch.linalg.matrix_rank(matrix, rtol=1e-9)) < 4 * count - common
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    found = solve_tensor([use], u.shape, nothing, rectified=True, near={})
    assert error(found.value, u) > 0.01
    assert found.rank < found.unknowns
    assert not found.certified


def test_a_convolution_without_batchnorm_beside_a_coupled_one():
    u = rectified(3, 4, 6, 6)
    coupled, _ = use_of(u, 8, train=True)
    plain, _ = use_of(u, 8, train=False, seed=3)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    for beside in (plain, replace(plain, name="other", relu="other")):
        found = solve_tensor([coupled, beside], u.shape, nothing, rectified=True, near={})
        assert error(found.value, u) < 1e-5
        assert found.residual <= EXACT.certified


def test_a_head_that_is_certain_ends_without_a_crash():
    """Probabilities of 1 leave no signal, and so nothing to solve."""
    for certainty in (1.0, 3.0, 30.0):
        y = torch.tensor([2])
        features, bias = rectified(1, 30), 0.3 * numbers(10, seed=2)
        weight = 0.1 * numbers(10, 30, seed=1)
        weight[2] += certainty * features[0]
        gradient, of_bias = head_gradient(features, weight, bias, y)
        head = head_features(
            weight, bias, gradient, y, bias_gradient=of_bias, tolerance=1e-5, error=1e-7
        )
        right = error(head.features, features) < 1e-3
        assert right or head.rank < 1 or not head.residual < 1e-5 or head.expected_error > 1e-2


def test_a_signal_of_zeros_determines_nothing():
    u = rectified(2, 3, 4, 4)
    use, _ = use_of(u, 6, train=False)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    silent = replace(use, arriving=0 * use.arriving, known=0 * use.known)
    found = solve_tensor([silent], u.shape, nothing, rectified=True, near={})
    assert found.rank == 0
    assert not found.certified


# How exact ---------------------------------------------------------------------------------------


def test_thresholds_follow_from_rounding_and_noise():
    single = Accuracy(1e-7)
    assert single.certified == pytest.approx(ARITHMETIC * 1e-7)
    assert single.suspicious < single.certified
    assert Accuracy(0.0).certified == LEAST
    noisy = Accuracy(1e-7, 1e-4)
    assert noisy.certified == pytest.approx(single.certified + MOST_NOISE * 1e-4)
    assert single.certified < noisy.suspicious < noisy.certified
    assert Accuracy(1e-7, 1.0).certified == Accuracy(1e-7, 1.0).suspicious == LARGEST
    assert single.cut < Accuracy(1e-7, 1e-2).cut
