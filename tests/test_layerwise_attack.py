"""The walk from the head to the image, the images that it makes, and the audit of both."""

import functools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inversion.layerwise.accuracy import LARGEST, Accuracy
from inversion.layerwise.attack import NEAR, accuracies, layerwise_attack, target_network
from inversion.layerwise.images import WORTH_MATCHING, make_images
from inversion.layerwise.layer import Layer
from inversion.layerwise.matching import Matching
from inversion.layerwise.peel import peel
from inversion.layerwise.peeled import Peeled
from inversion.layerwise.smooth_matching import SmoothMatching
from inversion.layerwise.trace import network_of
from models.build import build_model
from models.gradient import ClientLoss
from models.target import Protection
from tests.support import MEAN, STD, photos, target_of
from tests.test_layerwise_network import (
    CLASSES,
    NETWORKS,
    Branching,
    Function,
    behind,
    deep,
    smooth,
    true_tensors,
    vgg,
)
from train.privacy import Mechanism, protect_per_sample
from utils.image_files import public_photographs
from utils.images import normalise

# The walk ----------------------------------------------------------------------------------------


@functools.cache
def public(size, shape=None):
    """Photographs that no batch here has."""
    shape = shape or (3, size, size)
    mean, std = (torch.tensor(values[: shape[0]]).view(-1, 1, 1) for values in (MEAN, STD))
    return normalise(public_photographs(60, shape), mean, std)


def private(count, shape):
    """Photographs (count, C, H, W) of this shape, cut out of square ones."""
    return photos(count, max(shape[1:]), target_idx=10)[0][:, : shape[0], : shape[1], : shape[2]]


def attacked(
    model, labels, size, *, shape=None, train_mode=False, change=lambda target: target, **options
):
    """An attack on photographs with these labels: what it recovered, images, true tensors."""
    x, y = private(len(labels), shape or (3, size, size)), torch.tensor(labels)
    target = target_of(model, x, y, train_mode=train_mode)
    recovered = layerwise_attack(model, change(target), y, public(size, shape), **options)
    values, *_ = true_tensors(model.double(), x.double(), y, train_mode=train_mode)
    model.float()
    return recovered, x, values


@pytest.fixture
def brief(monkeypatch):
    """Activations are matched for a few steps: the images are not judged."""
    monkeypatch.setattr("inversion.layerwise.images.WHOLE", Matching(10, 0.05, 10))
    monkeypatch.setattr("inversion.layerwise.images.SMOOTH", SmoothMatching(10, 0.05, 1.0))


def network(name, seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name]()


def worst(recovered, values):
    """The largest relative error of a certified tensor."""
    names = [layer.name for layer in recovered.certified if layer.name in recovered.tensors]
    assert names
    errors = [recovered.tensors[name] - values[name] for name in names]
    return max(
        (e.norm() / values[name].norm()).item() for e, name in zip(errors, names, strict=True)
    )


def gap(recovered, x):
    return ((recovered.images - x).norm() / x.norm()).item()


def test_images_are_made_of_values_not_of_signals():
    """A layer that was attacked directly may have the first row, which has no tensor."""
    model, (x, y) = network("convnet"), (private(1, (3, 16, 16)), torch.tensor([5]))
    target = target_of(model, x, y)
    peeled = Peeled(target_network(model, target))
    convolution, head = peeled.network.nodes[1], peeled.network.inputs(peeled.network.nodes[-1])[0]
    shifts = Layer(
        name=convolution.name, place="0", used_by=("0",), kind="shifts", unknowns=1, equations=1,
        rank=1, condition=1.0, residual=0.0, expected_error=0.0, flips=0, certified=True,
        seconds=0.0,
    )  # fmt: skip
    peeled.layers = [shifts, replace(shifts, name=head.name, kind="forward", certified=False)]
    for known, made_by in (([], ("nothing", ())), ([head], ("decoder", (head.name,)))):
        peeled.network.values = {node: peeled.network.empty(node) for node in known}
        made = make_images(model, target, peeled, public(16), seed=0, should_stop=lambda: False)
        assert (made.method, made.sources) == made_by


@pytest.mark.parametrize("count", [1, 2])
def test_lenet_gives_its_images_away(count):
    recovered, x, values = attacked(network("lenet"), [5, 1][:count], 16)
    assert (recovered.method, recovered.sources, recovered.stopped) == ("solved", ("input_1",), "")
    assert recovered.determined
    assert [layer.kind for layer in recovered.layers] == ["head"] + 3 * ["convolution"]
    assert len(recovered.certified) == 4
    assert worst(recovered, values) < 1e-4
    assert gap(recovered, x) < 1e-4


