"""Finite differences of the gradient: what they come close to, what they leave alone and refuse."""

import copy

import pytest
import torch

from inversion.first_order import finite_differences
from inversion.objective import Objective
from inversion.pixel_gradient import exact, pixel_gradient_of, prior_only
from inversion.settings import AttackSettings, Loop, Weights
from models.build import build_model
from models.local import LocalSteps
from tests.support import attack, cosine, smooth_network, succeed, target_of
from tests.test_defences import small_case
from tests.test_user_network import bce_objective
from utils.errors import InputError

PRIORS = Weights(0.7, {"tv": 0.02, "bn": 0.05, "norm": -0.01}, {"tv": 0.001})
SMOOTH = Weights(0.7, {"tv": 0.02, "norm": -0.01})


def case(name, *, train_mode=True, **options):
    """The objective of a smooth network in float64, and other images."""
    torch.manual_seed(1)
    size = 16 if name == "lenet" else 8
    model = build_model("lenet", 4, (3, size, size)).double() if name == "lenet" else None
    model = smooth_network() if model is None else model
    x_true, x = torch.randn(2, 5, 3, size, size, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 1])
    target = target_of(model, x_true, y, train_mode=train_mode, num_classes=4)
    weights = SMOOTH if name == "lenet" else PRIORS
    return Objective(model, target, y, **{"weights": weights, **options}), x


CASES = {
    "lenet": ("lenet", {}),
    "L2": ("lenet", {"distance_name": "L2"}),
    "train": ("bn", {"bn_source": "batch"}),
    "eval": ("bn", {"train_mode": False}),
    "forced": ("bn", {"bn_coupling": "forced"}),
}


@pytest.mark.parametrize("key", CASES)
def test_the_quotient_comes_close_to_the_derivative_where_all_is_smooth(key):
    """Its error falls in proportion to the step; losses are exact; the weights keep all bits."""
    name, options = CASES[key]
    objective, x = case(name, **options)
    before = copy.deepcopy(objective.model.state_dict())
    losses, true = exact(objective, x, 0.5)
    _, of_priors = prior_only(objective, x, 0.5)
    errors = []
    for step in (1e-4, 1e-5):
        found, derivative = finite_differences(objective, x, 0.5, step=step)
        assert found.floats().total == pytest.approx(losses.floats().total, rel=1e-12)
        assert cosine(derivative - of_priors, true - of_priors) > 0.9999
        errors.append((derivative - true).norm().item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert all(
        torch.equal(value, before[key]) for key, value in objective.model.state_dict().items()
    )
    assert all(p.requires_grad and p.grad is None for p in objective.model.parameters())


def test_forced_statistics_hold_their_scale_while_the_weights_move(monkeypatch):
    """What moves with the weights instead gives another derivative: the test above would see it."""
    objective, x = case("bn", bn_coupling="forced", weights=Weights())
    _, true = exact(objective, x)
    for held in objective._forced:
        held.weight.mul_(1.001)
    _, found = finite_differences(objective, x, step=1e-6)
    assert (found - true).norm() < 1e-2 * true.norm()
    assert (found - true).norm() > 1e-6 * true.norm()


@pytest.mark.parametrize("kind", ["topk", "percentile", "bce"])
def test_it_comes_close_for_what_a_defence_let_through_and_for_other_labels(kind):
    if kind == "bce":
        objective = bce_objective(train_mode=True)[1]
        x = torch.rand(3, 3, 12, 8, generator=torch.Generator().manual_seed(1)).double()
    else:
        objective, x, _ = small_case(kind, "sim")
    losses, true = exact(objective, x)
    found, derivative = finite_differences(objective, x, step=1e-6)
    assert found.floats().total == pytest.approx(losses.floats().total, rel=1e-12)
    assert cosine(derivative, true) > 0.9999


def test_all_is_zero_at_the_truth():
    """v is 0 there, so nothing says where the weights would have to move."""
    torch.manual_seed(1)
    model, x = smooth_network(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    target = target_of(model, x, torch.tensor([0, 1, 2]), num_classes=4)
    objective = Objective(model, target, torch.tensor([0, 1, 2]), Weights(), distance_name="L2")
    losses, derivative = finite_differences(objective, x)
    assert losses.gradient < 1e-20
    assert derivative.abs().max() < 1e-10


def test_a_network_without_second_derivatives_can_be_attacked():
    """Its operation's own backward pass is hidden from autograd."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sigmoid()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, v):
            (x,) = ctx.saved_tensors
            return v * x.sigmoid() * (1 - x.sigmoid())

    class Sigmoid(torch.nn.Module):
        def forward(self, x):
            return Once.apply(x)

    objective, x = case("lenet")
    _, true = exact(objective, x)
    for place in (1, 3, 5):
        objective.model[place] = Sigmoid()
    assert cosine(finite_differences(objective, x, step=1e-5)[1], true) > 0.9999


def test_a_weight_that_two_layers_share_moves_in_both():
    torch.manual_seed(1)
    layers = [torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]
    head = (torch.nn.Flatten(), torch.nn.Linear(192, 4))
    between = (layers[0], torch.nn.Sigmoid(), layers[1], torch.nn.Sigmoid())
    model = torch.nn.Sequential(*between, *head).double()
    model[2].weight = model[0].weight
    x_true, x = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 1])
    target = target_of(model, x_true, y, num_classes=4)
    objective = Objective(model, target, y, Weights(), distance_name="L2")
    assert cosine(finite_differences(objective, x, step=1e-6)[1], exact(objective, x)[1]) > 0.99999


def test_what_it_cannot_do_is_refused():
    objective, x = case("bn", bn_grad="detached")
    with pytest.raises(InputError, match="take bn_grad exact"):
        finite_differences(objective, x)
    objective, x = case("bn")
    objective._unrolled = LocalSteps(2, 0.1)
    with pytest.raises(InputError, match="take the update model mean"):
        finite_differences(objective, x)


def test_the_settings_decide_the_step():
    objective, x = case("lenet")
    settings = AttackSettings(
        Weights(), Loop(1, 0.1), pixel_gradient="finite-differences", difference_step=0.02
    )
    found = pixel_gradient_of(settings)(objective, x, 0.5)[1]
    assert torch.equal(found, finite_differences(objective, x, 0.5, step=0.02)[1])
    assert not torch.equal(found, finite_differences(objective, x, 0.5)[1])


def test_a_run_says_and_records_how_it_was_done(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "2")
    flags = ("--pixel-gradient", "finite-differences", "--epochs", 3, "--difference-step", 1e-4)
    result, _ = attack(tmp_path, path, *flags)
    assert result["settings"]["pixel_gradient"] == "finite-differences"
    assert result["settings"]["difference_step"] == 1e-4
    line = [*map(str, flags), "--lr", "0.1", "--root", tmp_path, "--checkpoint", path, "--dry-run"]
    said = succeed("run.py", *line).out
    assert (
        "finite differences of the gradient, which are not exact (weights moved by 0.0001" in said
    )
