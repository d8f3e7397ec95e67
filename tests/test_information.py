"""The gradient information ratio of E2EGI, against slow loops and through run.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from inversion.audit.information import gradient_information_ratio, information_ratio
from models.build import build_model
from models.checkpoint import load
from models.gradient import ClientLoss, batch_gradient, gradient_mode
from tests.support import attack, call, capture_photos, photos, succeed


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("arch", ["lenet", "convnet", "resnet18"])
def test_information_equals_a_slow_loop(arch, train_mode):
    """Every sample's loss inside the batch, differentiated alone, against torch's own modules."""
    torch.manual_seed(0)
    model = build_model(arch, 8, (3, 32, 32)).double()
    x, y = photos(5, 32, target_idx=1)
    x = x.double()
    found = gradient_information_ratio(model, x, y, ClientLoss(train_mode))
    assert found.independent == (arch == "lenet" or not train_mode)

    whole = torch.cat([g.flatten() for g in batch_gradient(model, x, y, ClientLoss(train_mode))])
    total = torch.zeros_like(whole)
    for i in range(5):
        with gradient_mode(model, train_mode):
            logits = model(x)
            loss = F.cross_entropy(logits[i : i + 1], y[i : i + 1])
            g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, model.parameters())])
        total += g
        expected = {
            "confidence": logits.softmax(1)[i, y[i]],
            "predicted": logits[i].argmax(),
            "predicted_confidence": logits.softmax(1)[i].max(),
            "norm": g.norm(),
            "squared_l2": (g - whole).square().sum(),
            "cosine_distance": 1 - F.cosine_similarity(g, whole, dim=0),
            "sign_rate": 100 * (g.sign() == whole.sign()).double().mean(),
            "information": g @ whole,
        }
        for name, value in expected.items():
            assert getattr(found, name)[i].item() == pytest.approx(value.item(), rel=1e-6), name
    torch.testing.assert_close(total / 5, whole, rtol=0, atol=1e-5 * whole.norm().item())
    assert found.batch_norm == pytest.approx(whole.norm().item())
    assert found.information.mean().item() == pytest.approx(found.batch_norm**2)
    assert found.ratio.sum().item() == pytest.approx(100, abs=0.01)


def test_ratio_shifts_negative_information():
    ratio = information_ratio(torch.tensor([-1.0, 0.0, 2.0]))
    assert ratio.tolist() == [0, 25, 75]  # shifted to 0, 1, 3
    assert information_ratio(torch.tensor([1.0, 3.0])).tolist() == [25, 75]  # not shifted
    assert information_ratio(torch.zeros(4)).tolist() == [25] * 4


def test_information_of_the_model_leaves_it_alone():
    model = build_model("convnet", 8, (3, 32, 32)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradient_information_ratio(model, *photos(3, 32), ClientLoss(True))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [["--model-eval"], []])
def test_information_is_printed_and_written(captured, tmp_path, mode):
    path = captured("-a", "convnet", "-b", "4", *mode)
    result, folder = attack(tmp_path, path, "--epochs", 2, "--GInfoR")
    found = result["information"]
    assert sum(found["ratio"]) == pytest.approx(100, abs=0.01)
    assert found["independent"] == bool(mode)
    assert found["label"] == [0, 1, 2, 3]
    log = (folder / "log.txt").read_text()
    kind = "every image's own gradient" if mode else "share inside the batch's statistics"
    assert kind in log
    assert "| equal signs % | information | ratio % |" in log
    assert "| batch |" in log
    norm = load(str(path))["target_gradient"]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in norm))
    assert found["batch_norm"] == pytest.approx(norm, rel=1e-5)


def test_information_needs_the_truth(tmp_path):
    path = capture_photos(tmp_path, "-a", "lenet", "-b", "2", "--seal")
    flags = (
        "--root",
        tmp_path,
        "--checkpoint",
        path,
        "--labels",
        "0,1",
        "--lr",
        0.1,
        "--GInfoR",
        "--epochs",
        1,
    )
    outcome = call("run.py", *flags)
    assert outcome.code == 2
    assert "--GInfoR" in outcome.err
    assert "holds no truth" in outcome.err
    (truth,) = tmp_path.glob("*-truth.pth.tar")
    assert "ratio %" in succeed("run.py", *flags, "--truth", truth).out
