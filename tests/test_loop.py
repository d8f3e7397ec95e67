"""The loop: what it does to images, and which losses it pairs them with."""

import math
from types import SimpleNamespace

import pytest
import torch

from inversion.objective import Losses
from inversion.optimise import OPTIMISERS, reconstruct
from inversion.restarts import Restarts, initial_images, noise_generator
from inversion.settings import Loop, Weights
from inversion.strategies import best
from utils.shard import ALONE

GOAL = torch.tensor([0.3, -0.2, 0.9, 0.0]).view(1, 1, 2, 2)


#: What a strategy asks of an objective beside its pixel gradient.
ALONE_OBJECTIVE = SimpleNamespace(batch_shard=ALONE)
ALONE_OBJECTIVE.afresh = lambda: ALONE_OBJECTIVE


def bowl(x, progress):
    """Losses and derivative of ‖x − GOAL‖²."""
    value = (x - GOAL).square().sum()
    return Losses(value, value, {"progress": torch.tensor(progress)}), 2 * (x - GOAL)


def anywhere(objective, x, progress):
    """The bowl as a strategy calls it."""
    return bowl(x, progress)


def start(seed=0):
    return initial_images(seed, 1, (1, 2, 2), torch.float32)


@pytest.mark.parametrize(
    ("optimiser", "signed", "steps", "near"),
    [("Adam", False, 400, 1e-3), ("Adam", True, 800, 3e-3), ("LBFGS", False, 20, 1e-5)],
)
def test_finds_the_minimum(optimiser, signed, steps, near):
    lr = 1.0 if optimiser == "LBFGS" else 0.1
    loop = Loop(steps, lr, optimiser, signed=signed, keep_best=True)
    result = reconstruct(bowl, start(), loop)
    assert (result.x - GOAL).abs().max() < near
    assert result.steps == steps
    assert result.stopped is None


def test_rate_falls_along_a_cosine():
    loop = Loop(100, 0.5)
    rates = [loop.rate(step) for step in range(101)]
    assert rates[0] == 0.5
    assert rates[50] == pytest.approx((0.5 + 1e-3) / 2)
    assert rates[100] == pytest.approx(1e-3)
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert {Loop(10, 1e-4).rate(step) for step in range(10)} == {1e-4}


def test_weights_decay_geometrically_from_first_to_last():
    weights = Weights(1.0, {"tv": 1e-2, "norm": -1.0}, {"tv": 1e-4})
    assert weights.at(0.0) == {"tv": 1e-2, "norm": -1.0}
    assert weights.at(0.5)["tv"] == pytest.approx(1e-3)
    assert weights.at(1.0)["tv"] == pytest.approx(1e-4)
    assert [Loop(5, 1.0).progress(step) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match="no prior"):
        Weights(priors={"beauty": 1.0})
    with pytest.raises(ValueError, match="two positive"):
        Weights(priors_end={"tv": 1.0})


def test_box_holds_and_the_start_is_inside():
    low, high = torch.full((1, 1, 1), -0.1), torch.full((1, 1, 1), 0.5)
    seen = []

    def watched(x, progress):
        seen.append((x.min().item(), x.max().item()))
        return bowl(x, progress)

    loop = Loop(100, 0.2, box=(low, high), noise=0.1)
    result = reconstruct(watched, 5 * start(), loop, generator=torch.Generator().manual_seed(0))
    assert min(a for a, _ in seen) >= -0.1 - 1e-7
    assert max(b for _, b in seen) <= 0.5 + 1e-7
    assert result.x[0, 0, 1, 0] == pytest.approx(0.5, abs=0.01)  # its goal, 0.9, lies outside


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_losses_belong_to_the_images_returned(keep_best, optimiser):
    loop = Loop(7, 0.7, optimiser, keep_best=keep_best)
    steps = []
    result = reconstruct(bowl, start(), loop, on_step=lambda *seen: steps.append(seen[1]))
    assert result.losses.gradient == pytest.approx(bowl(result.x, 0)[0].gradient.item(), rel=1e-6)
    if keep_best:
        assert result.losses.gradient <= min(losses.gradient for losses in steps)


def test_keep_best_returns_an_earlier_iterate_when_the_last_is_worse():
    """Steps of 1 along the sign overshoot a bowl at 0.3: the last images are not the best."""
    start_near = GOAL + 0.01
    kept = reconstruct(bowl, start_near, Loop(3, 1.0, signed=True, keep_best=True))
    last = reconstruct(bowl, start_near, Loop(3, 1.0, signed=True))
    assert torch.equal(kept.x, start_near)
    assert last.losses.gradient > kept.losses.gradient


