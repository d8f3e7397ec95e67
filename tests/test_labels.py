"""Labels from gradients: integers that sum to B, hard facts that are facts, published targets."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.labels import SETTINGS, SlimResNet, run
from inversion.labels.auxiliary_counts import auxiliary_counts
from inversion.labels.counts import (
    ScaledGradientError,
    check_scale,
    counts,
    homogeneous,
    lower_bounds,
    round_counts,
    with_bias_gradient,
)
from inversion.labels.evidence import Auxiliary, Evidence, features_of, gather_evidence
from inversion.labels.reconstruct import (
    LABEL_FUNCTIONS,
    LabelInputs,
    choose_method,
    reconstruct_labels,
)
from inversion.settings import LABEL_METHODS
from models.batchnorm import batchnorm_layers
from models.binding import bind
from models.build import build_model, init_head
from models.checkpoint import load
from models.gradient import ClientLoss, batch_gradient
from models.target import Protection, model_of
from tests.support import attack, call, photos, succeed, target_of
from tests.test_datasets import image_folder
from train.photos import PHOTOS
from utils.image_files import PUBLIC_PHOTOS, public_photographs
from utils.metrics import existence_accuracy, label_accuracy
from utils.tensor_files import save

FROM_GRADIENT = [name for name, method in LABEL_METHODS.items() if not method.needs_auxiliary]


def evidence_of(h, y, weight, bias, *, smoothing=0.0, sigma=0.0, factor=1.0, has_bias=True, **more):
    """What features h (B, d) with labels y show at a head, noise drawn by torch's generator."""
    residual = (h @ weight.T + bias).softmax(1) - smoothing / len(weight)
    residual[torch.arange(len(y)), y] -= 1 - smoothing

    def sent(g):
        return factor * g + sigma * torch.randn_like(g)

    return Evidence(
        weight_grad=sent(residual.T @ h / len(y)),
        bias_grad=sent(residual.mean(0)) if has_bias else None,
        weight=weight,
        bias=bias,
        batch_size=len(y),
        label_smoothing=smoothing,
        sigma=sigma,
        clipped=factor < 1,
        resolution=torch.finfo(torch.float64).eps,
        **more,
    )


def check_counts(n, batch_size, num_classes):
    assert not n.is_floating_point()
    assert n.shape == (num_classes,)
    assert n.sum() == batch_size
    assert n.min() >= 0


# 1,000 cases --------------------------------------------------------------------------------


