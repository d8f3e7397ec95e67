"""run.py --attack layerwise and auto: certificate, controls, files, fallback, refusals."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from inversion.audit.certificate import METHODS, certificate_of, predictions, true_errors
from inversion.audit.flags import matching_flags, parser
from inversion.audit.settings import refuse_processes, settings_from
from inversion.layerwise.attack import layerwise_attack
from inversion.layerwise.peel import Layer
from models.build import build_model
from models.rank_analysis import rank_analysis
from tests.support import attack, call, photos, succeed, target_of
from utils.errors import InputError

LENET = ("-a", "lenet", "-b", "1", "--image-size", "16", "--with-control", "--target-idx", "10")
EIGHT = ("-a", "lenet", "-b", "8", "--image-size", "16", "--target-idx", "10")
CONVNET = ("-a", "convnet", "-b", "2", "--image-size", "16", "--model-eval", "--with-control")
CONVNET = (*CONVNET, "--target-idx", "10", "--distinct-labels", "2")


@pytest.fixture(scope="module", autouse=True)
def few_photographs():
    """Decoders learn from fewer photographs than they should: their images are not judged here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inversion.audit.attack.LAYERWISE_PUBLIC_IMAGES", 60)
        patch.setattr("inversion.audit.certificate.DECODED_BY", 30)
        yield


@pytest.fixture(scope="module")
def audited(captured, tmp_path_factory):
    """Return what two audits left: of images that are solved for, and that a decoder begins."""
    found = {}
    for name, flags in (("lenet", LENET), ("convnet", CONVNET)):
        folder = tmp_path_factory.mktemp(name)
        result, folder = attack(folder, captured(*flags), "--attack", "layerwise", "--metric")
        found[name] = result, (folder / "log.txt").read_text(), folder
    return found


def test_images_that_are_solved_for_are_reconstructed(audited):
    result, log, folder = audited["lenet"]
    found = result["layerwise"]
    assert found.keys() == {
        "stopped", "method", "sources", "certified", "image_residuals", "layers", "seconds",
    }  # fmt: skip
    assert (found["method"], found["stopped"], found["sources"]) == ("solved", "", ["input_1"])
    assert (found["certified"], result["iterations"]) == (4, 4)
    assert [layer["name"] for layer in found["layers"]] == ["_6", "_3", "_1", "input_1"]
    for layer in found["layers"]:
        assert layer["certified"]
        assert layer["rank"] == layer["unknowns"] <= layer["equations"]
        assert layer["true_error"] < 1e-4
    assert result["metrics"]["mean"]["psnr"] > 90
    assert result["metrics"]["attack"]["arrived"] in (True, False)
    assert result["controls"].keys() == {"mean image", "other gradient"}
    assert "the walk ended: at the image" in log
    assert METHODS["solved"] in log
    assert (folder / "layers.png").exists()
    assert not (folder / "losses.png").exists()


def test_images_from_a_decoder_have_its_control(audited):
    result, log, folder = audited["convnet"]
    assert result["layerwise"]["method"] == "decoded"
    assert result["layerwise"]["stopped"].startswith("11: no 3×3 convolution of stride 1")
    assert len(result["layerwise"]["image_residuals"]) == 2
    assert max(result["layerwise"]["image_residuals"]) < 1
    assert result["controls"].keys() == {"mean image", "decoder only", "other gradient"}
    assert "decoder only" in result["metrics"]["controls"]
    assert "control, other gradient: 1 tensors" in log
    assert f"the walk ended: {result['layerwise']['stopped']}" in log
    picture = Image.open(folder / "layers.png")
    assert picture.width > 300


def test_the_certificate_is_printed_with_predictions_and_errors(audited):
    _, log, _ = audited["lenet"]
    lines = [line for line in log.splitlines() if "convolution 2" in line or "RA-i" in line]
    assert any("true error" in line for line in lines)
    assert "certificate, made without the truth" in log


def test_the_result_of_matching_has_no_layerwise_entry(captured, tmp_path):
    result, folder = attack(tmp_path, captured(*LENET))
    assert result["layerwise"] is None
    assert not (folder / "layers.png").exists()


def test_auto_solves_what_is_determined(captured, tmp_path):
    result, folder = attack(tmp_path, captured(*LENET), "--attack", "auto")
    assert result["layerwise"]["method"] == "solved"
    assert "matching, since" not in (folder / "log.txt").read_text()


def test_auto_matches_what_is_not(captured, tmp_path):
    """Eight images of eight classes have a head whose gradient has a rank of seven."""
    result, folder = attack(tmp_path, captured(*EIGHT), "--attack", "auto", "--epochs", 3)
    log = (folder / "log.txt").read_text()
    assert result["layerwise"] is None
    assert result["iterations"] == 3
    assert "matching, since solving layer by layer does not do: what is certified has 0" in log
    assert "numbers per image, the images 768; _6: " in log


def test_a_dry_run_says_the_largest_system(captured):
    outcome = succeed(
        "run.py", "--checkpoint", captured(*LENET), "--attack", "layerwise", "--dry-run"
    )
    assert "plan: solve the gradient layer by layer, 1 images (3, 16, 16)" in outcome.out
    # 32 channels of 25 weights for 64, 64, 256 positions
    assert "estimate: the largest dense system has 800 equations for 256 unknowns" in outcome.out


