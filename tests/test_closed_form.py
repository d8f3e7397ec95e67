"""The closed forms of layers against torch's own derivatives, in float64."""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from inversion.closed_form.layers import ClosedForm
from inversion.closed_form.products import product_of
from inversion.distances import GRADIENT_DISTANCES, Aim
from inversion.objective import Objective
from inversion.pixel_gradient import exact, plain
from inversion.settings import Weights
from inversion.visible import View
from models.gradient import ClientLoss
from tests.support import target_of


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Shared(nn.Module):
    """Uses a convolution at two sizes, a linear layer twice, and a weight outside its layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)

    def forward(self, x):
        z = F.relu(self.first(x), inplace=True)
        z = self.frozen(torch.sigmoid(self.again(z)))
        for _ in range(3):
            z = torch.tanh(self.again(z))
        z = self.mix(torch.sigmoid(self.mix(z.mean((2, 3)))))
        return self.head(z) + F.linear(z, self.head.weight.square())


class Constant(nn.Module):
    """Has layers whose input does not depend on the images, and one without derivatives."""

    def __init__(self):
        super().__init__()
        self.place, self.image = nn.Linear(2, 4), nn.Conv2d(3, 4, 3)
        self.blind, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        z = torch.tanh(self.image(x)) * self.place(x.new_ones(2))[:, None, None]
        z = z + torch.tanh(self.blind(x.detach()))
        with torch.no_grad():
            scale = self.image(x).mean()
        return self.head(z.mean((2, 3)) * scale)


class Cut(nn.Module):
    """Has an operation without a derivative before a layer whose images come by another way too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x):
        z = self.first(x)
        z = torch.tanh(self.second(torch.sign(z)) + self.norm(z))
        return self.head(z.mean((2, 3)))


class Recomputed(nn.Module):
    """Computes a part anew in its backward pass, which closed forms do not know of."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Tanh())

    def forward(self, x):
        z = checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=False)
        return self.head(z.mean((2, 3)))


def pruned():
    model = convolutions(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1))
    prune.random_unstructured(model[2], "bias", 0.5)
    return model


def convolutions(*layers):
    """Return a network of these layers, with activations in place and a classifier behind."""
    return nn.Sequential(
        *(part for layer in layers for part in (layer, nn.SiLU(inplace=True))),
        nn.Flatten(), nn.LazyLinear(6), nn.ReLU(inplace=True), nn.Linear(6, 5),
    )  # fmt: skip


NETWORKS = {
    "strides": lambda: convolutions(nn.Conv2d(3, 4, 5, 2, 2), nn.Conv2d(4, 6, 3, 3, 1, bias=False)),
    "groups and dilation": lambda: convolutions(
        nn.Conv2d(3, 6, 3, 1, 2, dilation=2, groups=3), nn.Conv2d(6, 4, (1, 3), (2, 1), (0, 1))
    ),
    "kernel wider than its input": lambda: convolutions(
        nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 5, 5, 1, 2)
    ),
    "other padding": lambda: convolutions(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding="same")
    ),
    "shared": Shared,
    "constant": Constant,
    "cut": Cut,
    "recomputed": Recomputed,
    "pruned": pruned,
    "one image per position": lambda: convolutions(nn.Conv2d(3, 4, 8), nn.Conv2d(4, 4, 1)),
}


def network(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    model(double(2, 3, 8, 8))
    return model


def objective_of(model, distance="sim", *, train_mode=False, noise=0.01, **options):
    """The objective of three images, whose gradient was sent with noise in every entry."""
    x, y = double(3, 3, 8, 8, seed=1), torch.arange(3)
    target = target_of(model, x, y, train_mode=train_mode, num_classes=5)
    noisy = tuple(g + noise * torch.randn_like(g) for g in target.gradient)
    target = dataclasses.replace(target, gradient=noisy)
    priors = {"tv": 0.1, "bn": 0.1} if target.bn_mean else {"tv": 0.1}
    weights = Weights(gradient=2.0, priors=priors)
    return Objective(
        model, target, y, weights, distance_name=distance, bn_source="batch", **options
    )


def compare(objective):
    x = double(3, 3, 8, 8, seed=2)
    (ours, d_ours), (theirs, d_theirs) = (f(objective, x, 0.0) for f in (exact, plain))
    assert ours.floats().total == pytest.approx(theirs.floats().total, rel=1e-12)
    torch.testing.assert_close(d_ours, d_theirs, rtol=1e-9, atol=1e-14)
    assert d_theirs.norm() > 1e-6


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("distance", GRADIENT_DISTANCES)
def test_layers_of_any_shape_equal_torch(name, distance):
    """The noise is also where no candidate's gradient can be other than 0."""
    compare(objective_of(network(name), distance))


def normalised(layer):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), layer, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, 2, 1),
        nn.Tanh(), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 5),
    ).double()  # fmt: skip
    for part in model:
        if getattr(part, "running_var", None) is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
        if getattr(part, "affine", False):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return model


LAYERS = {
    "usual": lambda: nn.BatchNorm2d(4),
    "neither scale nor shift": lambda: nn.BatchNorm2d(4, affine=False),
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["train", "eval", "forced"])
def test_batch_normalisation_equals_torch(layer, mode):
    if mode == "forced" and layer == "neither scale nor shift":
        mode = "train"  # such statistics cannot be forced: the client sends too little
    coupling = "forced" if mode == "forced" else "exact"
    model = normalised(LAYERS[layer]())
    objective = objective_of(model, train_mode=mode != "eval", bn_coupling=coupling)
    assert objective._closed.batchnorm
    compare(objective)