def random_case(seed):
    """Any head and any batch: (evidence, labels, whether the bounds must be facts)."""
    torch.manual_seed(seed)

    def integer(low, high):  # evenly over magnitudes
        return int(round(low * (high / low) ** torch.rand(()).item()))

    num_classes, batch_size, width = integer(2, 1000), integer(1, 512), integer(1, 24)
    kind = seed % 8
    y = torch.randint(num_classes, (batch_size,))
    if kind == 1:  # every class occurs, or as many as can
        y = torch.arange(batch_size) % num_classes
    if kind == 2:  # one class is absent
        y = y.clamp(max=max(0, num_classes - 2))
    h = torch.randn(batch_size, width, dtype=torch.float64)
    public = torch.randn(40, width, dtype=torch.float64)
    non_negative = bool(seed // 8 % 2)
    if non_negative:
        h, public = h.relu(), public.relu()
    weight = torch.randn(num_classes, width, dtype=torch.float64) * 10 ** (2 * torch.rand(()) - 2)
    bias = torch.zeros(num_classes, dtype=torch.float64)
    if kind == 3:  # a class that is never predicted: a zero gradient but for its labels
        bias[-1] = -1e4
    if kind == 4:
        h, public = torch.zeros_like(h), torch.zeros_like(public)
    evidence = evidence_of(
        h,
        y,
        weight,
        bias,
        sigma=[0.0, 1e-3, 10.0][seed % 3] if kind == 5 else 0.0,
        smoothing=0.1 if kind == 6 else 0.0,
        factor=0.3 if kind == 7 else 1.0,
        has_bias=seed % 5 != 0,
        non_negative=non_negative,
        public=public if seed % 3 else None,
        noise=None if seed % 3 else public,
    )
    return evidence, y


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_cases(block):
    """No method fails, each gives exactly B labels in range, and certain bounds are certain."""
    cases = facts = 0
    for seed in range(100 * block, 100 * block + 100):
        evidence, y = random_case(seed)
        before = [t.clone() for t in (evidence.weight_grad, evidence.weight, evidence.bias)]
        for name in FROM_GRADIENT:
            estimate = LABEL_FUNCTIONS[name](evidence)
            check_counts(estimate.counts, len(y), evidence.num_classes)
        complete = with_bias_gradient(evidence)
        bounds, certain = lower_bounds(complete)
        if not complete.is_surrogate:  # features of zero mean show no length of a stand-in
            check_scale(complete)
        if certain:
            facts += 1
            true = torch.bincount(y, minlength=evidence.num_classes)
            assert (bounds <= true).all(), seed
        for tensor, old in zip(
            (evidence.weight_grad, evidence.weight, evidence.bias), before, strict=True
        ):
            assert torch.equal(tensor, old)
        cases += 1
    assert cases == 100
    assert facts > 50


def test_the_cases_cover_what_they_should():
    shapes = [(e.num_classes, e.batch_size, e) for e, _ in map(random_case, range(300))]
    assert min(c for c, _, _ in shapes) == 2
    assert max(c for c, _, _ in shapes) > 800
    assert {b for _, b, _ in shapes} >= {1, 2}
    assert any(c < b for c, b, _ in shapes)
    assert any(e.bias_grad is None for _, _, e in shapes)
    assert any(e.bias_grad is not None and (e.bias_grad == 0).any() for _, _, e in shapes)


# Parts --------------------------------------------------------------------------------------


def test_rounding_is_exact():
    """Against every way to share out B labels."""
    torch.manual_seed(0)
    for case in range(60):
        count, total = 3 + case % 2, 1 + case % 6
        x = 3 * torch.randn(count, dtype=torch.float64) + (case % 3)
        bounds = torch.randint(0, 2, (count,))
        found = round_counts(x, bounds, total)
        check_counts(found, total, count)
        every = [
            n
            for n in itertools.product(range(total + 1), repeat=count)
            if sum(n) == total and all(a >= b for a, b in zip(n, bounds.tolist(), strict=True))
        ]
        if not every:  # the bounds alone exceed B: they are lowered
            assert (found <= bounds).all()
            ranges = [range(bound + 1) for bound in bounds.tolist()]
            every = [n for n in itertools.product(*ranges) if sum(n) == total]
        best = min(sum((a - b) ** 2 for a, b in zip(n, x.tolist(), strict=True)) for n in every)
        assert (found - x).square().sum().item() == pytest.approx(best)
    huge = round_counts(torch.full((5000,), 1e6).double(), torch.zeros(5000).long(), 7)
    check_counts(huge, 7, 5000)


@pytest.mark.parametrize("scale", [1e3, 1e9, 1e15, 1e30])
def test_no_scale_keeps_rounding_from_ending(scale):
    torch.manual_seed(0)
    x = scale * torch.randn(1000, dtype=torch.float64)
    for bounds in (torch.zeros(1000), (x - 1).clamp(0, 1e15), torch.full((1000,), 1e15)):
        check_counts(round_counts(x, bounds.long(), 64), 64, 1000)
    evidence, y = random_case(1)
    long = evidence.scaled(1 / scale)
    for name in FROM_GRADIENT:
        estimate = LABEL_FUNCTIONS[name](long)
        check_counts(estimate.counts, len(y), evidence.num_classes)


def test_the_identity_is_exact_where_all_samples_agree():
    """One embedding for all: n = B (q − g) to rounding, with and without label smoothing."""
    torch.manual_seed(0)
    h = torch.rand(1, 5).double().expand(20, 5)
    y = torch.tensor([0] * 11 + [3] * 6 + [7] * 3)
    weight, bias = torch.randn(9, 5).double(), torch.randn(9).double()
    for smoothing in (0.0, 0.2):
        evidence = evidence_of(h, y, weight, bias, smoothing=smoothing)
        true = torch.bincount(y, minlength=9).double()
        torch.testing.assert_close(homogeneous(evidence), true, rtol=0, atol=1e-6)


def test_bounds_see_saturated_classes():
    """A sure and right head gives −B g = n − Σp: the bound is the count itself, not one more."""
    h = 40 * torch.eye(4).double()[torch.tensor([0, 0, 1])]
    weight, bias = torch.eye(4).double(), torch.zeros(4).double()
    wrong = torch.tensor([2, 2, 2])
    for dtype, resolution in ((torch.float64, 2.0**-52), (torch.float32, 2.0**-23)):
        evidence = evidence_of(h, wrong, weight, bias, non_negative=True)
        sent = evidence.bias_grad.to(dtype).double()
        evidence = replace(evidence, bias_grad=sent, resolution=resolution)
        bounds, certain = lower_bounds(evidence)
        assert bounds.tolist() == [0, 0, 3, 0]
        assert certain


def trained_head(num_classes=6, width=12, spread=1.0):
    """A head of class means as after training, and a sampler of its features."""
    torch.manual_seed(1)
    means = 2 * torch.rand(num_classes, width).double()
    weight = spread * (means - means.mean(0))
    bias = -0.5 * (weight * (means + means.mean(0))).sum(1)

    def draw(y):
        return (means[y] + 0.5 * torch.randn(len(y), width).double()).relu()

    return weight, bias, draw


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_certain_bounds_are_facts_on_trained_heads(spread, smoothing):
    for num_classes in (6, 20):
        weight, bias, draw = trained_head(num_classes, spread=spread)
        public = draw(torch.arange(num_classes).repeat(20))
        for trial in range(10):
            torch.manual_seed(trial)
            y = torch.tensor([0] * 30 + [2] * 10)
            evidence = evidence_of(draw(y), y, weight, bias, smoothing=smoothing, public=public)
            bounds, certain = lower_bounds(evidence)
            assert certain
            assert (bounds <= torch.bincount(y, minlength=num_classes)).all()
            if not smoothing:
                assert bounds.sum() >= 1
            found = counts(evidence).counts
            check_counts(found, 40, num_classes)


def test_auxiliary_images_help_on_a_trained_head():
    weight, bias, draw = trained_head()
    labels = torch.arange(6).repeat(60)
    h = draw(labels)
    accuracies = {"counts": [], "aux": [], "bn": []}
    for trial in range(8):
        torch.manual_seed(100 + trial)
        y = torch.tensor([0] * 40 + [2] * 15 + [3] * 5 + [5] * 4)[torch.randperm(64)]
        batch = draw(y)
        evidence = evidence_of(batch, y, weight, bias, public=h, non_negative=True)
        aux = {"auxiliary": Auxiliary(h, labels)}
        bn = {"auxiliary": Auxiliary(h, labels, h, batch.mean(0))}
        found = {
            "counts": counts(evidence),
            "aux": auxiliary_counts(replace(evidence, **aux)),
            "bn": auxiliary_counts(replace(evidence, **bn)),
        }
        assert found["counts"].regime == "saturated"
        for name, estimate in found.items():
            check_counts(estimate.counts, 64, 6)
            labels_found = torch.repeat_interleave(torch.arange(6), estimate.counts)
            accuracies[name].append(label_accuracy(labels_found, y))
    mean = {name: sum(values) / len(values) for name, values in accuracies.items()}
    assert mean["aux"] > mean["counts"] + 0.05
    assert mean["bn"] > mean["aux"]
    assert mean["bn"] > 0.9


def test_auxiliary_counts_with_many_classes_and_single_images():
    """More than 200 classes: one statistic a class; one image a class: pooled spread."""
    torch.manual_seed(0)
    for num_classes, images in ((230, 2), (5, 1)):
        weight, bias = torch.randn(num_classes, 8).double(), torch.zeros(num_classes).double()
        labels = torch.arange(num_classes).repeat(images)
        h, y = torch.rand(len(labels), 8).double(), torch.randint(num_classes, (40,))
        evidence = evidence_of(
            torch.rand(40, 8).double(), y, weight, bias, public=h, auxiliary=Auxiliary(h, labels)
        )
        check_counts(auxiliary_counts(evidence).counts, 40, num_classes)
    incomplete = replace(evidence, auxiliary=Auxiliary(h[1:], labels[1:]))
    with pytest.raises(ValueError, match="class 0 has no auxiliary image"):
        auxiliary_counts(incomplete)


# From a target ------------------------------------------------------------------------------


def batch(distinct, batch_size=24, size=32, classes=8):
    x, y = photos(batch_size, size, target_idx=3)
    return x, torch.tensor([2, 5, 1, 7, 0, 3])[:distinct].repeat(batch_size)[:batch_size] % classes


def public(size=32):
    return (public_photographs(128, (3, size, size)) - 0.45) / 0.225


@pytest.mark.parametrize("arch", ["lenet", "convnet", "resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("train_mode", [True, False], ids=["train", "eval"])
def test_untrained_networks_give_every_label_away(arch, train_mode):
    x, y = batch(3)
    torch.manual_seed(0)
    model = build_model(arch, 8, (3, 32, 32))
    init_head(model, "normal")
    target = target_of(model, x, y, train_mode=train_mode, arch=arch)
    attacked = model_of(target)
    state = {key: value.clone() for key, value in attacked.state_dict().items()}
    gradient = [g.clone() for g in target.gradient]
    found = reconstruct_labels(target, LabelInputs(attacked, public()))
    assert found.method == "counts"
    assert found.regime == "homogeneous"
    assert found.labels.tolist() == y.sort().values.tolist()
    assert found.certain
    assert (found.lower_bounds <= torch.bincount(y, minlength=8)).all()
    assert all(torch.equal(a, b) for a, b in zip(target.gradient, gradient, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in attacked.state_dict().items())
    assert not any(module._forward_hooks for module in attacked.modules())


def test_evidence_is_what_a_closed_form_gives():
    x, y = batch(4)
    model = build_model("convnet", 8, (3, 32, 32))
    target = target_of(model, x, y, train_mode=True)
    found = gather_evidence(model, target, public=public())
    h, _ = features_of(model, x, train_mode=True)
    closed = evidence_of(h, y, found.weight, found.bias)
    torch.testing.assert_close(found.weight_grad, closed.weight_grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.bias_grad, closed.bias_grad, rtol=0, atol=1e-6)
    assert found.public.shape == (128, 32)
    assert found.non_negative
    assert found.resolution == torch.finfo(torch.float32).eps


def test_uploaded_statistics_show_the_auxiliary_images_as_the_client_saw_them():
    """In train mode: the client's own batch, seen through its statistics, has its own features."""
    x, y = batch(4)
    torch.manual_seed(0)
    model = build_model("resnet18", 8, (3, 32, 32))
    target = target_of(model, x, y, train_mode=True)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    evidence = gather_evidence(model, target, auxiliary=(x, y), use_uploaded_bn=True)
    own, bn_inputs = features_of(model, x, train_mode=True)
    torch.testing.assert_close(evidence.auxiliary.features, own, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(evidence.auxiliary.bn_mean, bn_inputs.mean(0), rtol=0, atol=1e-5)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_auto_chooses_as_documented():
    x, y = batch(4)
    model = build_model("convnet", 8, (3, 32, 32))
    many = (torch.zeros(160, 3, 32, 32), torch.arange(8).repeat(20))
    few = (torch.zeros(16, 3, 32, 32), torch.arange(8).repeat(2))
    uploaded = target_of(model, x, y, train_mode=True)
    silent = target_of(model, x, y, train_mode=True, capture_bn=False)
    evaluated = target_of(model, x, y, train_mode=False, capture_bn=False)
    assert choose_method(uploaded, None, model)[0] == "counts"
    assert choose_method(uploaded, many, model)[0] == "counts-bn"
    assert choose_method(uploaded, few, model)[0] == "counts"
    assert choose_method(silent, many, model)[0] == "counts"
    assert choose_method(evaluated, few, model)[0] == "counts-aux"
    assert (
        len({choose_method(target, many, model)[1] for target in (uploaded, silent, evaluated)})
        == 3
    )
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), model)
    name, why = choose_method(evaluated, few, untracked)
    assert (name, "batch statistics" in why) == ("counts", True)


def test_auxiliary_methods_run_from_a_target():
    x, y = batch(4)
    model = build_model("convnet", 8, (3, 32, 32))
    auxiliary = (photos(160, 32, target_idx=5)[0], torch.arange(8).repeat(20))
    inputs = LabelInputs(model, public(), auxiliary)
    target = target_of(model, x, y, train_mode=False)
    for method in ("counts-aux", "counts-bn", "auto"):
        found = reconstruct_labels(target, inputs, method)
        assert found.labels.shape == (24,)
        assert found.method == ("counts-bn" if method == "auto" else method)
    model[-1] = nn.Linear(32, 8, bias=False)
    target = target_of(model, x, y, train_mode=False, capture_bn=False)
    found = reconstruct_labels(target, LabelInputs(model, public(), auxiliary), "auto")
    assert found.method == "counts"
    assert "no bias" in found.reason
    assert found.labels.shape == (24,)
    assert not found.certain
    uploaded = target_of(model, x, y, train_mode=True)
    found = reconstruct_labels(uploaded, LabelInputs(model, public(), auxiliary), "auto")
    assert found.method == "counts"
    assert "counts-bn needs" in found.reason
    model = build_model("convnet", 8, (3, 32, 32))
    silent = target_of(model, x, y, train_mode=False, capture_bn=False)
    with pytest.raises(ValueError, match="uploaded no BatchNorm statistics"):
        reconstruct_labels(silent, LabelInputs(model, public(), auxiliary), "counts-bn")


def test_what_has_no_linear_head_is_refused():
    x, y = batch(4, batch_size=2, size=64)
    model = build_model("squeezenet1_1", 8, (3, 64, 64))
    target = target_of(model, x, y, train_mode=False, capture_bn=False)
    with pytest.raises(ValueError, match="is a Conv2d; labels are read off"):
        reconstruct_labels(target, LabelInputs(model))
    behind = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 8), nn.ReLU())
    target = target_of(behind, x, y, train_mode=False, capture_bn=False)
    with pytest.raises(ValueError, match="layers follow the classifier head"):
        reconstruct_labels(target, LabelInputs(behind))
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                           nn.Linear(4, 8))  # fmt: skip
    frozen[3].requires_grad_(False)
    target = target_of(frozen, x, y, train_mode=False, capture_bn=False)
    with pytest.raises(ValueError, match=r"weight 3\.weight was not sent"):
        reconstruct_labels(target, LabelInputs(frozen))


