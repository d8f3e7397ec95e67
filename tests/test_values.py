"""Values of distances, priors, label methods, metrics: golden, by hand, by other libraries."""

import json
import math
import warnings
from itertools import permutations

import lpips
import numpy as np
import pytest
import torch
import torchvision
from skimage.metrics import structural_similarity

from inversion.distances import GRADIENT_DISTANCES, Aim, cosine_distance, squared_l2
from inversion.priors import Candidate, bn_statistics, l2_norm, total_variation
from models.checkpoint import load
from tests import golden
from tests.support import attack, scored
from train.datasets import DATASETS
from utils import metrics
from utils.errors import InputError
from utils.files import null_if_nan, null_unless_finite, write_json
from utils.images import denormalise
from utils.matching import assign

GOLDEN = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("name", sorted(GOLDEN.keys() | golden.values().keys()))
def test_golden(name):
    assert golden.values()[name] == pytest.approx(GOLDEN[name], rel=1e-9)


def test_cosine_distance_is_one_minus_the_cosine():
    a, b = [torch.tensor([3.0, 0.0])], [torch.tensor([1.0, 1.0])]
    assert cosine_distance(a, b).item() == pytest.approx(1 - 1 / math.sqrt(2), rel=1e-6)
    assert cosine_distance(a, [-5 * a[0]]).item() == pytest.approx(2)
    assert cosine_distance(a, [7 * a[0]]).item() == 0
    parts = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)]
    whole = [[torch.cat([p.flatten() for p in gradient])] for gradient in parts]
    assert cosine_distance(*parts).item() == pytest.approx(cosine_distance(*whole).item())