#: Image shape → a network whose gradient gives the image itself, one that gives its first pooling.
SHAPES = {
    (1, 8, 8): (4 * 4, 2 * 2),
    (1, 8, 12): (4 * 6, 2 * 3),
    (3, 12, 8): (6 * 4, 3 * 2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["solved", "stem", "decoded"])
def test_images_of_other_shapes(shape, method):
    """One channel, sides of two lengths: solved, behind max-pooling, decoded from few numbers."""
    channels, (plain, pooled) = shape[0], SHAPES[shape]
    torch.manual_seed(0)
    if method == "solved":
        layers = [*smooth(8)]
        layers[0], layers[6] = nn.Conv2d(channels, 12, 3, 2, 1), nn.Linear(16 * plain, CLASSES)
    else:
        layers = [*vgg(32, 8)]
        layers[0], layers[7] = (
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.Linear(64 * pooled, CLASSES),
        )
    if method == "decoded":
        layers = [*layers[:5], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)]
        layers[3] = nn.Conv2d(32, 6, 5, padding=2)  # whose shifts are not told apart
    recovered, x, values = attacked(nn.Sequential(*layers), [5], 8, shape=shape)
    assert recovered.method == method
    assert recovered.images.shape == x.shape == (1, *shape)
    assert worst(recovered, values) < 1e-4
    assert recovered.determined == (method != "decoded")
    assert gap(recovered, x) < {"solved": 1e-4, "stem": 0.1, "decoded": 1.0}[method]
    if method == "decoded":
        mean = public(8, shape).mean(0)
        assert recovered.decoder_only.shape == x.shape
        assert (recovered.images - x).norm() < (mean - x).norm()


@pytest.mark.parametrize(
    ("name", "labels", "size"),
    [("residual", [5, 1], 8), ("deep", [5, 1, 3], 8), ("smooth", [5, 1], 16)],
)
def test_every_layer_is_certified_down_to_the_image(name, labels, size):
    recovered, x, values = attacked(network(name), labels, size)
    assert recovered.method == "solved"
    assert all(layer.certified for layer in recovered.layers)
    assert all(layer.rank == layer.unknowns for layer in recovered.layers)
    assert worst(recovered, values) < 1e-4
    assert gap(recovered, x) < 1e-4


def test_windows_that_do_not_overlap_are_routed():
    model = nn.Sequential(*vgg(32, 8))
    recovered, x, values = attacked(model, [5, 1], 8)
    assert [layer.kind for layer in recovered.layers] == ["head", "masks", "convolution"]
    assert [layer.used_by for layer in recovered.layers] == [("7",), ("3",), ("3",)]
    assert all(layer.certified for layer in recovered.layers)
    assert "_4" not in recovered.tensors  # where its maxima lie is known, not its values
    assert worst(recovered, values) < 1e-4
    assert (recovered.method, recovered.sources) == ("stem", ("_2",))
    assert recovered.stopped.startswith("2: its positions cannot be told apart: ")
    assert gap(recovered, x) < 0.05
    assert recovered.residual.max() < 0.05
    assert recovered.determined
    off = replace(recovered, residual=torch.tensor([0.01, 2 * NEAR]))
    assert not off.determined
    assert off.shortfall.startswith(
        "the images' own activations differ from the recovered ones by up to 5.0e-01 of these, "
        "more than 0.25; 2: its positions cannot be told apart: "
    )
    assert not replace(recovered, residual=torch.tensor([0.01, torch.nan])).determined


