"""The client's run: what it refuses, and what it does not mistake for a bad input."""

import pytest
import torch
from torch import nn

from models.build import SMALL_NETWORKS, build_model
from models.gradient import ClientLoss, batch_gradient, whole_batch_gradient
from tests.support import call, photos, succeed
from train import client, local
from train.flags import parser
from train.settings import settings_from

FLAGS = ("--data-name", "photos", "-a", "lenet", "-b", 2, "--dry-run")


def test_a_network_that_cannot_process_the_images_is_refused(monkeypatch):
    monkeypatch.setitem(SMALL_NETWORKS, "lenet", lambda num_classes, shape: nn.Linear(5, 8))
    outcome = call("training.py", *FLAGS)
    assert outcome.code == 2
    assert outcome.err.startswith("error: --arch lenet: cannot process images (3, 32, 32): ")
    assert "mat1 and mat2 shapes cannot be multiplied" in outcome.err
    assert "settings\n" not in outcome.out


def test_a_bug_elsewhere_is_not_blamed_on_the_network(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(local, "whole_batch_gradient", broken)
    with pytest.raises(RuntimeError, match="^mat1 and mat2"):
        call("training.py", *FLAGS)


def test_trying_the_network_changes_nothing_that_is_sent():
    """Neither its buffers nor any stream of random numbers."""
    torch.manual_seed(0)
    model = build_model("convnet", 8, (3, 32, 32)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    settings = settings_from(parser().parse_args(["--data-name", "photos", "-a", "convnet"]))
    client.check_processes(settings, model, photos(3, 32)[0], 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_whole_batch_gradient_of_one_process_is_the_batch_gradient():
    torch.manual_seed(0)
    model, (x, y) = build_model("convnet", 8, (3, 32, 32)), photos(3, 32)
    loss = ClientLoss(True, 0.1)
    sent = whole_batch_gradient(model, x, y, loss, moments=True)
    for a, b in zip(sent.gradient, batch_gradient(model, x, y, loss), strict=True):
        assert torch.equal(a, b)
    assert len(sent.bn_mean) == len(sent.bn_var) == 4
    assert whole_batch_gradient(model, x, y, loss).bn_mean is None


def test_a_network_without_batchnorm_has_no_statistics_to_send():
    model, (x, y) = build_model("lenet", 8, (3, 32, 32)), photos(2, 32)
    assert whole_batch_gradient(model, x, y, ClientLoss(True), moments=True).bn_mean is None


def test_a_dry_run_says_what_it_would_write(tmp_path):
    outcome = succeed("training.py", *FLAGS, "--results", tmp_path)
    name = "idtest_lenet_random_photos_b2_i0-checkpoint.pth.tar"
    assert f"dry run: would write {tmp_path / name}" in outcome.out
    assert not list(tmp_path.iterdir())
