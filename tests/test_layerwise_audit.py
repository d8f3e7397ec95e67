"""run.py --attack layerwise and auto: certificate, controls, files, fallback, refusals."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import layerwise as benchmark
from benchmarks.layerwise_rows import append
from benchmarks.layerwise_tables import KINDS, draw_noise
from inversion.audit import attack as attacking
from inversion.audit.certificate import METHODS, certificate_of, predictions, true_errors
from inversion.audit.flags import matching_flags, parser
from inversion.audit.inputs import make_case
from inversion.audit.plan import layerwise_estimate
from inversion.audit.settings import refuse_processes, settings_from
from inversion.layerwise.attack import layerwise_attack
from inversion.layerwise.layer import Layer
from inversion.layerwise.least_squares import memory_of_system
from inversion.layerwise.trace import largest_system
from inversion.settings import AttackSettings, Loop, Weights
from models.binding import bind
from models.build import build_model
from models.checkpoint import load, seal
from models.rank_analysis import rank_analysis
from tests.support import attack, call, photos, succeed, target_of
from tests.test_layerwise_attack import narrow
from tests.test_layerwise_network import Branching, behind
from utils.console import Reporter
from utils.errors import InputError
from utils.shard import ALONE
from utils.tensor_files import load_plain, save

LENET = ("-a", "lenet", "-b", "1", "--image-size", "16", "--with-control", "--target-idx", "10")
EIGHT = ("-a", "lenet", "-b", "8", "--image-size", "16", "--target-idx", "10")
CONVNET = ("-a", "convnet", "-b", "2", "--image-size", "16", "--model-eval", "--with-control")
CONVNET = (*CONVNET, "--target-idx", "10", "--distinct-labels", "2")

#: Nothing asks to stop.
NEVER = SimpleNamespace(should_stop=False, stopped=False)


@pytest.fixture(scope="module", autouse=True)
def few_photographs():
    """Decoders learn from fewer photographs than they should: their images are not judged here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inversion.audit.attack.LAYERWISE_PUBLIC_IMAGES", 60)
        patch.setattr("inversion.audit.report.DECODED_BY", 30)
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
        "stopped", "detours", "labels", "method", "sources", "certified", "image_residuals",
        "layers", "seconds",
    }  # fmt: skip
    assert (found["method"], found["stopped"], found["sources"]) == ("solved", "", ["input_1"])
    assert (found["certified"], result["iterations"]) == (4, 4)
    assert [layer["name"] for layer in found["layers"]] == ["_6", "_3", "_1", "input_1"]
    for layer in found["layers"]:
        assert layer["certified"]
        assert layer["rank"] == layer["unknowns"] <= layer["equations"]
        assert layer["true_error"] < 1e-4
        if layer["kind"] != "head":
            assert layer["true_error"] < 10 * layer["expected_error"] < 1e-3
    assert result["metrics"]["mean"]["psnr"] > 90
    assert result["metrics"]["attack"]["objective"] < 1e-9
    assert result["metrics"]["attack"]["reason"] == (
        "the gradient was solved layer by layer as far as it goes: to the image"
    )
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


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_certificate_is_printed_with_predictions_and_errors(audited):
    """Every cell of a row is what result.json says."""
    result, log, _ = audited["lenet"]
    lines = log.splitlines()
    title = lines.index(
        "certificate, made without the truth but for the last column (RA-i: as --ra counts)"
    )
    assert cells(lines[title + 2]) == [
        "tensor", "from", "unknowns", "equations", "rank", "condition", "residual",
        "expected error", "flips", "certified", "seconds", "RA-i", "true error",
    ]  # fmt: skip
    rows = [cells(line) for line in lines[title + 4 : title + 8]]
    for row, layer in zip(rows, result["layerwise"]["layers"], strict=True):
        expected, ra = layer["expected_error"], layer["ra"]
        assert row == [
            layer["name"], f"{layer['kind']} {layer['place']}", str(layer["unknowns"]),
            str(layer["equations"]), str(layer["rank"]), f"{layer['condition']:.4g}",
            f"{layer['residual']:.4g}", "" if expected is None else f"{expected:.4g}",
            str(layer["flips"]), "yes", f"{layer['seconds']:.4g}", "" if ra is None else str(ra),
            f"{layer['true_error']:.4g}",
        ]  # fmt: skip
    assert rows[-1][:5] == ["input_1", "convolution input_1", "768", "2400", "768"]


def without_truth(entry):
    """An entry of result.json without what depends on the truth or on the clock."""
    if isinstance(entry, dict):
        return {k: without_truth(v) for k, v in entry.items() if k not in ("true_error", "seconds")}
    return [without_truth(v) for v in entry] if isinstance(entry, list) else entry


