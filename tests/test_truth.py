"""Truth in: the gradient distance and the exact BN prior vanish; elsewhere they do not."""

import pytest
import torch

from inversion.distances import joint_norm
from inversion.objective import Objective
from inversion.settings import Weights
from models.batchnorm import batchnorm_layers
from models.build import build_model, init_head
from models.target import model_of
from tests.support import photos, target_of

SIZES = {"alexnet": 64, "efficientnet_b0": 64}


@pytest.mark.parametrize("train_mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arch", ["lenet", "convnet", "resnet18", "alexnet", "efficientnet_b0"])
def test_truth_has_no_distance(arch, train_mode):
    size = SIZES.get(arch, 32)
    x, y = photos(4, size)
    torch.manual_seed(0)
    client = build_model(arch, 8, (3, size, size))
    init_head(client, "kaiming_uniform")
    client.train()  # dropout and stochastic depth would draw masks if they were followed
    for layer in batchnorm_layers(client):
        layer.momentum = None  # one forward pass sets the running statistics of real use
    client(photos(8, size, target_idx=1)[0])
    target = target_of(client, x, y, train_mode=train_mode, arch=arch)
    attacker = model_of(target).train()
    has_bn = bool(batchnorm_layers(attacker))
    for distance in ("sim", "L2"):
        weights = Weights(priors={"bn": 1.0} if has_bn else {})
        objective = Objective(
            attacker, target, y, weights, distance_name=distance, bn_source="batch"
        )
        losses = objective(x).floats()
        scale = joint_norm(target.gradient).item() ** 2 if distance == "L2" else 1.0
        assert losses.gradient <= 1e-6 * scale
        if has_bn:
            assert losses.terms["bn"] <= 1e-5
        elsewhere = objective(x.flip(0)).floats()
        assert elsewhere.gradient > 1e-4 * scale
    if has_bn and train_mode:
        assert objective(x * 0.5).floats().terms["bn"] > 1e-2


@pytest.mark.parametrize("train_mode", [True, False], ids=["train", "eval"])
def test_the_model_is_left_as_it_was(train_mode):
    x, y = photos(4, 32)
    model = build_model("resnet18", 8, (3, 32, 32)).train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    tracking = [layer.track_running_stats for layer in batchnorm_layers(model)]
    target = target_of(model, x, y, train_mode=train_mode, arch="resnet18")
    Objective(model, target, y, Weights(priors={"bn": 1.0}), bn_source="batch")(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [layer.track_running_stats for layer in batchnorm_layers(model)] == tracking
    assert not any(layer._forward_pre_hooks for layer in batchnorm_layers(model))
