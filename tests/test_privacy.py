"""Clipping and noise: what is sent, what is said of it, and what the attacker is told."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from inversion.audit.information import gradient_information_ratio
from inversion.restarts import initial_images, noise_generator
from models.batchnorm import batchnorm_layers, replace_batchnorm
from models.build import SMALL_NETWORKS, build_model
from models.checkpoint import load
from models.gradient import ClientLoss, batch_gradient, couples_samples, per_sample_gradients
from models.reading import target_from_checkpoint
from models.target import Protection, model_of
from tests.support import attack, call, capture_photos, photos, succeed
from tests.test_datasets import image_folder
from train.client import protection_of
from train.flags import parser
from train.privacy import (
    Mechanism,
    clip_factors,
    epsilon,
    protect_batch,
    protect_per_sample,
    sample_norms,
)
from train.settings import settings_from
from utils.streams import stream


def norm(gradient):
    return math.sqrt(sum(g.double().square().sum().item() for g in gradient))


@pytest.mark.parametrize("clip", [0.5, 1e3, None])
def test_clipping_keeps_the_direction(clip):
    gradient = [torch.randn(30, 4), torch.randn(7)]
    before = [g.clone() for g in gradient]
    sent = protect_batch(gradient, Mechanism(0.0, clip, torch.Generator()))
    assert sent.norm == pytest.approx(norm(gradient), rel=1e-6)
    expected = sent.norm if clip is None else min(clip, sent.norm)
    assert norm(sent.gradient) == pytest.approx(expected, rel=1e-6)
    assert sent.clipped_norm == pytest.approx(sent.sent_norm)
    for g, s in zip(gradient, sent.gradient, strict=True):
        torch.testing.assert_close(s, g * expected / sent.norm)
    assert all(torch.equal(a, b) for a, b in zip(gradient, before, strict=True))


def test_a_zero_gradient_is_left_alone():
    sent = protect_batch([torch.zeros(3)], Mechanism(0.0, 0.5, torch.Generator()))
    assert torch.equal(sent.gradient[0], torch.zeros(3))


def noisy(seed):
    return Mechanism(0.3, 0.5, torch.Generator().manual_seed(seed))


def test_noise_has_the_deviation_asked_for():
    sent = protect_batch([torch.zeros(200, 200)], noisy(0))
    assert sent.gradient[0].std().item() == pytest.approx(0.3, rel=0.02)
    assert sent.gradient[0].mean().item() == pytest.approx(0, abs=0.01)
    again = protect_batch([torch.zeros(200, 200)], noisy(0))
    assert torch.equal(again.gradient[0], sent.gradient[0])


def test_what_the_client_does_is_recorded_and_said(captured, tmp_path):
    flags = ("-a", "convnet", "-b", "4", "--upload-bn")
    plain = load(str(captured(*flags)))
    path = capture_photos(tmp_path, *flags, "--enable-dp", "--sigma", "0.01", "-C", "0.5")
    sent = load(str(path))
    assert target_from_checkpoint(sent).protection == Protection("batch", 0.01, 0.5)
    factor = min(1.0, 0.5 / norm(plain["target_gradient"]))
    assert factor < 1
    difference = torch.cat(
        [
            (s - factor * g).flatten()
            for s, g in zip(sent["target_gradient"], plain["target_gradient"], strict=True)
        ]
    )
    assert difference.std().item() == pytest.approx(0.01, rel=0.02)
    for a, b in zip(plain["bn_mean_list"], sent["bn_mean_list"], strict=True):
        assert torch.equal(a, b)
    (log,) = tmp_path.glob("*.log")
    assert "no differential-privacy guarantee" in log.read_text()
    assert "the BatchNorm statistics sent with it are not protected" in log.read_text()
    result, _ = attack(tmp_path, path, "--epochs", 2, "--metric")
    assert result["metrics"]["mean"]["psnr"] > 0


@pytest.mark.usefixtures("in_two_processes")
def test_two_processes_add_the_same_noise(tmp_path, captured):
    flags = ("-a", "lenet", "-b", "4", "--enable-dp", "--sigma", "0.1")
    alone, shared = (load(str(captured(*flags, "--nproc", n))) for n in ("1", "2"))
    for a, b in zip(alone["target_gradient"], shared["target_gradient"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_labels_survive_clipping_that_is_recorded(tmp_path):
    """Many absent classes show the factor: the recorded clipping is divided out."""
    flags = ("-a", "resnet18", "-b", "12", "--distinct-labels", "2", "--target-idx", "1")
    path = capture_photos(tmp_path, *flags, "--enable-dp", "-C", "0.5")
    outcome = succeed(
        "run.py", "--root", tmp_path, "--checkpoint", path, "--lr", "0.1", "--epochs", "1",
        "--pseudo-label-init", "from_grads", "--metric",
    )  # fmt: skip
    assert "clipping undone by an estimated factor of" in outcome.out
    assert "label accuracy 100.0 %" in outcome.out


# A sample's own gradient --------------------------------------------------------------------


def network(arch, size=32):
    """An architecture whose samples have gradients of their own, and whether in train mode."""
    torch.manual_seed(0)
    name, _, kind = arch.partition(" ")
    model = build_model(name, 8, (3, size, size))
    if kind == "groupnorm":
        assert replace_batchnorm(model, kind) > 0
    return model, kind != "eval"


NETWORKS = ("lenet", "convnet eval", "convnet groupnorm", "resnet18 groupnorm")


@pytest.mark.parametrize(
    ("arch", "smoothing"), [*((arch, 0.1) for arch in NETWORKS), ("lenet", 0.0)]
)
def test_clipped_gradients_equal_a_slow_loop(arch, smoothing):
    """A pass a sample, clipped by torch's own function; median norm as bound, so some are not."""
    model, train_mode = network(arch)
    model, (x, y) = model.double(), photos(5, 32, target_idx=1)
    x = x.double()
    loss = ClientLoss(train_mode, smoothing)
    singles = [batch_gradient(model, x[i : i + 1], y[i : i + 1], loss) for i in range(5)]
    norms = torch.tensor([norm(g) for g in singles], dtype=torch.float64)
    clip = norms.median().item()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for g in singles:
        twins = [nn.Parameter(torch.zeros_like(t)) for t in g]
        for twin, t in zip(twins, g, strict=True):
            twin.grad = t.clone()
        nn.utils.clip_grad_norm_(twins, clip)
        for t, twin in zip(total, twins, strict=True):
            t += twin.grad / 5

    mean = batch_gradient(model, x, y, loss)
    how = Mechanism(0.0, clip, torch.Generator())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for chunk_bytes in (2**30, 2 * size, 1):  # all at once, two, one
        sent = protect_per_sample(mean, how, model, x, y, loss, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(sent.sample_norms, norms, rtol=1e-10, atol=0)
        assert (sent.sample_norms > clip * (1 + 1e-6)).sum() == 2
        gap = [a - b for a, b in zip(sent.gradient, total, strict=True)]
        assert norm(gap) <= 1e-6 * max(1, norm(total))
        assert sent.norm == pytest.approx(norm(mean))
        assert sent.clipped_norm == sent.sent_norm == norm(sent.gradient) <= clip * (1 + 1e-9)


@pytest.mark.parametrize("arch", NETWORKS)
def test_no_clipped_norm_exceeds_the_bound(arch):
    model, train_mode = network(arch)
    x, y = photos(4, 32, target_idx=2)
    chunks = list(per_sample_gradients(model, x, y, ClientLoss(train_mode), chunk_bytes=2**30))
    assert sum(len(chunk[0]) for chunk in chunks) == 4
    for clip in (1e-3, 0.5, 1.0, 1e6):
        for chunk in chunks:
            factors = clip_factors(sample_norms(chunk), clip)
            clipped = [torch.einsum("n,n...->n...", factors.to(g), g) for g in chunk]
            assert (sample_norms(clipped) <= clip * (1 + 1e-6)).all()
            assert (factors <= 1).all()
            if clip == 1e6:
                assert all(torch.equal(a, b) for a, b in zip(clipped, chunk, strict=True))


def test_a_zero_gradient_is_not_divided_by():
    assert clip_factors(torch.zeros(2), 0.5).tolist() == [1.0, 1.0]


def test_noise_of_samples_is_that_of_the_mean():
    model, _ = network("lenet")
    x, y = photos(3, 32)
    mean = batch_gradient(model, x, y, ClientLoss(True))
    draw = torch.Generator().manual_seed(0)
    noisy, silent = (
        protect_per_sample(mean, Mechanism(sigma, 1.0, draw), model, x, y, ClientLoss(True))
        for sigma in (0.3, 0.0)
    )
    gap = torch.cat(
        [(a - b).flatten() for a, b in zip(noisy.gradient, silent.gradient, strict=True)]
    )
    assert gap.std().item() == pytest.approx(0.3, rel=0.02)


def test_coupled_samples_are_refused():
    model = build_model("convnet", 8, (3, 32, 32))
    with pytest.raises(ValueError, match="couples the samples"):
        next(per_sample_gradients(model, *photos(2, 32), ClientLoss(True)))
    outcome = call(
        "training.py", "--data-name", "photos", "-a", "convnet", "-b", 2, "--enable-dp",
        "--dp-mode", "per-sample", "-C", 1, "--sigma", 1,
    )  # fmt: skip
    assert outcome.code == 2
    assert "mixes the samples of the batch" in outcome.err
    assert "--replace-bn groupnorm, or --model-eval" in outcome.err


def test_batchnorm_without_running_statistics_couples_samples_in_eval_mode(monkeypatch):
    def untracked(num_classes, image_shape):
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), *pool, nn.Linear(4, num_classes))

    model, (x, y) = untracked(8, (3, 32, 32)), photos(3, 32)
    assert couples_samples(model, False)
    assert not couples_samples(nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4)), False)
    with pytest.raises(ValueError, match="couples the samples"):
        next(per_sample_gradients(model, x, y, ClientLoss(False)))
    assert not gradient_information_ratio(model, x, y, ClientLoss(False)).independent
    monkeypatch.setitem(SMALL_NETWORKS, "untracked", untracked)
    flags = (
        "--data-name", "photos", "-a", "untracked", "-b", 2, "--enable-dp", "--dp-mode",
        "per-sample", "-C", 1, "--sigma", 1, "--model-eval", "--dry-run",
    )  # fmt: skip
    outcome = call("training.py", *flags)
    assert outcome.code == 2
    assert outcome.err.endswith("give --replace-bn groupnorm\n")
    assert call("training.py", *flags, "--replace-bn", "groupnorm").code == 0