def test_cosine_distance_keeps_its_digits_near_zero():
    """An angle of 1e-6 has distance 5e-13, far below float32's resolution of 1 − cos."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-6])
    assert cosine_distance([a], [b]).item() == pytest.approx(5e-13, rel=1e-3)


@pytest.mark.parametrize("name", GRADIENT_DISTANCES)
@pytest.mark.parametrize("near", [1.0, 1e-4])
def test_the_closed_form_equals_autograd(name, near):
    distance = GRADIENT_DISTANCES[name]
    target = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    gradient = [(3 * t + near * torch.randn_like(t)).requires_grad_() for t in target]
    value = distance.value(gradient, target)
    derivative = torch.autograd.grad(value, gradient)
    with torch.no_grad():
        closed, cotangents = distance.with_cotangent(gradient, Aim.at(target))
    assert closed.item() == pytest.approx(value.item(), rel=1e-9)
    for a, b in zip(derivative, cotangents, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    zero = [torch.zeros_like(t) for t in target]
    assert all(v.isfinite().all() for v in distance.with_cotangent(zero, Aim.at(target))[1])


def test_squared_l2_by_hand():
    assert squared_l2([torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 4.0])]).item() == 5


def test_total_variation_by_hand():
    x = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]).view(1, 1, 2, 3)
    assert total_variation(Candidate(x)).item() == pytest.approx((1 + 2 + 1 + 2) / 4)
    assert total_variation(Candidate(x.mT)).item() == pytest.approx(1.5)
    assert total_variation(Candidate(torch.rand(2, 3, 1, 1))).item() == 0


def test_l2_norm_and_bn_statistics_by_hand():
    x = torch.zeros(2, 1, 2, 2)
    x[0, 0] = 3.0
    assert l2_norm(Candidate(x)).item() == pytest.approx(3.0)
    moments = [(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0]))]
    target = [(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 2.0]))]
    assert bn_statistics(Candidate(x, moments, target)).item() == pytest.approx(6.0)


def test_mse_and_psnr_by_hand():
    x, x_true = torch.full((2, 3, 4, 4), 0.6), torch.full((2, 3, 4, 4), 0.5)
    assert metrics.mse(x, x_true).tolist() == pytest.approx([0.01, 0.01], rel=1e-5)
    assert metrics.psnr(x, x_true).tolist() == pytest.approx([20, 20], rel=1e-5)


def test_ssim_is_one_for_equal_and_missing_for_tiny_images():
    x = torch.rand(2, 3, 16, 16)
    assert metrics.ssim(x, x).tolist() == pytest.approx([1, 1])
    assert metrics.ssim(x[..., :8, :8], x[..., :8, :8]).isnan().all()


def test_label_accuracy_counts_the_overlap():
    accuracy = lambda a, b: metrics.label_accuracy(torch.tensor(a), torch.tensor(b))  # noqa: E731
    assert accuracy([3, 1, 1, 0], [1, 3, 0, 1]) == 1
    assert accuracy([1, 1, 1, 1], [1, 1, 0, 2]) == 0.5
    assert accuracy([5, 6], [0, 1]) == 0


def test_assignment_minimises_the_summed_mse():
    x_true = torch.rand(5, 1, 3, 3)
    x = (x_true + 0.3 * torch.randn(5, 1, 3, 3)).roll(2, 0)
    cost = lambda order: metrics.mse(x[list(order)], x_true).sum().item()  # noqa: E731
    order = assign(x, x_true)
    assert sorted(order) == list(range(5))
    assert cost(order) == pytest.approx(min(map(cost, permutations(range(5)))))


def test_baselines_are_flat_images():
    x = torch.rand(2, 3, 5, 5)
    flat = metrics.baselines(x)
    assert (flat["grey"] == 0.5).all()
    variance = x.var((-2, -1), correction=0).mean(1)
    assert metrics.mse(flat["mean colour"], x).tolist() == pytest.approx(variance.tolist())


def test_the_table_says_what_is_no_reconstruction():
    true = torch.rand(3, 3, 16, 16)
    found = true.clone()
    found[1] = true[1].mean((-2, -1), keepdim=True)
    result, text = scored(
        found.flip(0), true, torch.tensor([7, 5, 6]), torch.tensor([6, 5, 7]), by_index=False
    )
    assert [image["above_baselines"] for image in result["images"]] == [True, False, True]
    assert [image["reconstruction"] for image in result["images"]] == [2, 1, 0]
    assert [image["label"] for image in result["images"]] == [6, 5, 7]
    assert "1 of 3 images score no better in PSNR than a flat image" in text
    assert "n/a" in text  # LPIPS without its backbone
    for line in ("mean", "std", "grey image", "mean colour image", "label accuracy 100.0 %"):
        assert line in text
    by_index, _ = scored(
        found.flip(0), true, torch.tensor([7, 5, 6]), torch.tensor([6, 5, 7]), by_index=True
    )
    assert [image["reconstruction"] for image in by_index["images"]] == [0, 1, 2]


def test_an_exact_image_is_said_to_be_exact():
    """Its PSNR is infinite: null in result.json, beside `exact`, and 100 dB in the mean."""
    true = torch.rand(2, 3, 16, 16)
    true[1] = true[1].mean((-2, -1), keepdim=True).round(decimals=1)  # its own mean colour
    found = true.clone()
    found[1] = (found[1] + 0.1).clamp(max=1)
    y = torch.tensor([0, 1])
    result, text = scored(
        found, true, y, y, by_index=True, controls={"all": true, "none": 0 * true}
    )
    exact, other = result["images"]
    assert (exact["psnr"], exact["mse"], exact["exact"], exact["above_baselines"]) == (
        None, 0, True, True
    )  # fmt: skip
    assert exact["flat_psnr"] > 0
    assert (other["psnr"], other["exact"]) == (pytest.approx(20, abs=0.1), False)
    assert result["exact_images"] == 1
    assert result["mean"]["psnr"] == pytest.approx(60, abs=0.1)
    assert result["std"]["psnr"] == pytest.approx(40, abs=0.1)
    assert result["controls"]["all"]["exact_images"] == 2
    assert result["controls"]["all"]["images"]["psnr"] == [None, None]
    assert result["controls"]["all"]["mean"]["psnr"] == 100
    assert result["controls"]["none"]["exact_images"] == 0
    (row,) = [line for line in text.splitlines() if line.startswith("|") and " 0 / 0 " in line]
    assert row.split("|")[5].strip() == "exact"
    assert (
        "1 of 2 images are exact: in the mean their PSNR, which is infinite, counts as 100 dB"
        in (text)
    )
    assert "inf " not in text
    json.dumps(null_if_nan(result), allow_nan=False)  # no infinity is left anywhere


def test_a_flat_image_is_exactly_its_mean_colour():
    true = torch.full((1, 3, 16, 16), 0.25)
    y = torch.tensor([0])
    result, text = scored(true + 0.1, true, y, y, by_index=True)
    assert result["images"][0]["flat_psnr"] is None
    assert "no: flat exact" in text
    assert result["baselines"]["mean colour"]["psnr"] == 100


def test_json_refuses_numbers_that_nobody_handled(tmp_path):
    path = tmp_path / "result.json"
    write_json({"a": [1.5, None], "b": {"c": torch.tensor([1, 2])}}, path)
    before = path.read_bytes()
    assert json.loads(before) == {"a": [1.5, None], "b": {"c": [1, 2]}}
    for number in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^/b/1/c: {number} has no meaning in JSON$"):
            write_json({"a": 1, "b": [0, {"c": number}]}, path)
        with pytest.raises(ValueError, match="^/a/0: "):
            write_json({"a": torch.tensor([number])}, path)
    assert path.read_bytes() == before
    mixed = {"a": (1.0, math.nan), "b": [{"c": math.inf}], "d": "nan"}
    assert null_unless_finite(mixed) == {"a": [1.0, None], "b": [{"c": None}], "d": "nan"}
    assert null_if_nan(mixed) == {"a": [1.0, None], "b": [{"c": math.inf}], "d": "nan"}


def test_grey_images_are_scored_too():
    true = torch.rand(2, 1, 32, 32)
    result, _ = scored(true, true * 0.9, torch.tensor([0, 1]), torch.tensor([0, 1]), by_index=True)
    assert np.isfinite([result["mean"][name] for name in ("mse", "psnr", "ssim")]).all()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file of AlexNet's format; its weights are random, which equality does not mind."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("torch_home")
    path = home / "hub" / "checkpoints" / metrics.LPIPS_BACKBONE
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.alexnet().state_dict(), path)
    return path


def test_ssim_original_is_the_default_of_scikit_image_on_8_bits():
    torch.manual_seed(0)
    x_true = torch.rand(2, 3, 20, 24)
    x = (x_true + 0.1 * torch.randn(x_true.shape)).clamp(0, 1)
    for found, a, b in zip(metrics.ssim_original(x, x_true), x, x_true, strict=True):
        a, b = (
            np.round(255 * t.permute(1, 2, 0).double().numpy()).astype(np.uint8) for t in (a, b)
        )
        expected = structural_similarity(a, b, channel_axis=-1)
        assert found.item() == pytest.approx(expected, abs=1e-12)
    assert (metrics.ssim_original(x, x_true) - metrics.ssim(x, x_true)).abs().min() > 1e-4
    assert metrics.ssim_original(x, x)[0] == 1
    assert metrics.ssim_original(x[..., :6], x[..., :6]).isnan().all()


def test_ssim_original_scores_a_run(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "2")
    found, flags = {}, ("--metric", "--no-controls")
    for choice in metrics.SSIMS:
        result, folder = attack(tmp_path / choice, path, *flags, "--ssim", choice)
        assert result["settings"]["ssim"] == choice
        found[choice] = result["metrics"]
    checkpoint = load(str(path))
    images = [
        denormalise(x, *DATASETS["photos"].normalisation)
        for x in (torch.load(folder / "x_recon.pth", weights_only=True), checkpoint["x_true"])
    ]
    order = [image["reconstruction"] for image in found["original"]["images"]]
    expected = metrics.ssim_original(images[0][order], images[1]).mean().item()
    assert found["original"]["mean"]["ssim"] == pytest.approx(expected, abs=1e-9)
    assert found["original"]["mean"]["ssim"] != found["gaussian"]["mean"]["ssim"]
    assert found["original"]["mean"]["psnr"] == found["gaussian"]["mean"]["psnr"]


def test_lpips_equals_the_package_with_the_same_backbone(backbone, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(backbone.parents[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = lpips.LPIPS(net="alex", verbose=False).eval()  # reads the hub cache
    x, x_true = torch.rand(2, 3, 3, 40, 40)
    with torch.no_grad():
        expected = stock(2 * x - 1, 2 * x_true - 1).flatten()
    assert expected.min() > 0
    for score in (metrics.load_lpips(str(backbone)), metrics.load_lpips(None)):
        torch.testing.assert_close(score(x, x_true), expected)
        assert score(x, x).abs().max() < 1e-7
        assert score(x[..., :20, :20], x[..., :20, :20]).isnan().all()
        assert score(x[:, :1], x_true[:, :1]).isfinite().all()


def test_lpips_without_a_backbone_is_missing_not_random(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert metrics.load_lpips(None) is None
    with pytest.raises(InputError, match="no such file"):
        metrics.load_lpips(str(tmp_path / "none.pth"))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds no AlexNet"):
        metrics.load_lpips(str(tmp_path / "other.pth"))
