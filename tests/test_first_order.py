"""Finite differences of the gradient: what they come close to, what they leave alone and refuse."""

import copy

import pytest
import torch

from inversion.audit.plan import plan
from inversion.first_order import finite_differences
from inversion.objective import Objective
from inversion.pixel_gradient import exact, pixel_gradient_of, prior_only
from inversion.settings import AttackSettings, Loop, Weights
from models.build import build_model
from models.local import LocalSteps
from tests.support import attack, cosine, photos, smooth_network, target_of
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
    """Its error falls in proportion to the step; losses are the exact ones; weights keep all bits."""
    name, options = CASES[key]
    objective, x = case(name, **options)
    before = copy.deepcopy(objective.model.state_dict())
    losses, true = exact(objective, x, 0.5)
    _, of_priors = prior_only(objective, x, 0.5)
    errors = []
    for step in (1e-4, 1e-5):
        found, derivative = finite_differences(objective, x, 0.5, step=step)
        assert found.floats() == pytest.approx(losses.floats())
        assert cosine(derivative - of_priors, true - of_priors) > 0.9999
        errors.append((derivative - true).norm().item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert all(torch.equal(value, before[key]) for key, value in objective.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in objective.model.parameters())