def narrow():
    """A network whose first pooling leaves 16 numbers of an image of 192."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(4, 32, 3, padding=1),
        nn.Tanh(), nn.Flatten(), nn.Linear(128, CLASSES),
    )  # fmt: skip


def test_a_stem_of_too_few_numbers_determines_nothing():
    recovered, _, values = attacked(narrow(), [5, 1], 8)
    assert (recovered.method, recovered.sources) == ("stem", ("_2",))
    assert worst(recovered, values) < 1e-4
    assert not replace(recovered, residual=torch.zeros(2)).determined
    assert not recovered.determined
    assert recovered.shortfall.startswith(
        "what is certified has 16 numbers per image, the images 192; 2: "
    )


def test_the_kind_of_pooling_is_said_or_refused(brief):
    """An adaptive pooling of even windows is the plain one; others end the walk with a reason."""
    pools = {"plain": nn.MaxPool2d(2), "adaptive": nn.AdaptiveMaxPool2d(2)}
    pools |= {"pairs": nn.MaxPool2d((2, 2)), "uneven": nn.AdaptiveMaxPool2d(3)}
    pools |= {"overlapping": nn.MaxPool2d(2, 1), "function": Function(lambda x: F.max_pool2d(x, 2))}
    kinds = {}
    for kind, pool in pools.items():
        layers = [*vgg(32, 8)]
        layers[5] = pool
        sides = {"uneven": 3, "overlapping": 3}.get(kind, 2)
        torch.manual_seed(0)
        layers[7] = nn.Linear(64 * sides**2, CLASSES)
        recovered, *_ = attacked(nn.Sequential(*layers), [5, 1], 8)
        kinds[kind] = [layer.kind for layer in recovered.layers], recovered.stopped
    assert kinds["adaptive"] == kinds["pairs"] == kinds["plain"]
    assert len(kinds["plain"][0]) == 3
    for kind in ("uneven", "overlapping", "function"):
        assert kinds[kind][0] == ["head"]
        assert "its windows overlap" in kinds[kind][1]


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d((2, 2)), nn.MaxPool2d((2, 1)), Function(lambda x: F.max_pool2d(x, 2))],
    ids=["pairs", "asymmetric", "function"],
)
def test_an_unusual_first_pooling_is_no_stem_but_no_fault(pool, brief):
    layers = [*vgg(32, 8)]
    layers[2] = pool
    layers[3:6] = [nn.Conv2d(32, 64, 3, 2, 1), nn.Tanh(), nn.Identity()]
    torch.manual_seed(0)
    columns = 4 if pool is not None and getattr(pool, "kernel_size", 0) == (2, 1) else 2
    layers[7] = nn.Linear(64 * 2 * columns, CLASSES)
    recovered, _, values = attacked(nn.Sequential(*layers), [5], 8)
    assert [layer.name for layer in recovered.certified][0] == "_6"
    assert worst(recovered, values) < 1e-4
    assert recovered.method == (
        "stem" if getattr(pool, "kernel_size", 0) == (2, 2) else "activations"
    )


def test_train_mode_with_exact_statistics():
    torch.manual_seed(0)
    recovered, x, values = attacked(deep(48), [5, 1, 3, 0], 8, train_mode=True)
    certified = ["_6", "_4_relu", "_3_relu_1", "_3_relu", "_2", "input_1"]
    assert [layer.name for layer in recovered.certified] == certified
    assert worst(recovered, values) < 1e-4
    assert recovered.determined
    assert gap(recovered, x) < 1e-4


def test_resnet18_is_solved_from_the_head_to_its_pooling():
    torch.manual_seed(0)
    model = build_model("resnet18", CLASSES, (3, 32, 32))
    x, y = photos(2, 32, target_idx=10)[0], torch.tensor([5, 1])
    target = target_of(model, x, y, train_mode=False)
    gradient = dict(zip(target.trainable, target.gradient, strict=True))
    walked = network_of(
        model, 2, (3, 32, 32), gradient, train_mode=False, statistics=None,
        accuracy=accuracies(model, target),
    )  # fmt: skip
    peeled = peel(walked, y)
    values, *_ = true_tensors(model.double(), x.double(), y, train_mode=False)
    assert [layer.name for layer in peeled.layers][0::8] == [
        "flatten",
        "layer2_1_relu_1",
        "maxpool",
    ]
    assert all(layer.certified for layer in peeled.layers)
    for name, found in peeled.tensors().items():
        assert ((found - values[name]).norm() / values[name].norm()).item() < 1e-4, name
    assert [node.name for node in peeled.frontier()] == ["maxpool"]
    assert peeled.stopped.startswith("maxpool: its windows overlap")


def noisy(relative):
    def change(target):
        generator = torch.Generator().manual_seed(0)
        sent = [
            g + relative * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)
            for g in target.gradient
        ]
        return replace(target, gradient=tuple(sent))

    return change


def with_zeros(target):
    """A client one of whose convolutions has a gradient of zeros."""
    names = target.trainable
    gradient = [
        0 * g if name == "4.conv1.weight" else g
        for name, g in zip(names, target.gradient, strict=True)
    ]
    return replace(target, gradient=tuple(gradient))


#: Case → labels, change of the target, how many tensors may be certified, why it ended.
PARTIAL = {
    "repeated labels": ([5, 1, 1], lambda t: t, [0], "_6: 256 equations determine 64 of its 96"),
    "noise": ([5, 1], noisy(1e-3), range(1, 6), r"_\w+: \d+ equations determine \d+ of its"),
    "other gradient": ([5, 1], lambda t: replace(t, gradient=t.gradient[:-2] + tuple(
        torch.ones_like(g) for g in t.gradient[-2:])), [0], "_6: "),
    "dead layer": ([5, 1], with_zeros, [3], "4.conv1: the gradient of its weights is zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTIAL)
def test_what_cannot_be_solved_ends_the_walk_with_a_reason(case, brief):
    labels, change, certified, says = PARTIAL[case]
    recovered, x, _ = attacked(network("residual"), labels, 8, change=change)
    count = len(recovered.certified)
    assert re.match(says, recovered.stopped)
    assert count in certified
    assert [layer.certified for layer in recovered.layers] == count * [True] + (
        [] if case == "dead layer" else [False]
    )
    numbers = sum(recovered.tensors[name][0].numel() for name in recovered.sources)
    enough = "activations" if numbers >= WORTH_MATCHING * x[0].numel() else "decoded"
    assert recovered.method == (enough if count else "decoder")
    if case != "noise":
        assert recovered.determined == (case == "dead layer")
    assert recovered.shortfall.endswith("" if recovered.determined else f"; {recovered.stopped}")
    assert torch.isfinite(recovered.images).all()
    assert recovered.images.shape == recovered.decoder_only.shape == x.shape


def test_a_gradient_in_half_precision_gives_what_it_allows():
    def half(target):
        return replace(target, gradient=tuple(g.half().float() for g in target.gradient))

    recovered, x, values = attacked(network("residual"), [5, 1], 8, change=half)
    head = recovered.layers[0]
    assert head.certified
    assert 1e-5 < head.residual < LARGEST
    assert torch.isfinite(recovered.images).all()
    error = recovered.tensors["_6"] - values["_6"]
    assert error.norm() < 1e-2 * values["_6"].norm()


def test_a_wrong_label_is_not_certified():
    """A network without ReLUs; one with them gives its labels away (test_anchor)."""
    model = network("lenet")
    x, y = photos(2, 16, target_idx=10)[0], torch.tensor([5, 1])
    target = target_of(model, x, y, train_mode=False)
    wrong = layerwise_attack(model, target, torch.tensor([5, 2]), public(16))
    assert not wrong.certified
    assert wrong.layers[0].residual > LARGEST
    assert wrong.method == "decoder"


def test_the_walk_ends_where_it_is_told_to(brief):
    seen = []
    recovered, *_ = attacked(
        network("residual"), [5, 1], 8, on_layer=lambda layer: seen.append(layer.name),
        should_stop=lambda: len(seen) == 3,
    )  # fmt: skip
    assert recovered.stopped == "interrupted"
    assert [layer.name for layer in recovered.layers] == seen == ["_6", "_4_relu_1", "_4_relu"]
    assert recovered.method == "activations"
    assert torch.isfinite(recovered.residual).all()


def test_an_image_that_was_not_matched_is_the_decoders(brief, monkeypatch):
    """Only the one whose activations are far off; the other one stays as it was matched."""

    def images(failed):
        monkeypatch.setattr("inversion.layerwise.images.FAILED", failed)
        seen = []
        return attacked(
            network("residual"), [5, 1], 8, on_layer=lambda layer: seen.append(layer.name),
            should_stop=lambda: 3 <= len(seen) < 4 and not seen.append("walk ended"),
        )[0]  # fmt: skip

    matched, decoded = images(math.inf), images(0.0)
    assert (matched.method, decoded.method) == ("activations", "decoded")
    assert (matched.residual < decoded.residual).all()
    worse = int(matched.residual.argmax())
    mixed = images(float(matched.residual.mean()))
    assert mixed.method == "activations"
    for i, of in ((worse, decoded), (1 - worse, matched)):
        assert torch.equal(mixed.images[i], of.images[i])
        assert mixed.residual[i] == of.residual[i]


@pytest.mark.parametrize(
    ("kind", "tensors", "steps"), [("stem", 3, 10), ("activations", 2, 120 + 2 * 30)]
)
def test_an_interruption_ends_the_making_of_images_with_the_best_so_far(kind, tensors, steps):
    """After that many certificates: in the rounds of the stem, in the steps of matching."""
    torch.manual_seed(0)
    model = nn.Sequential(*vgg(32, 8))
    if kind == "activations":
        model = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1, groups=3), nn.Tanh(), nn.Conv2d(24, 32, 3, 2, 1),
            nn.Tanh(), nn.Flatten(), nn.Linear(512, CLASSES),
        )  # fmt: skip
    found, asked = [], []
    for after in (tensors + 1, 10**9):
        counted = iter(range(1, 10**9))
        recovered, *_ = attacked(
            model, [5, 1], 8, should_stop=lambda c=counted, a=after: next(c) > a
        )
        found.append(recovered)
        asked.append(next(counted) - 1)
    cut, whole = found
    assert cut.method == whole.method == kind
    assert cut.stopped == whole.stopped != "interrupted"
    assert len(cut.layers) == tensors
    assert tensors + 1 < asked[0] < tensors + 8 < asked[1] < tensors + steps
    assert (whole.residual < cut.residual).all()
    assert cut.images.isfinite().all()


def test_a_head_that_is_not_linear_gives_the_mean_of_public_photographs():
    model = nn.Sequential(*smooth(8), nn.LogSoftmax(1))
    recovered, *_ = attacked(model, [5, 1], 8)
    assert (recovered.method, recovered.layers) == ("nothing", ())
    assert recovered.stopped == "7: the walk starts at a linear head"
    assert torch.equal(recovered.images[0], recovered.images[1])
    assert "has 0 numbers per image" in recovered.shortfall


def test_networks_that_the_attack_cannot_take_raise_value_error():
    with pytest.raises(ValueError, match="torch.fx cannot trace"):
        attacked(behind(Branching()).float(), [5, 1], 8)
    model = deep()
    with pytest.raises(ValueError, match="needs the batch's BatchNorm statistics"):
        attacked(
            model, [5, 1, 3, 0], 8, train_mode=True,
            change=lambda target: replace(target, bn_mean=None, bn_var=None),
        )  # fmt: skip


def test_a_recovered_tensor_may_have_too_few_numbers(brief):
    recovered, *_ = attacked(network("convnet"), [5, 1], 16)
    assert recovered.method == "decoded"
    assert not recovered.determined
    assert recovered.shortfall == (
        "what is certified has 32 numbers per image, the images 768; 11: no 3×3 convolution of "
        "stride 1 stands before it"
    )
    assert (recovered.residual < 2).all()
    more = replace(
        recovered, method="activations", sources=("_13", "big"),
        tensors=recovered.tensors | {"big": public(16)}, residual=torch.tensor([NEAR / 2, 0.0]),
    )  # fmt: skip
    assert more.determined
    assert not replace(more, residual=torch.tensor([0.0, 2 * NEAR])).determined


def test_a_client_that_clips_its_batch():
    """The same factor for every image: it follows from the head's bias."""

    def clip(target):
        protection = Protection("batch", 0.0, 1.0)
        gradient = tuple(0.3 * g for g in target.gradient)
        return replace(target, gradient=gradient, protection=protection)

    recovered, x, values = attacked(network("lenet"), [5, 1], 16, change=clip)
    assert recovered.method == "solved"
    assert gap(recovered, x) < 1e-4