# Epsilon ------------------------------------------------------------------------------------

#: noise multiplier, sample rate, steps, delta, the best order, and ε by the integral below.
EPSILONS = [
    (1.1, 0.01, 1000, 1e-5, 9.6, 1.71177009),
    (0.16, 1.0, 1, 1e-5, 1.8, 48.00174328),
    (0.8, 0.1, 10, 1e-6, 3.5, 6.39487745),
    (4.0, 1.0, 100, 1e-5, 2.8, 14.13222616),
    (2.0, 0.02, 500, 1e-7, 20.0, 1.28120020),
]


def epsilon_by_integral(s, q, steps, delta, order):
    """Rényi divergence of the subsampled Gaussian by quadrature, turned into ε.

    Mironov et al. (2019): E over x ~ N(0, s²) of ((1 − q) + q exp((2x − 1) / 2s²))^order;
    conversion of Balle et al. (2020), theorem 21.
    """

    def density(x):
        ratio = np.logaddexp(
            math.log1p(-q) if q < 1 else -math.inf, math.log(q) + (2 * x - 1) / (2 * s * s)
        )
        return math.exp(-x * x / (2 * s * s) - math.log(s * math.sqrt(2 * math.pi)) + order * ratio)

    moment, _ = quad(
        density, -40 * s, order + 40 * s, points=[0, 1, order], limit=2000, epsabs=0, epsrel=1e-10
    )
    divergence = steps * math.log(moment) / (order - 1)
    return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@pytest.mark.parametrize(("s", "q", "steps", "delta", "order", "constant"), EPSILONS)
