"""What only a GPU can show; skipped without one."""

import pytest
import torch

from inversion.objective import Objective, Weights
from inversion.pixel_gradient import exact, plain
from models.build import build_model
from tests.support import attack, cosine, photos, target_of

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
