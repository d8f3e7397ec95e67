"""∂objective/∂x against central differences in float64, and the ways to it against each other."""

from dataclasses import replace

import pytest
import torch

from inversion import settings
from inversion.objective import Objective
from inversion.pixel_gradient import PIXEL_GRADIENTS, exact, plain
from inversion.settings import Weights
from models.batchnorm import (
    batchnorm_layers,
    replace_batchnorm,
    set_statistics,
    truncated_derivative,
)
from models.build import build_model, init_head, load_weights
from models.forced import forced_normalisation, forced_statistics
from models.gradient import (
    ClientLoss,
    batch_gradient,
    gradient_mode,
    trainable_parameters,
    whole_batch_gradient,
)
from tests.shared_work import network
from tests.support import cosine, photos, smooth_network, target_of
from utils.errors import InputError

#: The pixel gradients that are derivatives of the objective.
EXACT = [name for name in settings.PIXEL_GRADIENTS if name != settings.FINITE_DIFFERENCES]
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
@pytest.mark.parametrize("method", EXACT)
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


@pytest.mark.parametrize("bn_source", ["batch", "running"])
@pytest.mark.parametrize("distance", ["sim", "L2"])
@pytest.mark.parametrize("method", EXACT)
def test_forced_derivative_equals_central_differences(method, distance, bn_source):
    objective, x = smooth_case(distance_name=distance, bn_source=bn_source, bn_coupling="forced")
    losses, derivative = PIXEL_GRADIENTS[method](objective, x, 0.5)
    assert losses.total.item() == pytest.approx(objective.value(x, 0.5).total.item(), rel=1e-12)
    step, generator = 1e-5, torch.Generator().manual_seed(2)
    for _ in range(6):
        direction = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        difference = objective(x + step * direction, 0.5).total
        difference = (difference - objective(x - step * direction, 0.5).total) / (2 * step)
        along = (derivative * direction).sum()
        assert abs(difference - along) <= 1e-5 * derivative.norm() * direction.norm()
    assert all(parameter.grad is None for parameter in objective.model.parameters())


def forced_case(name):
    """A network in float64, its client's batch, what that sent, and other images."""
    torch.manual_seed(5)
    model = network(name) if name == "residual" else build_model(name, 8, (3, 16, 16)).double()
    for module in batchnorm_layers(model):
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
    x, y = photos(5, 16, target_idx=11)
    target = target_of(model, x.double(), y)
    return model, target, x.double(), y, torch.randn(x.shape, dtype=torch.float64)


def relative_error(found, true):
    found, true = (torch.cat([g.flatten() for g in gradient]) for gradient in (found, true))
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize("name", ["residual", "convnet"])
def test_the_forced_gradient_at_the_truth_is_the_clients(name):
    model, target, x_true, y, x = forced_case(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exactly, forced = (
        Objective(model, target, y, Weights(), bn_coupling=kind) for kind in settings.BN_COUPLINGS
    )
    assert relative_error(forced.gradient(x_true), target.gradient) < 1e-10
    assert relative_error(forced.gradient(x), exactly.gradient(x)) > 1e-2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(layer) for layer in batchnorm_layers(model))


@pytest.mark.parametrize("name", ["residual", "convnet"])
def test_forced_images_do_not_interact(name):
    model, target, _, y, x = forced_case(name)
    objective = Objective(model, target, y, Weights(), bn_coupling="forced")
    assert not objective.couples_images
    assert Objective(model, target, y, Weights()).couples_images
    whole = objective.gradient(x)
    images = [objective.image_gradient(x[i : i + 1], i) for i in range(5)]
    assert relative_error([sum(parts) / 5 for parts in zip(*images, strict=True)], whole) < 1e-10
    with forced_normalisation(model, forced_statistics(model, target), 5) as added:
        parts = [
            batch_gradient(model, x[part], y[part], ClientLoss(True), total=5, added=added)
            for part in (slice(0, 3), slice(3, 3), slice(3, 5))
        ]
    assert relative_error([sum(part) for part in zip(*parts, strict=True)], whole) < 1e-10