def test_epsilon_equals_an_independent_computation(s, q, steps, delta, order, constant):
    assert epsilon_by_integral(s, q, steps, delta, order) == pytest.approx(constant, abs=1e-7)
    assert epsilon(s, q, steps, delta) == pytest.approx(constant, abs=1e-7)


def test_epsilon_of_one_full_batch_by_the_closed_form():
    """q = 1: order α has the divergence α / 2s²; the bound is the lowest over all orders."""
    for s in (0.05, 1.0, 30.0, 300.0):
        orders = 1 + np.logspace(-3, 4, 200_000)
        bounds = orders / (2 * s * s) + np.log1p(-1 / orders)
        bounds -= np.log(1e-5 * orders) / (orders - 1)
        assert bounds.min() - 1e-9 <= epsilon(s, 1.0, 1, 1e-5) <= 1.02 * bounds.min() + 0.01


def test_epsilon_at_the_edges():
    for multiplier in (0.0, 1e-200, 1e-160):
        assert epsilon(multiplier, 1.0, 1, 1e-5) == math.inf
    assert epsilon(1e-11, 1.0, 1, 1e-5) > 1e20
    assert epsilon(2000.0, 1.0, 1, 1e-3) == 0.0  # never below


def test_what_buys_privacy_and_what_does_not():
    base = epsilon(1.0, 0.1, 10, 1e-5)
    assert epsilon(2.0, 0.1, 10, 1e-5) < base < epsilon(1.0, 0.2, 10, 1e-5)
    assert base < epsilon(1.0, 0.1, 20, 1e-5) < 2 * base
    assert epsilon(1.0, 0.1, 10, 1e-7) > base