def protected(target, sigma, clip, seed=5):
    """The target after what a client with that noise and clipping sends, recorded."""
    torch.manual_seed(seed)
    norm = sum(g.square().sum() for g in target.gradient).sqrt().item()
    factor = 1.0 if clip is None else min(1.0, clip / norm)
    gradient = tuple(factor * g + sigma * torch.randn_like(g) for g in target.gradient)
    return replace(target, gradient=gradient, protection=Protection("batch", sigma, clip))


@pytest.mark.parametrize(("sigma", "clip"), [(1e-3, None), (0.0, 0.2), (0.0, 1e6), (1e-4, 0.5)])
def test_recorded_noise_and_clipping_are_used(sigma, clip):
    torch.manual_seed(0)
    model = SlimResNet(100)
    x, y = photos(64, 32, target_idx=2)
    y = 10 * y
    target = protected(target_of(model, x, y, train_mode=True, num_classes=100), sigma, clip)
    evidence = gather_evidence(model, target, public=public())
    assert evidence.sigma == sigma
    assert evidence.clipped == (clip is not None and clip < 1)
    found = reconstruct_labels(target, LabelInputs(model, public()))
    assert label_accuracy(found.labels, y) >= 0.97
    assert found.certain == (sigma == 0)
    assert "could not be undone" not in found.reason
    if clip == 0.2:  # the same gradient without its record is misread
        silent = replace(target, protection=None)
        blind = reconstruct_labels(silent, LabelInputs(model, public()))
        assert label_accuracy(blind.labels, y) < label_accuracy(found.labels, y)


