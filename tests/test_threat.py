"""What the attacker of a run has: the table, the letter, and what --without takes away."""

import json
from dataclasses import replace

import pytest
import torch

from inversion.audit.flags import parser
from inversion.audit.inputs import make_case
from inversion.audit.settings import settings_from
from inversion.audit.threat import PASSIVE, threat_model
from inversion.audit.withhold import WITHHELD, withheld_parts, withhold
from inversion.labels.reconstruct import LabelResult
from models.build import build_model
from models.target import Protection
from tests.support import attack, call, photos, smooth_network, target_of
from utils.errors import InputError
from utils.shard import ALONE
from utils.tensor_files import load_plain

CPU = torch.device("cpu")


def settings_of(*flags):
    line = ["--checkpoint", "f", "--epochs", "9", "--lr", "0.1", *flags]
    if "layerwise" in flags:
        line = ["--checkpoint", "f", *flags]
    return settings_from(parser().parse_args(line))


def threat_of(*flags, model=None, labels=None, **changes):
    """The threat model of a batch of two, attacked by these flags of run.py."""
    torch.manual_seed(0)
    model = smooth_network(8) if model is None else model
    x, y = photos(2, 16)
    target = target_of(model, x.to(next(model.parameters())), y, capture_bn=True)
    settings = settings_of(*flags)
    target, withheld = withhold(replace(target, **changes), settings.inputs.without)
    case = make_case(settings.attack, model, target, y, labels, CPU, ALONE)
    return threat_model(replace(case, withheld=withheld), settings)


FOUND = LabelResult(
    torch.tensor([0, 1]), torch.zeros(8), False, "counts", "no auxiliary images given", None, 0.1
)
DP = Protection("batch", 0.1, 1.0)


@pytest.mark.parametrize(
    ("flags", "changes", "letter", "reason"),
    [
        # Zhu et al. (2019), DLG: the gradient, and nothing about images.
        ((), {}, "A", "nothing but what was sent"),
        # Geiping et al. (2020): total variation and the range of colours.
        (("--TV", "0.1", "--input-boxed"), {}, "B", "priors on images: tv"),
        (("--input-boxed",), {}, "B", "range of colours"),
        # Yin et al. (2021), and Li et al. (2023), E2EGI: BatchNorm statistics.
        (("--TV", "0.1", "--BN", "0.1"), {}, "E", "running ones"),
        (("--BN", "0.1", "--exact-bn"), {}, "E", "those of the batch"),
        (("--bn-coupling", "forced"), {}, "E", "forced"),
        (("--attack", "layerwise"), {}, "E", "layers are solved with them"),
        # What the client says of its training.
        ((), {"label_smoothing": 0.1}, "C", "label smoothing"),
        ((), {"protection": DP}, "C", "protection"),
        (("--gradient-scale", "2"), {}, "C", "loss scale"),
        # Withheld parts.
        (("--without", "protection"), {"protection": DP}, "A", "nothing but"),
        (("--BN", "0.1", "--without", "bn"), {}, "E", "running ones"),
    ],
)
def test_the_letter_is_the_first_that_grants_what_the_attack_uses(flags, changes, letter, reason):
    """As the taxonomy's authors place the published attacks that have these means."""
    found = threat_of(*flags, **changes)
    assert (found.letter, reason in found.reason) == (letter, True), found.reason


@pytest.mark.parametrize(
    ("flags", "letter"),
    [
        (("--pseudo-label-init", "from_grads"), "D"),
        (("--pseudo-label-init", "from_grads", "--label-aux", "own"), "D"),
        (("--pseudo-label-init", "from_grads", "--label-prior", "uniform"), "E"),
    ],
)
def test_other_images_and_the_distribution_of_labels_raise_the_letter(flags, letter):
    found = threat_of("--TV", "0.1", *flags, labels=FOUND)
    assert found.letter == letter
    assert found.rows[3][:2] == ("labels", "no")
    assert found.rows[3][2].startswith("reconstructed from the gradient by counts")
    assert found.rows[-1][1] == "yes"


def test_solving_in_eval_mode_needs_other_images_only():
    assert threat_of("--attack", "layerwise", bn_mean=None, train_mode=False).letter == "D"


def test_the_table_has_a_line_per_row_and_fits():
    found = threat_of("--TV", "0.1", protection=DP)
    assert len(found.rows) == len(found.lines) - 1 <= 11
    assert {has for _, has, _ in found.rows} <= {"yes", "no", "given", "withheld"}
    assert found.lines[0].startswith(
        f"what the attacker has: threat model C, {PASSIVE['C']} (the client's protection is known)"
    )
    columns = {line.index(row[2]) for line, row in zip(found.lines[1:], found.rows, strict=True)}
    assert len(columns) == 1
    assert json.loads(json.dumps(found.entry))["rows"] == [list(row) for row in found.rows]


def test_the_rows_say_what_is_missing():
    model = smooth_network(8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("0."))
    rows = {row[0]: row for row in threat_of(model=model).rows}
    sent = [p.numel() for p in model.parameters() if p.requires_grad]
    assert rows["tensors"][2] == (
        f"{len(sent)} of {len(sent) + 2}, {sum(sent):,} numbers; not 0.weight, 0.bias"
    )
    assert rows["labels"] == ("labels", "given", "from the truth")
    assert rows["protection"][1] == rows["other images"][1] == "no"
    assert rows["BN statistics"] == ("BN statistics", "yes", "of the batch, sent; not used")


def test_a_sparse_gradient_has_as_many_numbers_as_were_sent():
    gradient = [torch.zeros_like(p) for p in smooth_network(8).parameters()]
    gradient[0].flatten()[:5] = 1.0
    kept = Protection("topk", 0.0, None, amount=0.1)
    rows = threat_of(gradient=tuple(gradient), protection=kept).rows
    assert rows[1][2].split(", ")[1].startswith("5 of ")