# Through the scripts ------------------------------------------------------------------------


def test_a_private_step_is_recorded_said_and_told(tmp_path):
    flags = ("-a", "convnet", "-b", "4", "--replace-bn", "groupnorm", "--with-control")
    private = (
        "--enable-dp", "--dp-mode", "per-sample", "--sigma", "0.275", "-C", "1", "--dp-steps",
        "1000", "--sample-rate", "0.01", "--delta", "1e-5",
    )  # fmt: skip
    path = capture_photos(tmp_path, *flags, *private)
    checkpoint = load(str(path))
    record = target_from_checkpoint(checkpoint).protection
    assert record.noise_multiplier == pytest.approx(1.1)  # 0.275 · 4 / 1
    assert record.epsilon == pytest.approx(1.71177009)
    assert (record.mode, record.sigma, record.clip) == ("per-sample", 0.275, 1.0)
    assert (record.delta, record.steps, record.sample_rate) == (1e-5, 1000, 0.01)
    norms = checkpoint["protection_norms"]
    assert norms["samples"].shape == (4,)
    assert norms["sent"] == pytest.approx(norm(checkpoint["target_gradient"]))
    assert norms["clipped"] <= 1 < norms["samples"].min()
    # The noise is nearly all of what is sent, of the control too, and not the same noise.
    count = sum(g.numel() for g in checkpoint["target_gradient"])
    other = checkpoint["control"]["target_gradient"]
    for sent in (checkpoint["target_gradient"], other):
        assert norm(sent) == pytest.approx(0.275 * count**0.5, rel=0.02)
    assert not torch.equal(checkpoint["target_gradient"][0], other[0])
    (log,) = tmp_path.glob("*.log")
    for text in (
        "one sample, highest", "4 of 4 samples clipped", "noise multiplier 1.1: epsilon 1.712",
        "the noise is drawn from an ordinary generator", "4 BatchNorm layers replaced by groupnorm",
    ):  # fmt: skip
        assert text in log.read_text()
    result, folder = attack(tmp_path, path, "--epochs", 2, "--metric", "--BN", 0)
    assert result["target"]["protection"]["epsilon"] == record.epsilon
    assert result["target"]["replace_bn"] == "groupnorm"
    assert "other gradient" in result["controls"]
    told = (folder / "log.txt").read_text()
    assert (
        "the client's protection: per-sample, clipped to 1, noise with standard deviation 0.275"
        in told
    )
    assert "epsilon 1.712 at delta 1e-05 over 1000 step(s)" in told