def test_what_became_of_clipping_is_said():
    """One absent class of four is too few to show the factor; half of ten are enough."""
    torch.manual_seed(0)
    for num_classes, said in ((4, "could not be undone"), (10, "estimated factor of 0.3")):
        h, y = torch.rand(60, 8).double(), torch.arange(60) % (3 if num_classes == 4 else 5)
        weight = 0.01 * torch.randn(num_classes, 8).double()
        bias = torch.zeros(num_classes).double()
        evidence = evidence_of(h, y, weight, bias, factor=0.3, public=h)
        assert said in counts(evidence).remark
    plain = evidence_of(h, y, weight, bias, public=h)
    assert counts(plain).remark == ""


def test_noise_hides_whether_it_was_clipped():
    """Clipped to 0.5 and drowned in noise: taken for clipped whatever the noise did to the norm."""
    torch.manual_seed(0)
    model = SlimResNet(8)
    target = target_of(model, *photos(16, 32, target_idx=2), train_mode=True)
    for seed in range(8):
        found = protected(target, 0.02, 0.5, seed)
        assert gather_evidence(model, found, public=public()).clipped
    quiet = protected(target, 1e-6, 1e3)
    assert not gather_evidence(model, quiet, public=public()).clipped


# A scaled gradient --------------------------------------------------------------------------


