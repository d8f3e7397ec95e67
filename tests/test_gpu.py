"""What only a GPU can show; skipped without one."""

import pytest
import torch

from inversion.audit.information import gradient_information_ratio
from inversion.objective import Objective
from inversion.pixel_gradient import exact, plain
from inversion.settings import Weights
from models.build import build_model
from models.gradient import ClientLoss
from tests import shared_work
from tests.support import attack, cosine, photos, target_of
from train.privacy import Mechanism, protect_per_sample
from utils.launch import Group, _joined, free_address, launch
from utils.shard import ALONE, Shard, sum_tensors

pytestmark = pytest.mark.gpu


def objective_on(device):
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    model = build_model("resnet18", 8, (3, 64, 64))
    x, y = photos(4, 64)
    target = target_of(model, x, y, arch="resnet18")
    weights = Weights(priors={"tv": 0.01, "bn": 0.01})
    return Objective(model.to(device), target, y, weights, bn_source="batch")


def test_exact_equals_plain_and_the_cpu():
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    _, on_cpu = exact(objective_on("cpu"), x)
    _, on_gpu = exact(objective_on("cuda"), x.cuda())
    _, by_plain = plain(objective_on("cuda"), x.cuda())
    assert cosine(on_gpu, by_plain) > 0.999999
    assert cosine(on_gpu.cpu(), on_cpu) > 0.9999


@pytest.mark.parametrize("offload", [[], ["--offload-seeds"]])
def test_mlco_on_the_gpu(captured, tmp_path, offload):
    path = captured("-a", "lenet", "-b", "3")
    result, _ = attack(
        tmp_path, path, "--MinCombine", "--n-seed", 3, "--epochs", 20, "--T-in", 3, "--metric",
        "--gpu", 0, *offload,
    )  # fmt: skip
    assert result["device"].startswith("cuda:0")
    assert result["iterations"] == 3 * 12 + 8
    assert result["peak_memory_mib"] > 0


@pytest.mark.parametrize("train_mode", [True, False])
def test_measures_equal_those_of_the_cpu(train_mode):
    """Gradient information ratio and clipped samples, float64."""
    x, y = photos(4, 64)
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = build_model("resnet18", 8, (3, 64, 64)).double().to(device)
        images, labels = x.double().to(device), y.to(device)
        information = gradient_information_ratio(model, images, labels, ClientLoss(train_mode))
        figures = [information.norm, information.information, information.ratio]
        if not train_mode:
            gradient = [torch.zeros_like(p) for p in model.parameters()]
            how = Mechanism(0.1, 0.5, torch.Generator().manual_seed(0))
            sent = protect_per_sample(gradient, how, model, images, labels, ClientLoss(False))
            figures += [sent.sample_norms, torch.cat([g.flatten() for g in sent.gradient]).cpu()]
        found.append(torch.cat(figures))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_controls_on_the_gpu(captured, tmp_path):
    path = captured("-a", "convnet", "-b", "3", "--upload-bn", "--with-control")
    result, _ = attack(
        tmp_path, path, "--epochs", 5, "--BN", 0.01, "--exact-bn", "--metric", "--GInfoR",
        "--gpu", 0,
    )  # fmt: skip
    assert result["controls"].keys() == {"mean image", "prior only", "other gradient"}
    assert sum(result["information"]["ratio"]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("client", "method"),
    [
        (("-a", "lenet", "-b", "1", "--image-size", "16", "--outlayer-state", "keep"), "solved"),
        (("-a", "resnet18", "-b", "2", "--image-size", "32", "--upload-bn"), "stem"),
    ],
)
def test_a_gradient_is_solved_layer_by_layer_on_the_gpu(captured, tmp_path, client, method):
    found = []
    for name, where in (("gpu", ["--gpu", 0]), ("cpu", [])):
        result, _ = attack(
            tmp_path / name, captured(*client), "--attack", "layerwise", "--metric", *where
        )
        assert result["layerwise"]["method"] == method
        found.append(result["layerwise"]["layers"])
    on_gpu, on_cpu = found
    assert [layer["name"] for layer in on_gpu] == [layer["name"] for layer in on_cpu]
    assert all(layer["true_error"] < 1e-3 for layer in on_gpu)


def test_two_processes_on_one_gpu(tmp_path):
    """gloo over CUDA tensors: the same derivatives and gradients as one process."""
    path = tmp_path / "figures"
    group = Group(2, 2, 0, free_address(), "gloo")
    assert launch(shared_work.on_the_gpu, [str(path)], group) == 0
    alone = shared_work.derivatives(ALONE, "cuda")
    for rank in range(2):
        others = torch.load(f"{path}.{rank}")
        for key, value in alone.items():
            torch.testing.assert_close(others[key].cuda(), value, rtol=0, atol=1e-8)


def test_nccl_with_one_process(captured, tmp_path):
    """A group of one that calls itself one of two: every collective really goes through nccl."""
    with _joined(Group(1, 1, 0, free_address(), "nccl"), 0):
        shard = Shard(0, 2)
        x = torch.randn(5, device="cuda")
        assert torch.equal(shard.sum(x), x)
        assert not shard.any(False)
        assert shard.any(True)
        assert torch.equal(shard.gather(x[:3], 6)[:3], x[:3])
        objective = objective_on("cuda")
        start = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).cuda()
        gradient, terms = objective.gradient_and_priors(start)
        whole = sum_tensors(gradient.values, shard)
        for a, b in zip(whole, gradient.values, strict=True):
            torch.testing.assert_close(a, b.detach())