def test_no_truth_is_read(audited, captured, tmp_path):
    """Sealed away, or with other images in its place: the attack and its certificate are the same.

    The network's images come from a decoder, which draws, so the drawing does not depend on it.
    """
    kept = load(captured(*CONVNET))
    sealed, _ = seal(kept)
    save(sealed, str(tmp_path / "sealed.tar"))
    false = {**kept, "x_true": torch.rand_like(kept["x_true"])}
    bind(false)
    save(false, str(tmp_path / "false.tar"))
    labels = ",".join(map(str, kept["y_true"].tolist()))
    result, _, folder = audited["convnet"]
    x = load_plain(str(folder / "x_recon.pth"))
    for name, flags in (("sealed", ("--labels", labels)), ("false", ("--metric", "--no-controls"))):
        own, folder = attack(
            tmp_path / name, tmp_path / f"{name}.tar", "--attack", "layerwise", *flags
        )
        assert torch.equal(load_plain(str(folder / "x_recon.pth")), x)
        assert without_truth(own["layerwise"]) == without_truth(result["layerwise"])
        assert own["losses"] == result["losses"]
    true, wrong = (entry["layerwise"]["layers"][0]["true_error"] for entry in (result, own))
    assert true < 1e-4 < 1e-2 < wrong


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


def case_of(model, labels, size, *, train_mode=False, capture_bn=True):
    """What an attacker has of photographs with these labels."""
    x, y = photos(len(labels), size, target_idx=10)[0], torch.tensor(labels)
    target = target_of(model, x, y, train_mode=train_mode, capture_bn=capture_bn)
    settings = AttackSettings(Weights(), Loop(2, 0.1), method="auto")
    return settings, make_case(settings, model, target, y, None, torch.device("cpu"), ALONE)


def test_auto_matches_where_a_stem_has_too_few_numbers(capsys):
    settings, case = case_of(narrow(), [5, 1], 8)
    found = attacking.attack(settings, case, NEVER, Reporter(), print_freq=1)
    assert found.recovered is None
    assert found.outcome.iterations == 2
    said = capsys.readouterr().out
    assert "matching, since solving layer by layer does not do: what is certified has 16 " in said


@pytest.mark.parametrize(
    ("flags", "tensors", "method"), [(LENET, 2, "activations"), (CONVNET, 1, "decoded")]
)
@pytest.mark.parametrize("asked", ["auto", "layerwise"])
def test_an_interruption_keeps_what_was_recovered(
    flags, tensors, method, asked, captured, tmp_path, monkeypatch
):
    say, told = Reporter.say, []

    def interrupting(self, text):
        say(self, text)
        told.append(", certified, " in text)
        if told[-1] and sum(told) == tensors:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Reporter, "say", interrupting)
    settings = () if asked == "layerwise" else ("--lr", 0.1, "--epochs", 100)
    outcome = call(
        "run.py", "--root", tmp_path, "--checkpoint", captured(*flags), "--attack", asked,
        "--metric", *settings,
    )  # fmt: skip
    assert outcome.code == 130
    assert "matching, since" not in outcome.out
    result = json.loads((tmp_path / "results" / "exp" / "test" / "result.json").read_text())
    assert result["stopped"] == "interrupted"
    assert result["layerwise"]["stopped"] == "interrupted"
    assert result["layerwise"]["method"] == method
    assert len(result["layerwise"]["layers"]) == result["iterations"] == tensors
    assert result["controls"] is None
    assert result["metrics"]["verdict"]["verdict"] == "incomplete"


def test_a_dry_run_says_the_largest_system(captured):
    outcome = succeed(
        "run.py", "--checkpoint", captured(*LENET), "--attack", "layerwise", "--dry-run"
    )
    assert "plan: solve the gradient layer by layer, 1 images (3, 16, 16)" in outcome.out
    # 32 channels of 25 weights for 64, 64, 256 positions
    assert "estimate: the largest dense system has 800 × 256 numbers" in outcome.out
    assert "per iteration" not in outcome.out


def test_a_dry_run_of_auto_says_both(captured):
    outcome = succeed(
        "run.py", "--checkpoint", captured(*LENET), "--attack", "auto", "--dry-run", "--lr", 0.1,
        "--epochs", 9,
    )  # fmt: skip
    assert "estimate: the largest dense system has 800 × 256 numbers" in outcome.out
    assert "estimate, where that does not determine the images: " in outcome.out
    assert " ms per iteration, " in outcome.out