@pytest.mark.parametrize("trained", [{0}, {1}, {2}, {0, 2}, {4}])
def test_some_layers_alone_are_trainable(trained):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1), nn.Softplus(),
        nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 5),
    ).double()  # fmt: skip
    for place, layer in enumerate(model):
        layer.requires_grad_(place in trained)
    compare(objective_of(model, train_mode=True))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_one_value_per_channel_has_no_variance(chunk_size):
    model = normalised(nn.BatchNorm2d(4))
    objective = objective_of(model)
    x = double(3, 3, 8, 8, seed=2)
    with torch.no_grad():
        model[0].padding, model[0].stride = (0, 0), (8, 8)  # maps of one pixel
        model[3].padding, model[3].kernel_size = (1, 1), (3, 3)
        model[6] = nn.BatchNorm1d(4).double()
        model[7] = nn.Linear(4, 5).double()
    objective = objective_of(model)
    found, derivative = exact(objective.in_chunks(chunk_size), x, 0.0)
    true, slow = plain(objective, x, 0.0)
    assert found.floats().total == pytest.approx(true.floats().total, rel=1e-12)
    torch.testing.assert_close(derivative, slow, rtol=1e-9, atol=1e-14)


def test_no_images_are_no_obstacle():
    model = normalised(nn.BatchNorm2d(4))
    closed = ClosedForm(model, ClientLoss(False), batchnorm=True)
    x = double(0, 3, 8, 8).requires_grad_()
    gradient, _ = closed.gradient(x, torch.arange(0), images=3, total=3)
    assert all(not value.any() for value in gradient.values)


def test_a_view_of_the_gradient_is_cut_like_the_gradient():
    """Only some entries were sent, and those were cut, of weights that take part only in part."""
    objective = objective_of(network("kernel wider than its input"))
    masks = tuple(torch.rand_like(g) < 0.5 for g in objective.target_gradient)
    objective._view = View(masks, 1e-3)
    compare(objective)


def test_parts_of_a_gradient_have_the_distance_of_the_whole():
    target, gradient = [double(4, 3, 3, 3), double(5)], [double(4, 3, 3, 3, seed=1), double(5)]
    part = (slice(None), slice(None), slice(1, 3), slice(0, 2))
    inside = torch.zeros_like(gradient[0])
    inside[part] = gradient[0][part]
    for distance in GRADIENT_DISTANCES.values():
        whole, cotangents = distance.with_cotangent([inside, gradient[1]], Aim.at(target))
        aim = Aim.at(target).within([part, None])
        of_part, of_parts = distance.with_cotangent([gradient[0][part], gradient[1]], aim)
        assert of_part.item() == pytest.approx(whole.item(), rel=1e-13)
        torch.testing.assert_close(of_parts[0], cotangents[0][part])
        torch.testing.assert_close(of_parts[1], cotangents[1])


def test_taps_that_meet_padding_alone_are_left_out():
    layer = nn.Conv2d(2, 3, 3, padding=1)
    product, part = product_of(layer, torch.zeros(5, 2, 1, 1))
    assert (product.kernel, product.padding) == ((1, 1), (0, 0))
    assert part[2:] == (slice(1, 2), slice(1, 2))
    product, part = product_of(layer, torch.zeros(5, 2, 2, 1))
    assert (product.kernel, product.padding) == ((3, 1), (1, 0))


def test_weights_that_changed_are_read_anew():
    model = network("strides")
    objective = objective_of(model)
    compare(objective)
    with torch.no_grad():
        model[0].weight.mul_(2)
    compare(objective)


class Overwriting(nn.Module):
    """Changes in place what a convolution took in, as torch would not let its own gradient do."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

    def forward(self, x):
        z = x * 1
        y = self.conv(z)
        z.mul_(2)
        return self.head(torch.tanh(y + z).mean((2, 3)))


def test_a_changed_input_is_refused():
    torch.manual_seed(0)
    model = Overwriting().double()
    closed = ClosedForm(model, ClientLoss(False), batchnorm=True)
    x = double(3, 3, 8, 8).requires_grad_()
    gradient, _ = closed.gradient(x, torch.arange(3), images=3)
    with pytest.raises(RuntimeError, match="input of a Conv2d was changed in place"):
        gradient.pairs(gradient.values)


def test_an_evaluation_frees_its_memory_at_once():
    """The graph holds the layers' inputs; these must not hold the graph, or it stays for long."""
    model = normalised(nn.BatchNorm2d(4))
    closed = ClosedForm(model, ClientLoss(True), batchnorm=True)
    x = double(3, 3, 8, 8).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        gradient, _ = closed.gradient(x, torch.arange(3), images=3)
        inner = [t for t, _ in gradient.pairs(gradient.values) if not t.is_leaf]
        held = [weakref.ref(t) for t in inner]
        del inner
        assert held
        assert all(each() is not None for each in held)
        del gradient
        assert all(each() is None for each in held)
    finally:
        gc.enable()


def test_layers_are_left_as_they_were():
    model = normalised(nn.BatchNorm2d(4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    objective = objective_of(model, train_mode=True)
    with pytest.raises(RuntimeError):
        exact(objective, double(3, 4, 8, 8), 0.0)
    exact(objective, double(3, 3, 8, 8), 0.0)
    assert not any("forward" in vars(module) for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ClosedForm(model, ClientLoss(True), batchnorm=True).gradient(
            double(1, 3, 8, 8).requires_grad_(), torch.arange(1), images=1
        )
