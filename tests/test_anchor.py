"""Convolutions attacked directly: labels, features and signals, even where labels repeat."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.anchor import anchored, candidates
from inversion.layerwise.certify import in_order
from inversion.layerwise.forward_head import head_part
from inversion.layerwise.kinds import StoppedError
from inversion.layerwise.layer import Layer
from inversion.layerwise.least_squares import disturbed
from inversion.layerwise.peel import peel, withdraw_unsupported
from inversion.layerwise.peeled import Peeled
from inversion.layerwise.shift.factors import shift_factors
from inversion.layerwise.shift.nonnegative import fitted_to_zeros, gauge_by_nonnegativity
from inversion.layerwise.trace import network_of
from inversion.layerwise.way_out import way_out
from models.batchnorm import BATCHNORM_TYPES
from tests.test_layerwise_network import true_tensors

CLASSES = 3


def stem(width):
    return [
        nn.Conv2d(3, width, 7, 4, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    ]  # fmt: skip


def head(width):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


def down(channels, wide, stride=2):
    return nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))


def basic(width=24):
    blocks = [BasicBlock(width, 2 * width, 2, down(width, 2 * width)),
              BasicBlock(2 * width, 2 * width)]  # fmt: skip
    return nn.Sequential(*stem(width), *blocks, *head(2 * width))


def bottleneck(width=48):
    wide = 4 * width
    blocks = [Bottleneck(width, width, 2, down(width, wide)), Bottleneck(wide, width)]
    return nn.Sequential(*stem(width), *blocks, *head(wide))


def plain(width=48):
    return nn.Sequential(
        *stem(24), nn.Conv2d(24, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width), nn.ReLU(), *head(width),
    )  # fmt: skip


NETWORKS = {"basic": basic, "bottleneck": bottleneck, "plain": plain}


def case(name, labels, *, train_mode=False, homogeneous=False, sure=False, seed=0):
    """A network to attack, and what is true of it: values, signals, labels.

    sure: the network is sure of the first image's label, and not wholly of the others'.
    """
    torch.manual_seed(seed)
    model = NETWORKS[name]().double()
    for layer in model.modules():
        if isinstance(layer, BATCHNORM_TYPES) and not homogeneous:
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.2)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    y = torch.tensor(labels)
    coarse = torch.randn(len(y), 3, 4, 4, dtype=torch.float64)  # images that differ as photos do
    x = nn.functional.interpolate(coarse, size=16, mode="bilinear")
    if sure:
        found = true_tensors(model, x, y, train_mode=train_mode)[0]["_6"]
        apart = found[0] - found[1:].mean(0)
        model[-1].weight.data[y[0]] += 40 * apart / (apart @ apart)
        model[-1].bias.data[y[0]] -= 40 * apart @ found[1:].mean(0) / (apart @ apart)
    values, signals, gradient, measured = true_tensors(model, x, y, train_mode=train_mode)
    network = network_of(
        model, len(y), (3, 16, 16), gradient, train_mode=train_mode, statistics=measured,
        accuracy=dict.fromkeys(gradient, Accuracy(1e-10)),
    )  # fmt: skip
    return SimpleNamespace(network=network, values=values, signals=signals, y=y)


def node_of(network, target):
    return next(node for node in network.nodes if str(node.target) == target)


def paired(found, true):
    """Which true row each found row is, with an assertion that every one is another."""
    order = torch.cdist(found.flatten(1), true.flatten(1)).argmin(1)
    assert len(order.unique()) == len(order)
    return order


LAST = {"basic": "3.conv2", "bottleneck": "4.conv2", "plain": "5"}
CASES = [
    (name, mode) for name in NETWORKS for mode in ("eval", "homogeneous", "train")
    if (name, mode) != ("plain", "homogeneous")
]  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_convolutions_gradient_gives_labels_features_and_signals(name, mode):
    """Five images of three classes: the head's gradient alone has a rank of two.

    The convolutions of `plain` have biases.
    """
    of = case(name, [2, 0, 1, 2, 2], train_mode=mode == "train", homogeneous=mode == "homogeneous")
    anchor = anchored(of.network, node_of(of.network, LAST[name]))
    output = of.network.nodes[-1]
    (features,) = of.network.inputs(output)
    order = paired(anchor.features, of.values[features.name])
    torch.testing.assert_close(anchor.labels, of.y[order])
    for found, true in (
        (anchor.features, of.values[features.name]),
        (anchor.head_signal, of.signals[output.name]),
        (anchor.signal, of.signals[anchor.joint.name]),
    ):
        assert (found - true[order]).norm() < 1e-6 * true.norm()
    assert anchor.joint is way_out(of.network, anchor.convolution)[-1]
    assert anchor.mismatch < 1e-6
    assert anchor.head_residual < 1e-6
    assert 0 < anchor.signal_error < 1e-6


def test_every_3x3_convolution_of_stride_1_behind_a_relu_is_a_candidate():
    for name, expected in (
        ("basic", ["4.conv2", "4.conv1", "3.conv2"]), ("bottleneck", ["4.conv2"]), ("plain", ["5"]),
    ):  # fmt: skip
        network = case(name, [2, 0, 1]).network
        found = list(candidates(network, len(network.nodes)))
        assert [str(node.target) for node in found] == expected
        before = network.nodes.index(way_out(network, found[0])[-1])
        assert all(
            network.nodes.index(way_out(network, node)[-1]) < before
            for node in candidates(network, before)
        )
    many = case("basic", 13 * [0]).network  # 52 numbers per channel, 48 channels
    assert list(candidates(many, len(many.nodes))) == []


def test_what_the_head_does_not_bear_out_is_refused():
    of = case("basic", [2, 0, 1, 2, 2])
    node = node_of(of.network, "3.conv2")
    name = next(name for name in of.network.gradient if name.endswith("7.weight"))
    other = of.network.gradient[name].flip(1)
    wrong = replace(of.network, gradient={**of.network.gradient, name: other})
    with pytest.raises(StoppedError, match="does not bear the features out|do not settle"):
        anchored(wrong, node)
    noise = torch.randn_like(of.network.gradient["3.conv2.weight"])
    nothing = replace(of.network, gradient={**of.network.gradient, "3.conv2.weight": noise})
    with pytest.raises(StoppedError, match=r"3\.conv2: "):
        anchored(nothing, node)


def test_smoothed_labels_that_the_network_is_sure_of_are_read():
    """The derivative by the label's logit is positive then."""
    of = case("basic", [2, 0, 1, 2, 2])
    output = of.network.nodes[-1]
    features, weight = of.values["_6"], of.network.module(output).weight
    of.network.module(output).weight.data *= 40
    probabilities = torch.softmax(features @ weight.mT + of.network.module(output).bias, 1)
    labels = probabilities.argmax(1)
    signal = probabilities - 0.7 * nn.functional.one_hot(labels, CLASSES) - 0.3 / CLASSES
    assert (signal.argmin(1) != labels).any()
    gradient = signal.mT @ features / len(labels)
    name = f"{output.target}.weight"
    known = {of.network.inputs(output)[0]: features}
    network = replace(of.network, gradient={**of.network.gradient, name: gradient})
    found = head_part(network, known, 0.3, free=False)[0]
    assert torch.equal(found[0], labels)
    assert found[-1] < 1e-6