@pytest.mark.parametrize(("name", "size"), [("lenet", 16), ("smooth", 16), ("residual", 8)])
def test_a_client_that_clips_every_image(name, size):
    """Each image's part has a factor of its own: all of them follow from the head's bias."""
    model, factors = network(name), []

    def clip(target):
        x, y = private(2, (3, size, size)), torch.tensor([5, 1])
        how, loss = Mechanism(0.0, 0.6, torch.Generator()), ClientLoss(train_mode=False)
        protected = protect_per_sample(target.gradient, how, model, x, y, loss)
        factors.extend((0.6 / protected.sample_norms).tolist())
        protection = Protection("per-sample", 0.0, 0.6)
        return replace(target, gradient=protected.gradient, protection=protection)

    recovered, x, values = attacked(model, [5, 1], size, change=clip)
    assert max(factors) < 0.9
    assert len(recovered.certified) == len(recovered.layers) >= 3
    assert worst(recovered, values) < 1e-3
    assert recovered.method == "solved"
    assert gap(recovered, x) < 1e-3
    blind, *_ = attacked(model, [5, 1], size, change=lambda t: replace(clip(t), protection=None))
    assert not blind.certified


def test_noise_that_the_client_recorded():
    """What it says of its noise certifies what it allows, and no more than that is wrong."""
    model, sigma = network("lenet"), 1e-6

    def add(target, recorded):
        generator = torch.Generator().manual_seed(0)
        sent = [g + sigma * torch.randn(g.shape, generator=generator) for g in target.gradient]
        protection = Protection("batch", sigma, None) if recorded else None
        return replace(target, gradient=tuple(sent), protection=protection)

    recovered, x, values = attacked(model, [5], 16, change=lambda t: add(t, True))
    plain, *_ = attacked(model, [5], 16)
    assert recovered.method == "solved"
    for layer, exact in zip(recovered.certified, plain.certified, strict=True):
        assert layer.residual > 10 * exact.residual
        if layer.expected_error is not None:
            error = recovered.tensors[layer.name] - values[layer.name]
            assert error.norm() < 5 * layer.expected_error * values[layer.name].norm()
    assert 1e-4 < gap(recovered, x) < 0.1
    silent, *_ = attacked(model, [5], 16, change=lambda t: add(t, False))
    assert len(silent.certified) < len(recovered.certified)


