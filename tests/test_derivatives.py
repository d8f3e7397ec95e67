"""∂objective/∂x against central differences in float64, and the ways to it against each other."""

import pytest
import torch

from inversion import settings
from inversion.objective import Objective
from inversion.pixel_gradient import PIXEL_GRADIENTS, exact, plain
from inversion.settings import Weights
from models.batchnorm import batchnorm_layers, replace_batchnorm, truncated_derivative
from models.build import build_model, init_head, load_weights
from models.gradient import batch_gradient, trainable_parameters
from tests.support import cosine, photos, smooth_network, target_of

ALL_PRIORS = Weights(0.7, {"tv": 0.02, "bn": 0.05, "norm": -0.01}, {"tv": 0.001})


def smooth_case(train_mode=True, **options):
    torch.manual_seed(1)
    model = smooth_network()
    x_true, x = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 1])
    target = target_of(model, x_true, y, train_mode=train_mode, num_classes=4)
    return Objective(model, target, y, **{"weights": ALL_PRIORS, **options}), x


@pytest.mark.parametrize("train_mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bn_source", ["batch", "running"])
@pytest.mark.parametrize("distance", ["sim", "L2"])
@pytest.mark.parametrize("method", settings.PIXEL_GRADIENTS)
def test_derivative_equals_central_differences(method, distance, bn_source, train_mode):
    objective, x = smooth_case(train_mode, distance_name=distance, bn_source=bn_source)
    losses, derivative = PIXEL_GRADIENTS[method](objective, x, 0.5)
    assert losses.total.item() == pytest.approx(objective(x, 0.5).total.item(), rel=1e-12)
    step, generator = 1e-5, torch.Generator().manual_seed(2)
    for _ in range(12):
        direction = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        difference = objective(x + step * direction, 0.5).total
        difference = (difference - objective(x - step * direction, 0.5).total) / (2 * step)
        along = (derivative * direction).sum()
        assert abs(difference - along) <= 1e-5 * derivative.norm() * direction.norm()
        assert abs(difference - along) <= 1e-5 * abs(difference) + 1e-9


def resnet_objective(**options):
    torch.manual_seed(0)
    model = build_model("resnet18", 8, (3, 32, 32))
    init_head(model, "normal")
    x, y = photos(8, 32)
    target = target_of(model, x, y, arch="resnet18")
    weights = Weights(priors={"tv": 0.01, "bn": 0.01})
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    return Objective(model, target, y, weights, bn_source="batch", **options), start


def test_exact_equals_plain_on_resnet18():
    objective, x = resnet_objective()
    losses, derivative = exact(objective, x, 0.0)
    plain_losses, plain_derivative = plain(objective, x, 0.0)
    assert cosine(derivative, plain_derivative) >= 0.999999
    assert (derivative.sign() == plain_derivative.sign()).float().mean() > 0.999
    assert losses.floats().total == pytest.approx(plain_losses.floats().total, rel=1e-5)
    assert all(parameter.grad is None for parameter in objective.model.parameters())


def test_detached_changes_the_second_derivative_only():
    objective, x = resnet_objective()
    detached, _ = resnet_objective(bn_grad="detached")
    losses, derivative = exact(objective, x, 0.0)
    truncated_losses, truncated = exact(detached, x, 0.0)
    assert truncated_losses.floats().total == pytest.approx(losses.floats().total, rel=1e-4)
    assert cosine(derivative, truncated) < 0.9
    assert cosine(truncated, plain(detached, x, 0.0)[1]) > 0.9999


@pytest.mark.parametrize("lacks", [None, "scale and shift", "shift", "running statistics"])
def test_truncated_batchnorm_has_the_same_gradient(lacks):
    torch.manual_seed(4)
    model = smooth_network()
    if lacks == "scale and shift":
        model[1] = torch.nn.BatchNorm2d(4, affine=False).double()
    if lacks == "shift":
        model[1].bias = None
    if lacks == "running statistics":
        model[1] = torch.nn.BatchNorm2d(4, track_running_stats=False).double()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    for train_mode in (True, False):
        native = batch_gradient(model, x, y, train_mode=train_mode)
        with truncated_derivative(model):
            truncated = batch_gradient(model, x, y, train_mode=train_mode)
        for a, b in zip(native, truncated, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert "forward" not in vars(batchnorm_layers(model)[0])


def test_batchnorm_without_shift_works_as_one_of_shift_zero():
    """Gradients, weights and GroupNorm in its place, with one missing parameter."""
    torch.manual_seed(4)
    with_shift, without = smooth_network(), smooth_network()
    without.load_state_dict(with_shift.state_dict())
    without[1].bias = None
    load_weights(without, {k: v for k, v in with_shift.state_dict().items() if k != "1.bias"})
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    for replaced in (False, True):
        for model in (with_shift, without) if replaced else ():
            replace_batchnorm(model, "groupnorm")
        theirs = dict(
            zip(
                trainable_parameters(with_shift),
                batch_gradient(with_shift, x, y, train_mode=True),
                strict=True,
            )
        )
        ours = batch_gradient(without, x, y, train_mode=True)
        assert len(ours) == len(theirs) - 1
        for name, g in zip(trainable_parameters(without), ours, strict=True):
            torch.testing.assert_close(g, theirs[name])


def test_truncated_batchnorm_holds_what_it_saved_for_constant():
    """One BN layer followed by x², derivative written out: the saved values do not move."""
    layer = torch.nn.Sequential(torch.nn.BatchNorm1d(1)).double().train()
    x = torch.tensor([[0.3], [-1.2], [2.0]], dtype=torch.float64, requires_grad=True)
    with truncated_derivative(layer):
        out = layer(x)
    (first,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[0, 0], x)
    # d_x = s (d − mean d − n mean(d n)) with d = 2 out: only d depends on x here, through out.
    n = ((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()).detach()
    s = 1 / (x.detach().var(correction=0) + 1e-5).sqrt()
    row = -torch.ones(3, dtype=torch.float64) / 3 - n[0, 0] * n[:, 0] / 3
    row[0] += 1
    cotangent = (2 * s * row)[:, None]  # of `first[0]` with respect to out
    expected = s * (cotangent - cotangent.mean() - n * (cotangent * n).mean())
    torch.testing.assert_close(second, expected)


def test_same_images_twice_weigh_the_same():
    """Weights mean the same whatever the batch size: a doubled batch has the same losses."""
    torch.manual_seed(1)
    model = smooth_network()
    x_true, x = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 2, 3])
    losses, derivatives = [], []
    for copies in (1, 2):
        batch, labels = x_true.repeat(copies, 1, 1, 1), y.repeat(copies)
        target = target_of(model, batch, labels, num_classes=4)
        objective = Objective(model, target, labels, ALL_PRIORS, bn_source="batch")
        loss, derivative = exact(objective, x.repeat(copies, 1, 1, 1), 0.0)
        losses.append(loss.floats())
        derivatives.append(derivative[:3] * copies)
    assert losses[0].total == pytest.approx(losses[1].total, rel=1e-10)
    assert losses[0].terms == pytest.approx(losses[1].terms, rel=1e-10)
    torch.testing.assert_close(*derivatives)


def test_a_prior_alone_has_a_derivative():
    objective, x = smooth_case(weights=Weights(0.0, {"norm": 1.0}))
    _, derivative = exact(objective, x, 0.0)
    norms = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(derivative, x / norms / len(x))