def test_a_network_without_batchnorm_has_no_statistics():
    model = build_model("lenet", 8, (3, 16, 16))
    assert threat_of(model=model).rows[2][1:] == ("no", "the network has no BatchNorm layer")


# Withholding -------------------------------------------------------------------------------


def test_withheld_parts_are_named_in_the_table():
    found = threat_of("--without", ",".join(WITHHELD), protection=DP, labels=FOUND)
    withheld = [name for name, has, _ in found.rows if has == "withheld"]
    assert withheld == ["BN statistics", "labels", "normalisation", "protection"]


def test_parts_are_read_once_and_in_order():
    assert withheld_parts("protection, bn,bn") == ("bn", "protection")
    assert settings_of("--without", "labels").inputs.labels_from_gradient
    assert settings_of("--without", "labels", "--label-prior", "uniform").inputs.uniform_labels
    assert not settings_of("--without", "bn").inputs.labels_from_gradient


def test_nothing_else_of_a_target_is_taken():
    x, y = photos(2, 16)
    target = replace(target_of(smooth_network(8), x.double(), y), protection=DP)
    assert withhold(target, ())[0] is target
    less, words = withhold(target, tuple(WITHHELD))
    assert less.bn_mean is less.bn_var is less.protection is None
    assert less.mean.unique().tolist() == less.std.unique().tolist() == [0.5]
    assert less.gradient is target.gradient
    assert words.keys() == WITHHELD.keys()
    assert "0.485" in words["normalisation"]


def test_a_normalisation_that_is_assumed_anyway_is_refused():
    x, y = photos(2, 16)
    target, _ = withhold(target_of(smooth_network(8), x.double(), y), ("normalisation",))
    with pytest.raises(InputError, match=r"which the attacker\s+would assume"):
        withhold(target, ("normalisation",))


SHORT = ("--epochs", 3, "--lr", 0.1, "--grad-sign", "--metric")
SMALL = ("-b", "2", "--image-size", "16", "--with-control", "--decoys", "30")


def test_without_normalisation_only_the_colours_differ(captured, tmp_path):
    """Without box and public images the network's inputs are found alike, but shown otherwise."""
    path = captured("-a", "lenet", *SMALL)
    plain, one = attack(tmp_path / "1", path, *SHORT)
    less, other = attack(tmp_path / "2", path, *SHORT, "--without", "normalisation")
    found, again = (load_plain(str(folder / "x_recon.pth")) for folder in (one, other))
    assert torch.equal(found, again)
    scores, worse = plain["metrics"], less["metrics"]
    assert scores["baselines"] == worse["baselines"]  # of the truth, by the client's normalisation
    assert scores["mean"]["mse"] != worse["mean"]["mse"]
    assert scores["controls"]["prior only"] != worse["controls"]["prior only"]
    assert scores["controls"]["mean image"]["mean"] == worse["controls"]["mean image"]["mean"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5,) * 3, (0.5,) * 3))
    seen = (again * std + mean).clamp(0, 1)
    # the first of two images of different labels is paired with itself
    true = photos(2, 16)[0] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    true = (true + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)).clamp(0, 1)
    expected = (seen - true).square().mean((1, 2, 3))
    measured = torch.tensor([image["mse"] for image in worse["images"]])
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=0)


def test_without_bn_it_is_as_if_none_had_been_sent(captured, tmp_path):
    """Attack and controls are those of a client that uploads no statistics."""
    bn = ("--BN", 0.1)
    uploaded = captured("-a", "convnet", *SMALL, "--upload-bn")
    none = captured("-a", "convnet", *SMALL)
    less, one = attack(tmp_path / "1", uploaded, *SHORT, *bn, "--without", "bn")
    plain, other = attack(tmp_path / "2", none, *SHORT, *bn)
    found, again = (load_plain(str(folder / "x_recon.pth")) for folder in (one, other))
    assert torch.equal(found, again)
    assert less["metrics"]["controls"] == plain["metrics"]["controls"]
    assert less["bn_source"] == "running"
    assert not less["target"]["bn_statistics"]
    assert less["threat"]["rows"][2][1] == "withheld"
    assert plain["threat"]["rows"][2][1] == "no"


def test_without_labels_they_are_reconstructed(captured, tmp_path):
    path = captured("-a", "lenet", *SMALL)
    less, _ = attack(tmp_path / "1", path, *SHORT, "--without", "labels")
    found, _ = attack(tmp_path / "2", path, *SHORT, "--pseudo-label-init", "from_grads")
    same = ("method", "reconstructed", "true", "accuracy")
    assert [less["labels"][key] for key in same] == [found["labels"][key] for key in same]
    assert less["labels"]["method"] == "counts"
    assert less["metrics"]["images"] == found["metrics"]["images"]


def test_without_the_report_of_noise_the_auditor_still_sees_it(captured, tmp_path):
    path = captured("-a", "lenet", *SMALL, "--enable-dp", "-C", "1", "--sigma", "1e-3")
    result, folder = attack(tmp_path, path, *SHORT, "--without", "protection")
    log = (folder / "log.txt").read_text()
    assert result["target"]["protection"] is None
    assert "what was sent is protected" in log
    assert "the client's protection: withheld; the client reported " in log
    assert result["threat"]["rows"][8][:2] == ["protection", "withheld"]


def test_the_table_stands_before_the_plan(captured, tmp_path):
    path = captured("-a", "lenet", *SMALL)
    flags = ("--checkpoint", path, "--epochs", 3, "--lr", 0.1, "--dry-run", "--root", tmp_path)
    out = call("run.py", *flags).out
    assert out.index("what the attacker has: threat model A") < out.index("plan: ")