def test_features_that_leave_much_of_the_heads_gradient_are_refused():
    """Though the signal that solves it best is the one that they give."""
    of = case("basic", [2, 0, 1])
    name = next(name for name in of.network.gradient if name.endswith("7.weight"))
    gradient = of.network.gradient[name]
    beside = torch.linalg.svd(of.values["_6"], full_matrices=True)[2][-1]  # no features lie there
    other = gradient + 0.3 * gradient.norm() * torch.outer(torch.eye(CLASSES)[0].double(), beside)
    wrong = replace(of.network, gradient={**of.network.gradient, name: other})
    with pytest.raises(StoppedError, match="does not bear the features out"):
        anchored(wrong, node_of(of.network, "3.conv2"))


class Activated(nn.Module):
    """A residual block whose ReLU stands before the sum."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(width, width, 3, padding=1), nn.ReLU()

    def forward(self, x):
        return x + self.relu(self.conv(x))


def test_a_relu_before_the_sum_loses_the_signal_there(monkeypatch):
    monkeypatch.setitem(
        NETWORKS, "activated",
        lambda: nn.Sequential(nn.Conv2d(3, 48, 7, 8, 3), nn.ReLU(), Activated(48), *head(48)),
    )  # fmt: skip
    network = case("activated", [2, 0, 1]).network
    with pytest.raises(StoppedError, match="the way past it is not known"):
        way_out(network, node_of(network, "2.conv"))
    assert list(candidates(network, len(network.nodes))) == []


@pytest.mark.parametrize(
    ("name", "mode"),
    [("basic", "eval"), ("basic", "train"), ("bottleneck", "eval"), ("bottleneck", "train")],
)
def test_the_walk_goes_on_where_labels_repeat(name, mode):
    of = case(name, [2, 0, 1, 2, 2], train_mode=mode == "train", seed=2)
    solved = []

    def enough(layer):
        solved.append(layer.kind == "convolution")
        return sum(solved) == 3

    peeled = peel(of.network, of.y, on_layer=enough)
    assert [layer.kind for layer in peeled.layers][:2] == ["forward", "shifts"]
    assert peeled.detours[0].endswith(".conv2 was then attacked directly")
    assert torch.equal(peeled.labels, of.y)
    tensors = peeled.tensors()
    certified = [layer.name for layer in peeled.layers if layer.certified]
    assert len(set(certified) & set(tensors)) >= 3
    order = paired(next(iter(tensors.values())), of.values[next(iter(tensors))])
    for found in set(certified) & set(tensors):
        true = of.values[found][order]
        assert (tensors[found] - true).norm() < 1e-5 * true.norm()


def test_a_wrong_label_does_not_stop_the_walk():
    of = case("basic", [2, 0, 1, 2, 2])
    wrong = torch.tensor([1, 1, 1, 0, 0])
    peeled = peel(of.network, wrong, on_layer=lambda layer: layer.kind == "convolution")
    assert peeled.labels.tolist() == [0, 1, 2, 2, 2]
    assert peeled.layers[0].certified


def test_images_go_by_their_features_or_by_the_labels_given():
    of = case("basic", [2, 0, 1, 2, 2])
    anchor = anchored(of.network, node_of(of.network, "3.conv2"))
    given = torch.tensor([2, 2, 1, 2, 0])
    assert in_order(anchor, given, None).labels.tolist() == given.tolist()
    assert in_order(anchor, torch.tensor([1, 1, 1, 0, 0]), None).labels.tolist() == [0, 1, 2, 2, 2]
    turned = anchor.features[[3, 1, 4, 2, 0]]
    torch.testing.assert_close(in_order(anchor, given, turned).features, turned)


def test_images_keep_their_order_where_a_second_layer_is_attacked_directly():
    """By the features: four of the five labels are the same."""
    of = case("basic", [2, 2, 0, 2, 2], train_mode=True)
    gradient, accuracy, name = (
        dict(of.network.gradient),
        dict(of.network.accuracy),
        "4.conv1.weight",
    )
    gradient[name] = disturbed(gradient[name], 1e-8, torch.Generator().manual_seed(0))
    accuracy[name] = Accuracy(0.0)
    peeled = peel(
        replace(of.network, gradient=gradient, accuracy=accuracy), of.y,
        on_layer=lambda layer: layer.name == "_3_relu",
    )  # fmt: skip
    assert len(peeled.detours) == 2
    tensors = peeled.tensors()
    certified = {layer.name for layer in peeled.layers if layer.certified} & set(tensors)
    assert {"_4_relu", "_3_relu"} <= certified
    order = paired(tensors["_4_relu"], of.values["_4_relu"])
    for name in certified:
        assert torch.equal(paired(tensors[name], of.values[name]), order)


def test_no_layer_is_attacked_directly_twice(monkeypatch):
    """Whatever its certificate says: else the walk would never end."""
    of, tried = case("basic", [2, 0, 1, 2, 2]), []

    def uncertain(network, node, label_smoothing):
        assert node not in tried
        tried.append(node)
        return replace(anchored(network, node, label_smoothing), signal_error=0.5)

    monkeypatch.setattr("inversion.layerwise.peel.anchored", uncertain)
    peeled = peel(of.network, of.y)
    assert len(tried) == 3
    assert peeled.stopped == "add: an error of 50% is to be expected"


def test_a_layer_attacked_directly_bears_no_zeros_out():
    """Its equations do not contain the mask of the tensor that was certified before."""
    rests = Layer(
        name="u", place="u", used_by=("w",), kind="convolution", unknowns=1, equations=1, rank=1,
        condition=1.0, residual=0.0, expected_error=0.0, flips=0, certified=True, seconds=0.0,
        rests_on_zeros=True,
    )  # fmt: skip
    before = replace(rests, name="v", rests_on_zeros=False)
    for kind, borne_out in (("convolution", True), ("forward", False), ("shifts", False)):
        peeled = Peeled(None, [rests, replace(before, kind=kind)])
        withdraw_unsupported(peeled)
        assert peeled.layers[0].certified == borne_out
        spoilt = "that spoils u, whose zeros nothing bears out"
        assert peeled.stopped == ("" if borne_out else spoilt)


def test_numbers_that_are_not_finite_end_the_walk():
    of = case("basic", [2, 0], train_mode=True)
    for name in ("4.conv2.weight", "7.weight"):
        gradient = of.network.gradient[name].clone()
        gradient.view(-1)[0] = torch.nan
        network = replace(of.network, gradient={**of.network.gradient, name: gradient}, values={})
        peeled = peel(network, of.y, on_layer=lambda layer: layer.kind == "shifts")
        assert [layer.name for layer in peeled.layers if layer.name == "add"] == (
            ["add"] if name == "4.conv2.weight" else []  # the next layer does without it
        )


def test_nothing_is_attacked_directly_for_a_client_that_clips():
    of = case("basic", [2, 0, 1, 2, 2])
    peeled = peel(of.network, of.y, clipped=True)
    assert peeled.detours == []
    assert peeled.stopped


def test_an_image_that_the_network_is_sure_of_does_not_hide_the_others():
    """Its signal is zero but for rounding, and says nothing about its label; the features do."""
    of = case("basic", [2, 0, 1, 2, 2], train_mode=True, sure=True)
    anchor = anchored(of.network, node_of(of.network, "3.conv2"))
    (features,) = of.network.inputs(of.network.nodes[-1])
    order = paired(anchor.features, of.values[features.name])
    assert anchor.head_signal.norm(dim=1).min() < 1e-9 * anchor.head_signal.norm()
    torch.testing.assert_close(anchor.labels, of.y[order])


# The factors of a gradient ------------------------------------------------------------------------


def test_centred_signals_have_one_direction_fewer():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(3, 16, 2, 2, generator=generator, dtype=torch.float64)
    d = torch.randn(3, 16, 2, 2, generator=generator, dtype=torch.float64)
    d = d - d.mean((0, 2, 3), keepdim=True)
    gradient = torch.nn.grad.conv2d_weight(u, (16, 16, 3, 3), d, padding=1)
    factors = shift_factors(gradient, 2, 2, 3, centred=True)
    assert factors.residual < 1e-10
    assert factors.gap[1] < 1e-7 < factors.gap[0]
    rows = u.permute(2, 3, 0, 1).reshape(4, 3, 16)
    mixing = torch.linalg.lstsq(factors.inputs.mT.flatten(0, 1), rows.mT.flatten(0, 1)).solution
    assert (factors.inputs.mT @ mixing - rows.mT).norm() < 1e-8 * rows.norm()


def test_an_edge_is_fitted_to_its_zeros():
    """Rows with an error of 1e-7: the images' zeros then scatter by that, not by the start's."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4, 5, 200, generator=generator, dtype=torch.float64).clamp_min(0)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    mixed = mixing @ u + 1e-7 * torch.randn(u.shape, generator=generator, dtype=torch.float64)
    exact = gauge_by_nonnegativity(mixed)
    start = exact @ (torch.eye(5) + 1e-4 * torch.randn(5, 5, generator=generator).double())
    for gauge in (exact, fitted_to_zeros(mixed, start)):
        found = torch.linalg.solve(gauge, mixed)
        found = found / found.flatten(0, 0).norm(dim=(0, 2), keepdim=True)
        true = u / u.norm(dim=(0, 2), keepdim=True)
        order = paired(found.transpose(0, 1), true.transpose(0, 1))
        assert (found - true[:, order]).norm() < 1e-6


def test_small_numbers_that_are_no_zeros_do_not_move_an_edge():
    """Two such numbers beside the twenty zeros of every image."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        u = (torch.randn(4, 5, 24, **options) + 0.8).clamp_min(0)
        for image in range(5):
            u[image % 4, image, :2] = torch.tensor([1e-4, 4e-4])
        mixed = torch.randn(5, 5, **options) @ u
        found = torch.linalg.solve(gauge_by_nonnegativity(mixed), mixed).transpose(0, 1).flatten(1)
        found, true = (nn.functional.normalize(t) for t in (found, u.transpose(0, 1).flatten(1)))
        assert (found - true[paired(found, true)]).norm() < 1e-10
