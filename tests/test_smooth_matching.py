"""Matching of activations that say too little of an image, with a preference for smooth ones."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from inversion.layerwise.decoder import linear_decoder
from inversion.layerwise.front import Front
from inversion.layerwise.smooth_matching import (
    SmoothMatching,
    match_smoothly,
    total_variation,
    whitening,
)

LOW, HIGH = -torch.ones(3, 1, 1), torch.ones(3, 1, 1)
HOW = SmoothMatching(60, 0.1, 0.5)


def pooled():
    """A network whose pooling loses pixels."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return Front(nn.Sequential(*layers, nn.Linear(512, 7)), ["_2", "_4"])


def smooth_images(count=2, size=16):
    """Images of one wave each, of another direction per colour."""
    steps = torch.arange(float(size)) * 2 * math.pi / size
    waves = [(steps[:, None] * i + steps * j).sin() for i, j in ((1, 0), (0, 1), (1, 1))]
    return torch.stack([0.6 * (1 - 0.3 * n) * torch.stack(waves) for n in range(count)])


def noise(count=20, size=16, seed=1):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def matched(front, x, start, how=HOW, whitened=None, **options):
    targets = {"_2": front(x.double())["_2"]}
    weights = whitening(front, noise()) if whitened is None else whitened
    return match_smoothly(front, targets, LOW, HIGH, start, weights, how, **options)


def test_whitened_maps_have_the_identity_as_covariance():
    front, x = pooled(), noise().double()
    found = whitening(front, x)
    assert list(found) == ["_2"]  # a vector has no positions
    maps = front(x)["_2"]
    rows = maps.transpose(0, 1).flatten(1)
    assert torch.allclose(found["_2"].mean, rows.mean(1))
    covariance = torch.from_numpy(np.cov(rows.numpy(), bias=True))
    ridge = 0.05 * covariance.trace() / 8 * torch.eye(8, dtype=torch.float64)
    weights = found["_2"].weights
    identity = torch.eye(8, dtype=torch.float64)
    assert torch.allclose(weights @ (covariance + ridge) @ weights.T, identity, atol=1e-9)
    by_hand = torch.stack([weights @ maps[0, :, i, 3] for i in range(8)], 1)
    assert torch.allclose(found["_2"].of(maps)[0, :, :, 3], by_hand)


def test_a_channel_that_never_varies_does_no_harm():
    front = Front(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), ["_1"])
    constant = whitening(front, torch.zeros(3, 3, 4, 4))["_1"]
    assert constant.weights.isfinite().all()


def test_total_variation_by_loops():
    x = (noise(2, 5) + 1) / 2
    mixed = [x.sum(1) / 3**0.5, 2 * (x[:, 0] - x[:, 1]) / 2**0.5]
    mixed.append(2 * (x[:, 0] + x[:, 1] - 2 * x[:, 2]) / 6**0.5)
    for channels, planes in ((3, mixed), (1, [x[:, 0]])):
        found = total_variation(x[:, :channels])
        for n in range(2):
            total = 0.0
            for i in range(5):
                for j in range(5):
                    squares = 0.0
                    for plane in planes:
                        right = plane[n, i, j + 1] - plane[n, i, j] if j < 4 else 0.0
                        lower = plane[n, i + 1, j] - plane[n, i, j] if i < 4 else 0.0
                        squares += right**2 + lower**2
                    total += squares**0.5
            assert found[n].item() == pytest.approx(float(total / 25), abs=1e-4)


def test_smooth_images_come_out_where_a_pooling_lost_pixels():
    front, x = pooled(), smooth_images()
    start = 0.5 * noise(2, seed=2)
    found = matched(front, x, start, SmoothMatching(150, 0.1, 0.5))
    rough = matched(front, x, start, SmoothMatching(150, 0.1, 0.0))
    errors = [(of.images - x).square().mean().sqrt() for of in (found, rough)]
    assert errors[0] < 0.6 * errors[1]
    assert found.images.dtype == torch.float64
    assert found.images.abs().max() <= 1


def test_the_residual_is_that_of_the_images_unweighted():
    front, x = pooled(), smooth_images()
    found = matched(front, x, 0.5 * noise(2, seed=2))
    values, targets = front(found.images)["_2"], front(x.double())["_2"]
    expected = (values - targets).flatten(1).norm(dim=1) / targets.flatten(1).norm(dim=1)
    assert torch.allclose(found.residual, expected, rtol=1e-9)


def test_images_do_not_depend_on_each_other():
    front, x, start = pooled(), smooth_images(), 0.5 * noise(2, seed=2)
    weights = whitening(front, noise())
    together = matched(front, x, start, whitened=weights)
    alone = matched(front, x[1:], start[1:], whitened=weights)
    assert torch.allclose(together.images[1:], alone.images, atol=1e-3)


def test_it_works_without_a_whitening():
    front, x, start = pooled(), smooth_images(), 0.5 * noise(2, seed=2)
    begun = matched(front, x, start, SmoothMatching(0, 0.1, 0.5), {})
    found = matched(front, x, start, whitened={})
    assert torch.allclose(begun.images, start.double(), atol=1e-6)
    assert (found.residual < 0.3 * begun.residual).all()


@pytest.mark.parametrize("shape", [(15, 17), (16, 10)])
def test_sides_may_be_odd(shape):
    torch.manual_seed(0)
    front = Front(nn.Sequential(nn.Conv2d(3, 24, 3, padding=1)), ["_0"])
    x = noise(1, 20)[:, :, : shape[0], : shape[1]] * 0.5
    targets = front(x.double())
    how = SmoothMatching(300, 0.1, 0.0)
    found = match_smoothly(front, targets, LOW, HIGH, torch.zeros_like(x), {}, how)
    assert (found.images - x).abs().max() < 0.02


def test_an_interruption_gives_no_worse_an_image_than_the_start():
    front, x = pooled(), smooth_images()
    good = x + 1e-3 * noise(2, seed=2)
    calls = []

    def after_three():
        calls.append(0)
        return len(calls) > 3

    stopped = matched(front, x, good, SmoothMatching(60, 0.5, 0.5), should_stop=after_three)
    assert len(calls) == 4
    begun = matched(front, x, good, should_stop=lambda: True)
    for found in (begun, stopped):  # the way to the frequencies and back rounds
        assert (found.images - good).abs().max() < 1e-6


def test_a_target_that_the_front_lacks_is_refused():
    with pytest.raises(ValueError, match="does not compute _9"):
        match_smoothly(pooled(), {"_9": noise(1)}, LOW, HIGH, noise(1), {}, HOW)


def test_the_decoder_sees_no_more_images_than_help(monkeypatch):
    monkeypatch.setattr("inversion.layerwise.decoder._WORK", 72**2 * 1000)
    front, public = Front(pooled()._module, ["_2"]), noise(100)
    runs = []
    for count in (100, 63):  # 1000 rows of 64 positions each: a fourth of them of 63 images
        generator = torch.Generator().manual_seed(0)
        x = public[:count]
        runs.append(linear_decoder(front, "_2", LOW, HIGH, x, ridge=0.1, generator=generator))
    assert torch.equal(runs[0].weights, runs[1].weights)