def scaled_target(distinct, scale, *, batch_size=24, has_bias=True, sigma=0.0):
    x, y = batch(distinct, batch_size)
    torch.manual_seed(0)
    model = build_model("convnet", 8, (3, 32, 32))
    init_head(model, "normal")
    if not has_bias:
        model[-1].bias = None
    target = protected(target_of(model, x, y, train_mode=True), sigma, None)
    return model, replace(target, gradient=tuple(scale * g for g in target.gradient))


@pytest.mark.parametrize(
    ("scale", "said", "estimate"),
    [
        (1000, "by about 1,000 (.* batch of 24 has; 1,024 lies near", 1000),
        (65536, "by about 65,536, a power of two", 65536),
        (1e6, "by about 1,000,000 (.* 1,048,576 lies near", 1e6),
        (3, "by about 3 (", 3),
    ],
)
def test_a_scaled_gradient_is_refused_with_its_scale(scale, said, estimate):
    model, target = scaled_target(3, scale)
    with pytest.raises(ScaledGradientError, match=said.replace("(", r"\(")) as refusal:
        reconstruct_labels(target, LabelInputs(model, public()))
    assert refusal.value.scale == pytest.approx(estimate, rel=0.01)
    found = reconstruct_labels(target.unscaled(scale), LabelInputs(model, public()))
    assert label_accuracy(found.labels, batch(3)[1]) == 1.0
    assert found.certain