def test_clipping_alone_is_no_privacy(tmp_path):
    path = capture_photos(
        tmp_path, "-a", "convnet", "-b", "4", "--model-eval", "--upload-bn", "--enable-dp",
        "--dp-mode", "per-sample", "-C", "0.5",
    )  # fmt: skip
    record = target_from_checkpoint(load(str(path))).protection
    assert (record.epsilon, record.noise_multiplier, record.sigma) == (None, 0.0, 0.0)
    (log,) = tmp_path.glob("*.log")
    assert "without noise epsilon is infinite" in log.read_text()
    assert "the BatchNorm statistics sent with it are not protected" in log.read_text()
    assert "as a whole carries no guarantee" in log.read_text()
    out = succeed(
        "run.py",
        "--root",
        tmp_path,
        "--checkpoint",
        path,
        "--lr",
        0.1,
        "--epochs",
        1,
        "--labels",
        "0,1,2,3",
    ).out
    assert "without noise epsilon is infinite" in out
    assert "the BatchNorm statistics sent with it are not protected" in out


def test_what_epsilon_does_not_cover_is_said_by_both_sides(tmp_path):
    """Uploaded statistics, under the scores too, running ones of the weights, and a sample rate
    that is not the batch's."""
    model = build_model("convnet", 3, (3, 16, 16))
    private = (
        "--enable-dp", "--dp-mode", "per-sample", "--sigma", "1", "-C", "1", "--model-eval",
        "--sample-rate", "0.01",
    )  # fmt: skip
    flags = (
        "--data-name", "folder", "--data", image_folder(tmp_path / "pictures"), "--image-size",
        "16", "-a", "convnet", "-b", "3", "--results", tmp_path, *private,
    )  # fmt: skip
    learned = "the running statistics of BatchNorm in the network are not covered"
    out = succeed("training.py", *flags, "--dry-run").out
    assert learned not in out  # no image has made them
    assert "--sample-rate 0.01, but the batch is 3 of 12 images, 0.25: epsilon is" in out
    for rate in ("0.25", "1"):
        out = succeed("training.py", *flags, "--sample-rate", rate, "--dry-run").out
        assert "but the batch is" not in out
    model[1].running_mean += 0.1
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    more = ("--pretrained", tmp_path / "weights.pth", "--outlayer-state", "keep", "--upload-bn")
    out = succeed("training.py", *flags, *more).out
    assert learned in out
    (path,) = tmp_path.glob("*-checkpoint.pth.tar")
    out = succeed(
        "run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1, "--metric",
        "--no-controls",
    ).out  # fmt: skip
    plan, scores = out.split("paired by assignment")
    for part in (plan, scores):
        assert "epsilon" in part
        assert learned in part
        assert "the BatchNorm statistics sent with it are not protected" in part


@pytest.mark.usefixtures("in_two_processes")
def test_samples_clipped_in_two_processes(captured):
    flags = (
        "-a", "lenet", "-b", "5", "--enable-dp", "--dp-mode", "per-sample", "--sigma", "0.1",
        "-C", "2", "--with-control", "--noise-seed", "3",
    )  # fmt: skip
    alone, shared = (load(str(captured(*flags, "--nproc", n))) for n in ("1", "2"))
    pairs = [(alone["target_gradient"], shared["target_gradient"])]
    pairs += [(alone["control"]["target_gradient"], shared["control"]["target_gradient"])]
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    norms = [of["protection_norms"]["samples"] for of in (alone, shared)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)


def test_noise_under_an_epsilon_is_another_every_time(tmp_path):
    """Not of --seed, which draws the weights that the attacker has as well; nor twice the same."""
    flags = (
        "-a", "lenet", "-b", "3", "--enable-dp", "--dp-mode", "per-sample", "--sigma", "0.5",
        "-C", "1",
    )  # fmt: skip
    seeded = ("--noise-seed", "0")
    sent = [
        load(str(capture_photos(tmp_path / str(i), *flags, *extra)))["target_gradient"][0]
        for i, extra in enumerate(((), (), seeded, seeded, ("--noise-seed", "1")))
    ]
    by_seed = [torch.equal(a, b) for a, b in zip(sent, sent[1:], strict=False)]
    assert by_seed == [False, False, True, False]
    assert "whoever knows --noise-seed" in next((tmp_path / "2").glob("*.log")).read_text()