def test_an_estimate_says_what_cannot_be_solved():
    for model, options, says in (
        (behind(Branching()).float(), {}, "torch.fx cannot trace the network: "),
        (build_model("convnet", 8, (3, 16, 16)), {"train_mode": True, "capture_bn": False},
         "in train mode the walk needs the batch's BatchNorm statistics"),
    ):  # fmt: skip
        _, case = case_of(model, [5, 1], 16, **options)
        assert layerwise_estimate(case, 2**30).startswith(
            f"estimate: the gradient cannot be solved layer by layer: {says}"
        )


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


def test_true_errors_are_of_the_images_that_belong_together(solved):
    case, recovered, sealed = solved
    order = [1, 2, 0]
    assert (recovered.images - sealed.truth.x[order]).norm() < 1e-4 * sealed.truth.x.norm()
    errors = true_errors(case, recovered, sealed)
    assert list(errors) == list(recovered.tensors)
    assert max(errors.values()) < 1e-4
    turned = SimpleNamespace(truth=sealed.truth, images_for=lambda _: sealed.truth.x[order])
    assert true_errors(case, recovered, turned) == pytest.approx(errors)
    other = SimpleNamespace(truth=sealed.truth, images_for=lambda _: 1 - sealed.truth.x)
    assert min(true_errors(case, recovered, other).values()) > 1e-3


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
    assert blind.lines[0] == "certificate, made without the truth (RA-i: as --ra counts)"
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


def test_a_walk_ends_where_a_system_takes_more_than_its_memory():
    torch.manual_seed(0)
    model = build_model("lenet", 8, (3, 16, 16))
    x, _ = photos(2, 16, target_idx=10)
    y = torch.tensor([5, 1])
    target = target_of(model, x, y, arch="lenet")
    enough = memory_of_system(*largest_system(model, 2, (3, 16, 16))[:2])
    public = torch.rand(9, 3, 16, 16)
    assert layerwise_attack(model, target, y, public, max_memory=enough).stopped == ""
    found = layerwise_attack(model, target, y, public, max_memory=enough - 1)
    assert found.stopped.startswith("input_1: its equations take about ")
    assert found.certified[-1].name == "_1"


def test_memory_concerns_solving():
    both = settings_of("--attack", "auto", "--epochs", "9", "--lr", "0.1", "--max-memory", "64")
    assert both.attack.max_memory == 2**26
    matching = settings_of("--epochs", "9", "--lr", "0.1", "--max-memory", "1GiB").attack
    assert matching.matching_memory == 2**30


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


# The benchmark -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "clip"), [("per-sample", 1.0), ("relative", None)])
def test_the_benchmarks_client_says_what_it_did_to_its_gradient(noise, clip):
    case = benchmark.Case("lenet", 16, 2, head="keep", noise=noise, level=1e-6)
    of = benchmark.client(case, None)
    for target in (of.target, of.other):
        protection = target.protection
        assert (protection and protection.clip) == clip
        assert (protection and protection.sigma) == (clip and 1e-6)
    assert sum(g.square().sum() for g in of.target.gradient).sqrt() > (clip or 0) / 2


def test_rows_are_not_appended_below_other_columns(tmp_path):
    path = tmp_path / "rows.csv"
    for _ in range(2):
        append([{"a": 1, "b": 0.123456789}], path)
    assert path.read_text() == "a,b\n1,0.123457\n1,0.123457\n"
    for row, apart in (({"a": 1, "c": 2}, "b, c"), ({"b": 1, "a": 2}, "their order")):
        with pytest.raises(SystemExit, match=f"rows.csv: has other columns .*{apart}.*move it"):
            append([row], path)
    assert len(path.read_text().splitlines()) == 3


def test_the_picture_of_the_noise_needs_rows_of_it(tmp_path, capsys):
    row = {"part": "eval", "train_mode": "False", "noise": "none", "level": "0", "certified": "1"}
    row |= {"psnr": "40", "matching_psnr": "", "mean_colour_psnr": "15"}
    path = tmp_path / "noise.png"
    draw_noise([row, row | {"part": "noise", "train_mode": "True"}], path)
    assert capsys.readouterr().out == (
        "no picture: there are no rows of the parts noise and matching in eval mode\n"
    )
    assert not path.exists()
    sizes = []
    for kinds in (["none"], [*KINDS]):
        rows = [row | {"part": "noise", "noise": k, "level": 1e-3 * (k != "none")} for k in kinds]
        draw_noise(rows, path)
        assert Image.open(path).width == 900
        sizes.append(path.stat().st_size)
    assert sizes[0] < sizes[1]
