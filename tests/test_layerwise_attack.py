"""The walk from the head to the image, the images that it makes, and the audit of both."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inversion.layerwise.accuracy import LARGEST, Accuracy
from inversion.layerwise.attack import Matching, accuracies, layerwise_attack
from inversion.layerwise.peel import peel
from inversion.layerwise.trace import network_of
from models.build import build_model
from models.checkpoint import Task, make_checkpoint, seal
from models.gradient import ClientLoss, whole_batch_gradient
from models.reading import target_from_checkpoint
from models.target import GroundTruth, Protection, model_of
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
from utils.image_files import public_photographs
from utils.images import normalise

# The walk ----------------------------------------------------------------------------------------


@functools.cache
def public(size):
    """Photographs that no batch here has."""
    target = SimpleNamespace(mean=torch.tensor(MEAN), std=torch.tensor(STD))
    shape = (-1, 1, 1)
    images = public_photographs(60, (3, size, size))
    return normalise(images, target.mean.view(shape), target.std.view(shape))


def attacked(model, labels, size, *, train_mode=False, change=lambda target: target, **options):
    """An attack on photographs with these labels: what it recovered, images, true tensors."""
    x, _ = photos(len(labels), size, target_idx=10)
    y = torch.tensor(labels)
    target = target_of(model, x, y, train_mode=train_mode)
    recovered = layerwise_attack(model, change(target), y, public(size), **options)
    values, *_ = true_tensors(model.double(), x.double(), y, train_mode=train_mode)
    model.float()
    return recovered, x, values


@pytest.fixture
def brief(monkeypatch):
    """Activations are matched for a few steps: the images are not judged."""
    for name in ("WHOLE", "POOLED"):
        monkeypatch.setattr(f"inversion.layerwise.attack.{name}", Matching(10, 0.05, 10, 0.0))


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


@pytest.mark.parametrize("count", [1, 2])
def test_lenet_gives_its_images_away(count):
    recovered, x, values = attacked(network("lenet"), [5, 1][:count], 16)
    assert (recovered.method, recovered.sources, recovered.stopped) == ("solved", ("input_1",), "")
    assert recovered.determined
    assert [layer.kind for layer in recovered.layers] == ["head"] + 3 * ["convolution"]
    assert len(recovered.certified) == 4
    assert worst(recovered, values) < 1e-4
    assert gap(recovered, x) < 1e-4


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
    certified = ["_6", "_4_relu", "_3_relu_1", "_3_relu", "_2"]
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


#: Case → labels, change of the target, tensors that are certified, why it ended.
PARTIAL = {
    "repeated labels": ([5, 1, 1], lambda t: t, 0, "_6: 256 equations determine 64 of its 96"),
    "noise": ([5, 1], noisy(1e-3), 1, "_3_relu: 2304 equations determine"),
    "other gradient": ([5, 1], lambda t: replace(t, gradient=t.gradient[:-2] + tuple(
        torch.ones_like(g) for g in t.gradient[-2:])), 0, "_6: "),
    "dead layer": ([5, 1], with_zeros, 3, "4.conv1: the gradient of its weights is zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTIAL)
def test_what_cannot_be_solved_ends_the_walk_with_a_reason(case, brief):
    labels, change, certified, says = PARTIAL[case]
    recovered, x, _ = attacked(network("residual"), labels, 8, change=change)
    assert recovered.stopped.startswith(says)
    assert len(recovered.certified) >= certified
    assert recovered.method == ("activations" if certified else "decoder")
    assert certified or not recovered.determined
    assert recovered.shortfall.endswith(recovered.stopped)
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
    model = network("residual")
    x, y = photos(2, 8, target_idx=10)[0], torch.tensor([5, 1])
    target = target_of(model, x, y, train_mode=False)
    wrong = layerwise_attack(model, target, torch.tensor([5, 2]), public(8))
    assert not wrong.certified
    assert wrong.layers[0].residual > LARGEST
    assert wrong.method == "decoder"


def test_the_walk_ends_where_it_is_told_to(brief):
    seen = []

    def on_layer(layer):
        seen.append(layer.name)
        return len(seen) == 3

    recovered, *_ = attacked(network("residual"), [5, 1], 8, on_layer=on_layer)
    assert recovered.stopped == "interrupted"
    assert [layer.name for layer in recovered.layers] == seen == ["_6", "_4_relu_1", "_4_relu"]


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
    more = replace(
        recovered,
        method="activations",
        sources=("_13", "big"),
        tensors=recovered.tensors | {"big": public(16)},
    )
    assert more.determined


def test_a_client_that_clips_its_batch():
    """The same factor for every image: it follows from the head's bias."""

    def clip(target):
        protection = Protection("batch", 0.0, 1.0)
        gradient = tuple(0.3 * g for g in target.gradient)
        return replace(target, gradient=gradient, protection=protection)

    recovered, x, values = attacked(network("lenet"), [5, 1], 16, change=clip)
    assert recovered.method == "solved"
    assert gap(recovered, x) < 1e-4


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


def test_nothing_is_drawn_and_no_truth_is_read():
    """Bit-identical with the truth sealed away, and with other numbers in its place."""
    model = network("lenet")
    x, y = photos(2, 16, target_idx=10)[0], torch.tensor([5, 1])
    loss = ClientLoss(True)
    sent = whole_batch_gradient(model, x, y, loss)
    task = Task("lenet", 2, (3, 16, 16), CLASSES, MEAN, STD, loss)
    kept = make_checkpoint(model, sent, task, truth=GroundTruth(x, y))
    false = make_checkpoint(model, sent, task, truth=GroundTruth(0 * x, y))
    found = []
    for checkpoint in (kept, kept, seal(kept)[0], false):
        torch.manual_seed(len(found))
        target = target_from_checkpoint(checkpoint)
        found.append(layerwise_attack(model_of(target), target, y, public(16), seed=3))
    for other in found[1:]:
        assert torch.equal(other.images, found[0].images)
        assert other.tensors.keys() == found[0].tensors.keys()
        for name, tensor in other.tensors.items():
            assert torch.equal(tensor, found[0].tensors[name])