def test_without_absent_classes_the_least_scale_is_said():
    x, y = photos(8, 32, target_idx=3)[0], torch.arange(8)
    torch.manual_seed(0)
    model = build_model("convnet", 8, (3, 32, 32))
    target = target_of(model, x, y, train_mode=True)
    longer = replace(target, gradient=tuple(1000 * g for g in target.gradient))
    with pytest.raises(ScaledGradientError, match="scaled by at least") as refusal:
        reconstruct_labels(longer, LabelInputs(model, public()))
    assert refusal.value.scale is None
    least = float(str(refusal.value).split("at least ")[1].split(" ")[0])
    assert 10 < least <= 1000
    reconstruct_labels(target, LabelInputs(model, public()))


def test_noise_and_a_missing_bias_are_refused_only_far_beyond_the_bounds():
    for options in ({"has_bias": False}, {"sigma": 0.01}, {"sigma": 1.0}):
        model, target = scaled_target(3, 1.0, **options)
        found = reconstruct_labels(target, LabelInputs(model, public()))
        assert not found.certain
        assert found.lower_bounds.sum() <= 24  # what is told as likely is possible
    for options in ({"has_bias": False}, {"sigma": 0.01}):
        model, target = scaled_target(3, 1000.0, **options)
        with pytest.raises(ScaledGradientError):
            reconstruct_labels(target, LabelInputs(model, public()))


