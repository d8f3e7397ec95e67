"""Clipping and noise: what is sent, what is said of it, and what the attacker is told."""

import math

import pytest
import torch

from models.target import Protection, target_from_checkpoint
from tests.support import attack, capture_photos, succeed
from train.privacy import protect_batch
from utils.checkpoint import load


def norm(gradient):
    return math.sqrt(sum(g.double().square().sum().item() for g in gradient))


@pytest.mark.parametrize("clip", [0.5, 1e3, None])
def test_clipping_keeps_the_direction(clip):
    gradient = [torch.randn(30, 4), torch.randn(7)]
    before = [g.clone() for g in gradient]
    sent = protect_batch(gradient, 0.0, clip, torch.Generator())
    assert sent.norm == pytest.approx(norm(gradient), rel=1e-6)
    expected = sent.norm if clip is None else min(clip, sent.norm)
    assert norm(sent.gradient) == pytest.approx(expected, rel=1e-6)
    assert sent.clipped_norm == pytest.approx(sent.sent_norm)
    for g, s in zip(gradient, sent.gradient, strict=True):
        torch.testing.assert_close(s, g * expected / sent.norm)
    assert all(torch.equal(a, b) for a, b in zip(gradient, before, strict=True))


def test_a_zero_gradient_is_left_alone():
    sent = protect_batch([torch.zeros(3)], 0.0, 0.5, torch.Generator())
    assert torch.equal(sent.gradient[0], torch.zeros(3))


def test_noise_has_the_deviation_asked_for():
    sent = protect_batch([torch.zeros(200, 200)], 0.3, 0.5, torch.Generator().manual_seed(0))
    assert sent.gradient[0].std().item() == pytest.approx(0.3, rel=0.02)
    assert sent.gradient[0].mean().item() == pytest.approx(0, abs=0.01)
    again = protect_batch([torch.zeros(200, 200)], 0.3, 0.5, torch.Generator().manual_seed(0))
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
    assert "BatchNorm statistics beside it are sent without any protection" in log.read_text()
    result, _ = attack(tmp_path, path, "--epochs", 2, "--metric")
    assert result["metrics"]["mean"]["psnr"] > 0


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