# The certificate ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solved():
    """A lenet of three images, attacked with labels in another order, and who knows what."""
    torch.manual_seed(0)
    model = build_model("lenet", 8, (3, 16, 16))
    x, _ = photos(3, 16, target_idx=10)
    y, attacked = torch.tensor([5, 1, 3]), torch.tensor([1, 3, 5])
    target = target_of(model, x, y, arch="lenet")
    recovered = layerwise_attack(model, target, attacked, torch.rand(20, 3, 16, 16))
    case = SimpleNamespace(target=target, y=attacked, objective=SimpleNamespace(model=model))
    truth = SimpleNamespace(x=x, y=y)
    sealed = SimpleNamespace(truth=truth, images_for=lambda _: x)
    return case, recovered, sealed


def test_true_errors_are_of_images_in_the_order_of_the_attacks_labels(solved):
    case, recovered, sealed = solved
    order = [1, 2, 0]
    assert (recovered.images - sealed.truth.x[order]).norm() < 1e-4 * sealed.truth.x.norm()
    errors = true_errors(case, recovered, sealed)
    assert list(errors) == list(recovered.tensors)
    assert max(errors.values()) < 1e-4
    other = SimpleNamespace(truth=sealed.truth, images_for=lambda _: sealed.truth.x[order])
    assert min(true_errors(case, recovered, other).values()) > 1e-3
    wrong = SimpleNamespace(**vars(case) | {"y": torch.tensor([1, 3, 6])})
    assert true_errors(wrong, recovered, sealed) == {}


def test_predictions_are_the_ranks_of_the_layers_that_take_the_tensors(solved):
    case, recovered, _ = solved
    ranks = {rank.name: rank.index for rank in rank_analysis(case.objective.model, 3, (3, 16, 16))}
    expected = {"_3": ranks["4"], "_1": ranks["2"], "input_1": ranks["0"]}
    found = predictions(case, recovered.layers)
    assert found == {"_6": ranks["7"]} | expected if "7" in ranks else found == expected
    inside = replace(recovered.layers[1], name="other", used_by=("nowhere", "2"))
    assert predictions(case, [inside]) == {"other": ranks["2"]}
    block = SimpleNamespace(name="layer1.0", index=7)
    assert isinstance(inside, Layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inversion.audit.certificate.rank_analysis", lambda *_: [block])
        of_block = replace(inside, used_by=("layer1.0.conv1",))
        assert predictions(case, [of_block, replace(inside, used_by=("layer1.01",))]) == {
            "other": 7
        }


def test_a_certificate_without_the_truth_says_no_error(solved):
    case, recovered, sealed = solved
    assert certificate_of(case, None, sealed) is None
    blind, seeing = certificate_of(case, recovered, None), certificate_of(case, recovered, sealed)
    assert "true error" not in "".join(blind.lines)
    assert "true error" in "".join(seeing.lines)
    assert "true_error" not in blind.entry["layers"][0]
    assert seeing.entry["layers"][0]["true_error"] < 1e-4
    assert blind.ranks == seeing.ranks


# Refusals ----------------------------------------------------------------------------------------


def settings_of(*flags):
    return settings_from(parser().parse_args(["--checkpoint", "file", *flags]))


@pytest.mark.parametrize(
    "flags",
    [
        ("--epochs", "9"), ("--lr", "0.1"), ("--TV", "0.1"), ("--MinCombine",), ("--n-seed", "2"),
        ("--grad-sign",), ("--bn-coupling", "forced"), ("--gradient-loss-fun", "L2"),
    ],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_flags_of_matching_are_refused(flags):
    assert flags[0] in matching_flags()
    with pytest.raises(InputError, match=f"^{' '.join(flags)}: concerns --attack matching"):
        settings_of("--attack", "layerwise", *flags)


def test_a_layerwise_attack_needs_no_iterations_and_auto_does():
    assert settings_of("--attack", "layerwise").attack.method == "layerwise"
    with pytest.raises(InputError, match="^--epochs: missing"):
        settings_of("--attack", "auto", "--lr", "0.1")
    assert settings_of("--attack", "auto", "--lr", "0.1", "--epochs", "9").attack.method == "auto"
    assert settings_of("--lr", "0.1", "--epochs", "9").attack.method == "matching"


@pytest.mark.parametrize("method", ["layerwise", "auto"])
def test_several_processes_and_a_search_are_refused(method):
    flags = ("--attack", method, *(() if method == "layerwise" else ("--lr", "1", "--epochs", "9")))
    settings = settings_of(*flags)
    refuse_processes(settings, 1)
    with pytest.raises(InputError, match=f"^--attack {method}: solves the gradient in one process"):
        refuse_processes(settings, 2)
    search = ("--superparameters-search", "--simulation-checkpoint", "other", "--lr-tune")
    if method == "layerwise":
        with pytest.raises(InputError, match="^--superparameters-search: looks for settings of"):
            settings_of(*flags, *search)


def test_a_target_that_cannot_be_walked_through_is_refused_before_anything_is_written(
    captured, tmp_path
):
    path = captured("-a", "convnet", "-b", "4", "--image-size", "16", "--target-idx", "10")
    flags = ("--root", tmp_path, "--checkpoint", path, "--attack", "layerwise")
    outcome = call("run.py", *flags)
    assert outcome.code == 2
    assert outcome.err.startswith("error: --attack layerwise: in train mode the walk needs the")
    assert list(tmp_path.iterdir()) == []