def test_more_classes_than_images_are_no_matter_of_scale():
    model, target = scaled_target(6, 1.0)
    with pytest.raises(ValueError, match="6 classes occur, and the batch has 4 images"):
        reconstruct_labels(replace(target, batch_size=4), LabelInputs(model, public()))


def test_division_makes_no_number_finer_than_it_was_sent():
    model, target = scaled_target(3, 1000.0)
    halved = replace(target, gradient=tuple(g.half().float() for g in target.gradient))
    seen = gather_evidence(model, halved.unscaled(1000.0), public=public())
    assert seen.resolution == torch.finfo(torch.float16).eps
    assert target.unscaled(1.0) is target


def test_gradient_scale_undoes_what_the_client_multiplied(captured, tmp_path):
    """By a power of two: the same bits, of the attack and of the control."""
    path = captured("-a", "lenet", "-b", "4", "--with-control")
    checkpoint = load(str(path))
    longer = checkpoint | {
        "target_gradient": [1024 * g for g in checkpoint["target_gradient"]],
        "control": checkpoint["control"]
        | {"target_gradient": [1024 * g for g in checkpoint["control"]["target_gradient"]]},
    }
    bind(longer)
    save(longer, str(tmp_path / "scaled.tar"))
    flags = ("--epochs", 3, "--metric", "--pseudo-label-init", "from_grads")
    flags += ("--gradient-loss-fun", "L2")
    refused = call("run.py", "--checkpoint", tmp_path / "scaled.tar", "--lr", 0.1, *flags)
    assert refused.code == 2
    assert refused.err.endswith("; give --gradient-scale 1024\n")
    ours, _ = attack(tmp_path / "a", path, *flags)
    theirs, _ = attack(tmp_path / "b", tmp_path / "scaled.tar", *flags, "--gradient-scale", 1024)
    assert theirs["settings"]["gradient_scale"] == 1024
    assert theirs["losses"] == ours["losses"]
    assert theirs["labels"]["lower_bounds"] == ours["labels"]["lower_bounds"]
    assert theirs["metrics"] == ours["metrics"]


# The table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["T1", "T2a", "T2b", "T3", "T4a", "T4b", "T5", "T6", "T11a", "T11b", "T12"]
)
def test_targets_without_training(name, tmp_path):
    """The benchmark's own settings with three batches instead of ten."""
    (setting,) = (setting for setting in SETTINGS if setting.name == name)
    rows = run(setting, 0, 3, {}, tmp_path, methods=("counts",))
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    assert len(rows) == 3
    assert mean >= setting.reach["counts"]


def test_every_setting_has_a_goal():
    names = {setting.name.rstrip("ab") for setting in SETTINGS}
    assert names == {f"T{i}" for i in range(1, 13)}
    assert all(setting.reach for setting in SETTINGS)