@pytest.mark.parametrize("name", ["residual", "convnet"])
def test_the_forced_gradient_is_that_of_the_loss_that_it_is_said_to_have(name):
    """CE + R, written out with hooks, of the eval-mode network with the client's statistics."""
    model, target, _, y, x = forced_case(name)
    forced = Objective(model, target, y, Weights(), bn_coupling="forced").gradient(x)
    terms, layers = [], batchnorm_layers(model)
    for layer, of in zip(layers, forced_statistics(model, target), strict=True):
        layer.running_mean.copy_(of.mean)
        layer.running_var.copy_(of.var)

        def hook(layer, args, of=of):
            for channel in range(layer.num_features):
                z = args[0][:, channel]
                normed = (z - of.mean[channel]) / (of.var[channel] + layer.eps).sqrt()
                first = of.d_bias[channel] / z.numel() * normed
                second = of.d_weight[channel] / z.numel() * normed.square() / 2
                terms.append(-layer.weight[channel].item() * (first + second).sum())

        layer.register_forward_pre_hook(hook)
    with gradient_mode(model, False):
        loss = torch.nn.functional.cross_entropy(model(x), y) + sum(terms)
        true = torch.autograd.grad(loss, list(model.parameters()))
    assert relative_error(forced, true) < 1e-10


def test_forced_moments_are_those_of_the_batch_at_hand():
    model, target, x_true, y, x = forced_case("residual")
    weights = Weights(priors={"bn": 1.0})
    exactly, forced = (
        Objective(model, target, y, weights, bn_source="batch", bn_coupling=kind)
        for kind in settings.BN_COUPLINGS
    )
    assert forced.value(x_true).terms["bn"] < 1e-12
    assert forced.value(x).terms["bn"] > 1e-2
    alone, _ = PIXEL_GRADIENTS[settings.PRIOR_ONLY](forced, x, 0.0)
    torch.testing.assert_close(alone.terms["bn"], forced.value(x).terms["bn"])
    (_, theirs), (_, ours) = (
        each._local_gradient(x, create_graph=False, with_moments=True) for each in (exactly, forced)
    )
    torch.testing.assert_close(ours[0], theirs[0])  # in front of the first layer all is alike
    torch.testing.assert_close(ours[0][0], model[0](x).mean((0, 2, 3)))
    assert not torch.allclose(ours[1][0], theirs[1][0], rtol=1e-3)


def test_statistics_that_were_not_sent_cannot_be_forced():
    model, target, x, y, _ = forced_case("residual")
    sent = whole_batch_gradient(model, x, y, ClientLoss(True))
    assert sent.bn_mean is None
    for refused, says in (
        (replace(target, bn_mean=None, bn_var=None), "sent no statistics of its batch"),
        (replace(target, train_mode=False), "in eval mode"),
    ):
        with pytest.raises(InputError, match=says):
            forced_statistics(model, refused)
    for place in ("weight", "bias"):
        getattr(model[4].bn2, place).requires_grad_(False)
        with pytest.raises(InputError, match=r"scale and shift of BatchNorm layer 4\.bn2"):
            forced_statistics(model, target_of(model, x, y))
        getattr(model[4].bn2, place).requires_grad_(True)
    model[4].bn1 = torch.nn.BatchNorm2d(8, affine=False).double()
    with pytest.raises(InputError, match=r"BatchNorm layer 4\.bn1"):
        forced_statistics(model, target_of(model, x, y))
    replace_batchnorm(model, "groupnorm")
    with pytest.raises(InputError, match="has no BatchNorm layer"):
        forced_statistics(model, target_of(model, x, y))
    for options in ({"bn_coupling": "none"}, {"bn_coupling": "forced", "bn_grad": "detached"}):
        with pytest.raises(ValueError, match="bn_"):
            Objective(*forced_case("convnet")[:2], y, Weights(), **options)


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
        native = batch_gradient(model, x, y, ClientLoss(train_mode))
        with truncated_derivative(model):
            truncated = batch_gradient(model, x, y, ClientLoss(train_mode))
        for a, b in zip(native, truncated, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert "forward" not in vars(batchnorm_layers(model)[0])


@pytest.mark.parametrize("tracked", [True, False])
def test_statistics_that_are_set_are_what_a_layer_normalises_by(tracked):
    layer = torch.nn.BatchNorm2d(2, affine=False, track_running_stats=tracked).double().eval()
    mean, var = torch.tensor([1.0, -2.0]).double(), torch.tensor([4.0, 0.25]).double()
    set_statistics(layer, mean, var)
    mean.zero_()  # the layer has copies
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    by_hand = [(x[:, 0] - 1) / (4 + layer.eps) ** 0.5, (x[:, 1] + 2) / (0.25 + layer.eps) ** 0.5]
    torch.testing.assert_close(layer(x), torch.stack(by_hand, 1))


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
                batch_gradient(with_shift, x, y, ClientLoss(True)),
                strict=True,
            )
        )
        ours = batch_gradient(without, x, y, ClientLoss(True))
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
