"""Number formats: what they change, what they leave, and what is refused."""

from dataclasses import replace

import pytest
import torch

from inversion.audit.inputs import make_case
from inversion.pixel_gradient import PIXEL_GRADIENTS, pixel_gradient_of
from inversion.precision import tensorfloat32
from inversion.restarts import initial_images
from inversion.settings import FINITE_DIFFERENCES, AttackSettings, Loop, Weights
from inversion.settings import PIXEL_GRADIENTS as NAMES
from tests.support import attack, cosine, photos, smooth_network, target_of
from utils.device import forbid_tensorfloat32
from utils.errors import InputError
from utils.shard import ALONE

WEIGHTS = Weights(priors={"tv": 1e-2, "bn": 1e-3})


def case_of(model, settings):
    x, y = photos(4, 16, 10)
    dtype = next(model.parameters()).dtype
    target = target_of(model, x.to(dtype), y % 4, num_classes=4, train_mode=False)
    return make_case(settings, model, target, y % 4, None, torch.device("cpu"), ALONE)


def smooth(dtype):
    torch.manual_seed(0)
    return smooth_network().to(dtype)


@pytest.mark.parametrize("name", [n for n in NAMES if n != FINITE_DIFFERENCES])
def test_bfloat16_rounds_the_networks_passes_alone(name):
    """The derivative stays float32, and near; TV and images are not rounded."""
    settings = AttackSettings(WEIGHTS, Loop(9, 0.1), pixel_gradient=name, precision="bf16")
    case = case_of(smooth(torch.float32), settings)
    x = initial_images(0, 4, (3, 16, 16), torch.float32)
    losses, derivative = pixel_gradient_of(settings)(case.objective, x, 0.0)
    exactly, true = PIXEL_GRADIENTS[name](case.objective, x, 0.0)
    assert derivative.dtype == losses.total.dtype == torch.float32
    assert not torch.equal(derivative, true)
    assert cosine(derivative, true) > 0.99
    assert losses.terms["tv"] == exactly.terms["tv"]
    plainly = pixel_gradient_of(replace(settings, precision="float32"))
    assert torch.equal(plainly(case.objective, x, 0.0)[1], true)


def test_tensorfloat32_is_off_but_where_it_is_asked_for():
    places = (torch.backends.cudnn, torch.backends.cuda.matmul)
    forbid_tensorfloat32()
    with tensorfloat32():
        assert all(place.allow_tf32 for place in places)
    assert not any(place.allow_tf32 for place in places)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_format_that_would_round_nothing_is_refused(precision):
    settings = AttackSettings(WEIGHTS, Loop(9, 0.1), precision=precision)
    with pytest.raises(InputError, match=f"--precision {precision}: what was sent is float64"):
        case_of(smooth(torch.float64), settings)


def test_a_run_says_in_what_it_was_computed(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "2", "--image-size", "16")
    result, folder = attack(tmp_path, path, "--epochs", 2, "--precision", "bf16")
    assert result["settings"]["precision"] == "bf16"
    assert "passes are computed in bf16" in (folder / "log.txt").read_text()


def test_a_graph_of_a_learned_place_is_refused(captured, tmp_path, monkeypatch):
    """As on a GPU, where the device itself is no reason."""
    monkeypatch.setattr("inversion.audit.inputs.check_device", lambda *_: None)
    path = captured("-a", "lenet", "-b", "2", "--local-steps", "2", "--local-lr", "0.1")
    with pytest.raises(AssertionError, match="--cuda-graph: the place between the two states"):
        attack(tmp_path, path, "--cuda-graph")


def test_a_step_that_cannot_be_recorded_is_refused(captured, tmp_path, monkeypatch):
    monkeypatch.setattr("inversion.audit.inputs.check_device", lambda *_: None)
    path = captured("-a", "lenet", "-b", "2", "--image-size", "16")
    with pytest.raises(AssertionError, match="--cuda-graph: an iteration cannot be recorded: the"):
        attack(tmp_path, path, "--cuda-graph")