# End to end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["lenet", "resnet18"])
def test_from_grads_equals_known_labels(captured, tmp_path, arch):
    """Repeated labels on an untrained network: all found, and the images are the same."""
    flags = ("-a", arch, "-b", "12", "--target-idx", "1", "--distinct-labels", "3")
    path = captured(*flags, "--label-smoothing", "0.1")
    found, folder = attack(
        tmp_path / "a", path, "--epochs", 3, "--pseudo-label-init", "from_grads", "--metric",
        "--no-controls",
    )  # fmt: skip
    labels = found["labels"]
    assert labels["method"] == "counts"
    assert labels["regime"] == "homogeneous"
    assert labels["accuracy"] == labels["existence_accuracy"] == 1.0
    assert labels["reconstructed"] == sorted(labels["true"])
    assert len(set(labels["reconstructed"])) == 3
    given = ",".join(str(label) for label in sorted(labels["true"]))
    _, other = attack(tmp_path / "b", path, "--epochs", 3, "--labels", given)
    images = [torch.load(f / "x_recon.pth", weights_only=True) for f in (folder, other)]
    assert torch.equal(*images)


def test_from_grads_needs_no_truth(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "4", "--seal")
    outcome = succeed(
        "run.py", "--root", tmp_path, "--checkpoint", path, "--lr", "0.1", "--epochs", "2",
        "--pseudo-label-init", "from_grads", "--label-prior", "uniform",
    )  # fmt: skip
    assert "labels from the gradient: counts (no auxiliary images given)" in outcome.out
    assert "labels are certain from the gradient alone" in outcome.out
    assert "accuracy" not in outcome.out


def test_auxiliary_folder(captured, tmp_path):
    path = captured("-a", "convnet", "-b", "4", "--model-eval")
    names = tuple("abcdefgh")
    root = image_folder(tmp_path / "aux", classes=names)
    result, _ = attack(
        tmp_path, path, "--epochs", 1, "--pseudo-label-init", "from_grads", "--label-aux", root
    )
    assert result["labels"]["method"] == "counts-aux"
    flags = ("--checkpoint", path, "--lr", 0.1, "--epochs", 1, "--pseudo-label-init", "from_grads")
    small = image_folder(tmp_path / "small", classes=names[:3])
    outcome = call("run.py", *flags, "--label-aux", small)
    assert outcome.code == 2
    assert "3 class folders, but the network has 8 classes" in outcome.err
    outcome = call("run.py", *flags, "--label-aux", root, "--label-method", "counts-bn")
    assert outcome.code == 2
    assert "uploaded no BatchNorm statistics" in outcome.err


def test_public_photographs_are_no_targets_and_repeat():
    a, b = (public_photographs(20, (3, 16, 16), seed=s) for s in (0, 0))
    assert torch.equal(a, b)
    assert not torch.equal(a, public_photographs(20, (3, 16, 16), seed=1))
    assert public_photographs(5, (1, 8, 12)).shape == (5, 1, 8, 12)
    assert len({image.numpy().tobytes() for image in a}) == 20
    targets = [photo().tobytes() for photo in PHOTOS.values()]
    assert not {photo().tobytes() for photo in PUBLIC_PHOTOS} & set(targets)


def test_existence_accuracy_by_hand():
    y, true = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1])
    assert existence_accuracy(y, true, 10) == pytest.approx(0.8)


def test_label_smoothing_is_in_the_gradient():
    x, y = photos(4, 16)
    model = build_model("lenet", 8, (3, 16, 16))
    plain, smooth = (batch_gradient(model, x, y, ClientLoss(True, e)) for e in (0.0, 0.3))
    shift = [a - b for a, b in zip(plain, smooth, strict=True)][-1]
    n = torch.bincount(y, minlength=8) / 4
    torch.testing.assert_close(shift, 0.3 * (1 / 8 - n), rtol=0, atol=1e-6)
    assert not batchnorm_layers(model)