def test_thresholds_follow_the_recorded_noise_and_the_type():
    model = network("residual")
    target = target_of(model, photos(2, 8)[0], torch.tensor([5, 1]), train_mode=False)
    eps = torch.finfo(torch.float32).eps
    plain = accuracies(model, target)
    assert set(plain) == set(target.trainable)
    assert set(plain.values()) == {Accuracy(eps, 0.0)}
    sigma = 1e-3
    known = accuracies(model, replace(target, protection=Protection("batch", sigma, None)))
    for name, g in zip(target.trainable, target.gradient, strict=True):
        assert known[name].noise == pytest.approx(sigma * g.numel() ** 0.5 / g.norm().item())
    half = replace(target, gradient=tuple(g.half().float() for g in target.gradient))
    for accuracy in accuracies(model, half).values():
        assert accuracy.rounding == eps
        assert accuracy.noise == pytest.approx(torch.finfo(torch.float16).eps / 12**0.5)


def test_noise_that_nobody_recorded_shows_in_the_heads_gradient():
    model = network("residual")
    walks = []
    for relative in (0.0, 1e-3):
        x, y = photos(2, 8, target_idx=10)[0], torch.tensor([5, 1])
        target = noisy(relative)(target_of(model, x, y, train_mode=False))
        gradient = dict(zip(target.trainable, target.gradient, strict=True))
        walked = network_of(
            model, 2, (3, 8, 8), gradient, train_mode=False, statistics=None,
            accuracy=accuracies(model, target),
        )  # fmt: skip
        head = peel(walked, y, on_layer=lambda _: True).layers[0]
        assert head.certified
        (noise,) = {accuracy.noise for accuracy in walked.accuracy.values()}
        walks.append(noise)
    assert walks == [0.0, pytest.approx(1e-3, rel=0.2)]