@pytest.mark.parametrize("seed", [0, 3])
def test_the_clients_noise_is_not_the_attackers(seed):
    """Under --dp-mode batch both come of a seed that may be the same number."""
    flags = ["--data-name", "photos", "--enable-dp", "--sigma", "1", "--seed", str(seed)]
    settings = settings_from(parser().parse_args(flags))
    _, client = protection_of(settings)
    attacker = noise_generator(seed, torch.device("cpu"))
    drawn = [torch.randn(200_000, generator=generator) for generator in (client, attacker)]
    assert drawn[0].dot(drawn[1]).abs() / 200_000 < 0.01
    again = torch.randn(200_000, generator=protection_of(settings)[1])
    assert torch.equal(again, drawn[0])
    assert torch.equal(
        initial_images(seed, 1, (1, 2, 2), torch.float32),
        torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(seed)),
    )


def test_streams_of_different_seeds_or_purposes_differ():
    numbers = {
        torch.randint(2**62, (), generator=stream(purpose, seed)).item()
        for purpose in ("a", "b")
        for seed in (0, 1, 2**31 - 1)
    }
    assert len(numbers) == 6


def test_labels_of_clipped_samples_are_said_to_be_rough(tmp_path):
    flags = ("-a", "resnet18", "-b", "12", "--distinct-labels", "2", "--target-idx", "1")
    private = ("--enable-dp", "--dp-mode", "per-sample", "-C", "0.5", "--model-eval")
    path = capture_photos(tmp_path, *flags, *private)
    outcome = succeed(
        "run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1,
        "--pseudo-label-init", "from_grads",
    )  # fmt: skip
    assert "every sample was clipped by a factor of its own" in outcome.out


# GroupNorm for BatchNorm --------------------------------------------------------------------


def test_group_norm_takes_the_place_of_every_batchnorm():
    model = build_model("mobilenet_v2", 8, (3, 32, 32))
    layers = batchnorm_layers(model)
    scales = [torch.rand_like(layer.weight) for layer in layers]
    for layer, scale in zip(layers, scales, strict=True):
        layer.weight.data = scale
    assert replace_batchnorm(model, "groupnorm") == len(layers) == 52
    found = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert not batchnorm_layers(model)
    for layer, scale in zip(found, scales, strict=True):
        assert torch.equal(layer.weight, scale)
        assert layer.num_channels / layer.num_groups >= 2
    own = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).double().eval()
    own[0].bias, own[1].weight.requires_grad = None, False
    replace_batchnorm(own, "groupnorm")
    assert (own[0].weight.dtype, own[0].bias, own[0].training) == (torch.float64, None, False)
    assert own[1].bias.requires_grad
    assert not own[1].weight.requires_grad
    on_meta = nn.Sequential(nn.BatchNorm2d(4, device="meta"))
    replace_batchnorm(on_meta, "groupnorm")
    assert on_meta[0].weight.is_meta
    plain = nn.Sequential(nn.BatchNorm1d(7, affine=False))
    assert replace_batchnorm(plain, "groupnorm") == 1
    assert (plain[0].num_groups, plain[0].weight) == (1, None)


def test_a_network_with_group_norm_comes_back_from_its_checkpoint(captured):
    checkpoint = load(str(captured("-a", "convnet", "-b", "4", "--replace-bn", "groupnorm")))
    model = model_of(target_from_checkpoint(checkpoint))
    x, y = checkpoint["x_true"], checkpoint["y_true"]
    found = batch_gradient(model, x, y, ClientLoss(True))
    for a, b in zip(found, checkpoint["target_gradient"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    together, alone = model(x), torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    target = target_from_checkpoint(checkpoint)
    assert target.network == "convnet with groupnorm"


def test_weights_go_on_with_group_norm(tmp_path):
    state = build_model("convnet", 8, (3, 32, 32)).state_dict()
    state["1.weight"] += 0.5
    torch.save(state, tmp_path / "convnet.pth")
    path = capture_photos(
        tmp_path, "-a", "convnet", "-b", "2", "--pretrained", tmp_path / "convnet.pth",
        "--replace-bn", "groupnorm",
    )  # fmt: skip
    stored = load(str(path))["state_dict"]
    assert torch.equal(stored["1.weight"], state["1.weight"])
    assert not [key for key in stored if "running" in key]
    (log,) = tmp_path.glob("*.log")
    assert "the running statistics of the weights dropped" in log.read_text()