def test_noise_comes_from_the_generator_and_scales_with_the_rate():
    flat = lambda x, progress: (Losses(x.sum() * 0, x.sum() * 0, {}), torch.zeros_like(x))  # noqa: E731
    big = torch.zeros(1, 1, 100, 100)
    loop = Loop(1, 0.5, noise=0.2)
    runs = [
        reconstruct(flat, big, loop, generator=torch.Generator().manual_seed(seed)).x
        for seed in (5, 5, 6)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[0].std().item() == pytest.approx(0.5 * 0.2, rel=0.05)


@pytest.mark.parametrize("bad", ["loss", "derivative"])
def test_a_loss_that_is_not_finite_ends_with_the_best_iterate(bad):
    calls = []

    def breaks(x, progress):
        losses, derivative = bowl(x, progress)
        calls.append(losses.gradient.item())
        if len(calls) == 6:
            if bad == "loss":
                losses = Losses(losses.total * math.nan, losses.gradient, losses.terms)
            else:
                derivative = derivative / 0
        return losses, derivative

    result = reconstruct(breaks, start(), Loop(50, 0.1))
    assert result.stopped == "not finite"
    assert result.steps == 5
    assert result.losses.gradient == pytest.approx(min(calls[:5]))
    assert bowl(result.x, 0)[0].gradient.item() == pytest.approx(min(calls[:5]))


def test_without_a_gradient_loss_the_total_decides():
    def no_gradient(x, progress):
        losses, derivative = bowl(x, progress)
        return Losses(losses.total, None, losses.terms), derivative

    start_near = GOAL + 0.01
    kept = reconstruct(no_gradient, start_near, Loop(3, 1.0, signed=True, keep_best=True))
    assert torch.equal(kept.x, start_near)
    assert kept.losses.gradient is None
    assert kept.losses.criterion == kept.losses.total > 0


def test_not_finite_at_once_returns_the_start():
    def broken(x, progress):
        return Losses(x.sum() * math.nan, x.sum() * math.nan, {}), x

    result = reconstruct(broken, start(), Loop(5, 0.1))
    assert torch.equal(result.x, start())
    assert math.isnan(result.losses.gradient)
    assert result.steps == 0


def test_a_wish_to_stop_is_granted_and_later_seeds_do_not_start():
    generators = [torch.Generator() for _ in range(3)]
    seen = []

    def on_step(index, step, losses, rate):
        seen.append((index, step))
        return (index, step) == (1, 2)

    starts = [start(s) for s in range(3)]
    restarts = Restarts(starts, generators, Loop(5, 0.1), on_step)
    outcome = best(ALONE_OBJECTIVE, anywhere, restarts)
    assert seen == [(0, s) for s in range(5)] + [(1, s) for s in range(3)]
    assert [run.stopped for run in outcome.runs] == [None, "interrupted"]
    assert outcome.runs[1].steps == 3


def test_the_seed_with_the_lowest_gradient_loss_wins():
    starts = [GOAL + 3, GOAL * math.nan, GOAL + 0.1, GOAL + 1]
    restarts = Restarts(starts, [torch.Generator() for _ in starts], Loop(1, 1e-6))
    outcome = best(ALONE_OBJECTIVE, anywhere, restarts)
    assert outcome.chosen == 2
    assert outcome.final is outcome.runs[2]
    assert outcome.runs[1].stopped == "not finite"


def test_initial_images_depend_on_seed_and_shape_alone():
    x = initial_images(3, 64, (3, 8, 8), torch.float32)
    assert torch.equal(x, initial_images(3, 64, (3, 8, 8), torch.float32))
    assert not torch.equal(x, initial_images(4, 64, (3, 8, 8), torch.float32))
    assert x.mean().abs() < 0.05
    assert x.std().item() == pytest.approx(1, rel=0.05)


def test_noise_and_start_of_a_seed_are_different_streams():
    noise = torch.randn(1, 1, 2, 2, generator=noise_generator(7, torch.device("cpu")))
    assert not torch.equal(noise, start(7))
    same = torch.randn(1, 1, 2, 2, generator=noise_generator(7, torch.device("cpu")))
    assert torch.equal(noise, same)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="positive"):
        Loop(0, 0.1)
    with pytest.raises(ValueError, match="positive"):
        Loop(1, 0.0)
    for setting in ({"signed": True}, {"noise": 0.1}, {"box": (GOAL - 1, GOAL + 1)}):
        with pytest.raises(ValueError, match="L-BFGS"):
            Loop(1, 1.0, "LBFGS", **setting)