def test_a_wrong_fixed_point_of_the_head_is_no_noise():
    """It leaves less than LARGEST of a gradient that has no noise."""
    torch.manual_seed(0)
    features = torch.randn(8, 512).double().relu()
    y, weight = torch.randperm(10)[:8], 0.024 * torch.randn(10, 512).double()
    weight[y] += 0.01 * (features - features.mean(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(512, 10, bias=False)).double()
    model[1].weight.data = weight
    loss = F.cross_entropy(model(features), y)
    (gradient,) = torch.autograd.grad(loss, [model[1].weight])
    walked = network_of(
        model, 8, (512, 1, 1), {"1.weight": gradient}, train_mode=False, statistics=None,
        accuracy={"1.weight": Accuracy(1e-7)},
    )  # fmt: skip
    (head,) = peel(walked, y).layers
    assert 1e-4 < head.residual < LARGEST
    assert not head.certified


def test_nothing_is_drawn_but_from_the_seed(brief):
    """No generator of the process is touched; the decoder's augmentation follows the seed."""
    model, found = network("convnet"), []
    x, y = photos(2, 16, target_idx=10)[0], torch.tensor([5, 1])
    target = target_of(model, x, y, train_mode=False)
    for state, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(state)
        found.append(layerwise_attack(model, target, y, public(16), seed=seed))
        drawn = torch.rand(3)
        assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(state)))
    first, again, other = found
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    for recovered in (again, other):
        assert recovered.tensors.keys() == first.tensors.keys()
        for name, tensor in recovered.tensors.items():
            assert torch.equal(tensor, first.tensors[name])
