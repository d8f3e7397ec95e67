"""A truth belongs to its checkpoint, by id and digest or by its gradient; how an attack ended."""

import json

import pytest
import torch
import torch.nn.functional as F

from inversion.audit.truth import (
    Arrival,
    Finish,
    arrival,
    check_truth_gradient,
    second_half_fall,
)
from inversion.objective import Losses, Objective
from inversion.settings import Weights
from models.build import build_model
from models.checkpoint import Task, load, load_truth, make_checkpoint, seal
from models.gradient import ClientLoss, batch_gradient
from models.reading import target_from_checkpoint
from models.target import GroundTruth, model_of
from tests.support import MEAN, STD, attack, call, capture_photos, photos, smooth_network, succeed
from utils.tensor_files import save

LENET = ("-a", "lenet", "-b", "3", "--outlayer-state", "keep")


@pytest.fixture(scope="module")
def two_clients(tmp_path_factory):
    """Sealed checkpoints of batches 0 and 1 of one network: index → (checkpoint, truth)."""
    found = {}
    for index in (0, 1):
        folder = tmp_path_factory.mktemp("client")
        path = capture_photos(folder, *LENET, "--seal", "--target-idx", index)
        found[index] = path, next(folder.glob("*-truth.pth.tar"))
    return found


def scored(folder, checkpoint, truth, *flags):
    return call(
        "run.py", "--root", folder, "--checkpoint", checkpoint, "--truth", truth, "--lr", 0.1,
        "--epochs", 1, "--metric", "--no-controls", *flags,
    )  # fmt: skip


def without_binding(path, folder, name, **changes):
    """A copy of a file as versions before ids wrote it, with other changes."""
    content = torch.load(path, weights_only=True)
    names = ("id", "truth_salt", "truth_digest", "checkpoint_digest")
    names += ("checksums",)
    content = {key: value for key, value in content.items() if key not in names} | changes
    save(content | {"format": 3}, str(folder / name))
    return folder / name


def test_the_truth_of_another_batch_is_refused(two_clients, tmp_path):
    outcome = scored(tmp_path, two_clients[0][0], two_clients[1][1])
    assert outcome.code == 2
    assert f"--truth {two_clients[1][1]}: is the truth of another checkpoint" in outcome.err
    assert str(two_clients[0][0]) in outcome.err
    assert list(tmp_path.iterdir()) == []
    assert "what was sent is the truth's gradient (" in scored(tmp_path, *two_clients[0]).out


@pytest.mark.parametrize("part", ["checkpoint", "truth"])
def test_a_changed_part_is_refused(two_clients, tmp_path, part):
    paths = dict(zip(("checkpoint", "truth"), two_clients[0], strict=True))
    content = torch.load(paths[part], weights_only=True)
    del content["checksums"]
    tensor = content["x_true"] if part == "truth" else content["target_gradient"][0]
    tensor.view(-1)[0] += 1e-3
    paths[part] = tmp_path / f"{part}.tar"
    save(content, str(paths[part]))
    outcome = scored(tmp_path / "new", paths["checkpoint"], paths["truth"])
    assert outcome.code == 2
    assert f"--{part} {paths[part]}: has been changed since it was written with" in outcome.err


def test_without_an_id_the_gradient_decides(two_clients, tmp_path):
    ours, theirs = (
        without_binding(two_clients[index][1], tmp_path, f"truth{index}.tar") for index in (0, 1)
    )
    assert scored(tmp_path, two_clients[0][0], ours).code == 0
    outcome = scored(tmp_path, two_clients[0][0], theirs)
    assert outcome.code == 2
    assert f"--truth {theirs}: no id binds its truth to --checkpoint" in outcome.err
    assert str(two_clients[0][0]) in outcome.err
    assert "it belongs to other images" in outcome.err
    known = call(
        "run.py", "--root", tmp_path, "--checkpoint", two_clients[0][0], "--truth", theirs,
        "--lr", 0.1, "--epochs", 1,
    )  # fmt: skip
    assert known.code == 2  # its labels are wrong as well


def test_protection_leaves_the_gradient_of_the_truth_undecided(tmp_path):
    path = capture_photos(tmp_path, *LENET, "--enable-dp", "--sigma", "0.1")
    old = without_binding(path, tmp_path, "old.tar")
    result, folder = attack(tmp_path, old, "--metric", "--no-controls")
    found = result["metrics"]["truth_gradient"]
    assert (found["kind"], found["fits"], found["bound"]) == ("protected", True, False)
    assert found["distance"] > 0.1
    sentence = result["metrics"]["verdict"]["sentence"]
    assert sentence.startswith("incomplete: ")


def test_nobody_can_check_a_guess_by_the_digest(two_clients, tmp_path):
    """Two captures of one batch have other digests, and the salt stays with the truth."""
    again = capture_photos(tmp_path, *LENET, "--seal")
    first, second = load(str(two_clients[0][0])), load(str(again))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first["target_gradient"], second["target_gradient"], strict=True)
    )
    assert first["truth_digest"] != second["truth_digest"]
    assert first["id"] != second["id"]
    assert "truth_salt" not in first
    assert "checkpoint_digest" not in first
    assert "truth_salt" in load_truth(str(two_clients[0][1]))


def test_an_id_that_is_no_text_is_refused(two_clients, tmp_path):
    for key, value in (("id", torch.zeros(2)), ("truth_salt", 3), ("checkpoint_digest", [1])):
        truth = load_truth(str(two_clients[0][1])) | {key: value}
        save(truth, str(tmp_path / "odd.tar"))
        outcome = scored(tmp_path / "new", two_clients[0][0], tmp_path / "odd.tar")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert f"is {type(value).__name__}, not text" in outcome.err


def test_entries_that_nobody_reads_do_not_matter(two_clients, tmp_path):
    """They may be of any plain kind, as a file from elsewhere may hold them."""
    checkpoint = load(str(two_clients[0][0]))
    checkpoint["dataset_setup"] |= {"odd": torch.zeros(2, dtype=torch.complex64), 3: {b"x"}}
    save(checkpoint, str(tmp_path / "more.tar"))
    assert scored(tmp_path / "new", tmp_path / "more.tar", two_clients[0][1]).code == 0


def test_decoys_are_private_and_count_as_truth(tmp_path):
    path = capture_photos(tmp_path, *LENET, "--with-control", "--decoys", "5", "--seal")
    assert "decoys" not in load(str(path))
    truth = load_truth(str(next(tmp_path.glob("*-truth.pth.tar"))))
    assert (truth["decoys"].shape, truth["decoys"].dtype) == ((3, 5, 3, 32, 32), torch.uint8)
    truth["decoys"][0, 0] = 0
    save(truth, str(tmp_path / "changed.tar"))
    outcome = scored(tmp_path / "new", path, tmp_path / "changed.tar")
    assert "has been changed since" in outcome.err
    truth["decoys"] = truth["decoys"].float()
    save(truth, str(tmp_path / "changed.tar"))
    outcome = scored(tmp_path / "new", path, tmp_path / "changed.tar")
    assert "the tensor of decoys is not" in outcome.err


# What the truth's gradient says --------------------------------------------------------------


def sent_by(model, gradient, x, y, *, arch="lenet", truth=None, **options):
    """A checkpoint with its truth, from a gradient recorded by hand."""
    task = Task(arch, len(x), tuple(x.shape[1:]), 8, MEAN, STD, ClientLoss(True))
    return make_checkpoint(model, gradient, task, truth=truth or GroundTruth(x, y), **options)


def local_steps(model, x, y, steps, rate):
    """The weight difference before − after several steps of SGD."""
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(steps):
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters())
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradient, strict=True):
                p -= rate * g
    difference = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    return difference


@pytest.fixture(scope="module")
def updates():
    """What might be taken for the gradient of three photographs: kind → checkpoint."""
    torch.manual_seed(0)
    model = build_model("lenet", 8, (3, 32, 32))
    x, y = photos(3, 32)
    other, _ = photos(3, 32, target_idx=1)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    true = batch_gradient(model, x, y, ClientLoss(True))
    gradients = {
        "same": true,
        "scaled": local_steps(model, x, y, 1, 0.05),
        "opposite": [-g for g in local_steps(model, x, y, 1, 0.05)],
        "near": local_steps(model, x, y, 5, 0.02),
        "unnormalised": batch_gradient(model, x * std + mean, y, ClientLoss(True)),
        "other": batch_gradient(model, other, y, ClientLoss(True)),
    }
    return {kind: sent_by(model, g, x, y) for kind, g in gradients.items()}


@pytest.mark.parametrize(
    ("kind", "distance", "ratio", "words"),
    [
        ("same", (0, 1e-12), (1, 1), "is the truth's gradient ("),
        ("scaled", (0, 1e-8), (0.049, 0.051), "times 0.05, as after one local step"),
        ("opposite", (1.999, 2.001), (0.049, 0.051), "with the opposite sign"),
        ("near", (1e-7, 0.5), (0.02, 0.1), "an update of several local steps"),
        ("unnormalised", (1e-7, 2), (0, 2), "before normalisation"),
        ("other", (1e-7, 1e-3), (0.5, 2), "it belongs to other images"),  # of the same labels
    ],
)
def test_each_kind_of_update_is_named(updates, kind, distance, ratio, words):
    checkpoint = updates[kind]
    target = target_from_checkpoint(checkpoint)
    x, y = checkpoint["x_true"], checkpoint["y_true"]
    found = check_truth_gradient(model_of(target), target, x, y)
    assert found.kind == kind
    assert found.fits == (kind in ("same", "scaled"))
    assert distance[0] <= found.distance <= distance[1]
    assert ratio[0] <= found.norm_ratio <= ratio[1]
    assert words in found.finding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_gradient_is_still_the_truths(updates, dtype):
    checkpoint = updates["same"]
    halves = [g.to(dtype) for g in checkpoint["target_gradient"]]
    target = target_from_checkpoint(checkpoint | {"target_gradient": halves})
    found = check_truth_gradient(
        model_of(target), target, checkpoint["x_true"], checkpoint["y_true"]
    )
    assert found.kind == "same"
    assert found.distance > 1e-9


def test_images_that_are_not_normalised_in_the_truth_are_named(updates):
    checkpoint = updates["same"]
    target = target_from_checkpoint(checkpoint)
    raw = checkpoint["x_true"] * target.std + target.mean
    found = check_truth_gradient(model_of(target), target, raw, checkpoint["y_true"])
    assert (found.kind, found.fits) == ("unnormalised", False)
    assert "x_true holds images that are not normalised" in found.finding


def test_the_other_mode_of_batchnorm_is_named():
    torch.manual_seed(0)
    model = build_model("convnet", 8, (3, 32, 32))
    x, y = photos(3, 32)
    gradient = batch_gradient(model, x, y, ClientLoss(False))
    target = target_from_checkpoint(sent_by(model, gradient, x, y, arch="convnet"))
    found = check_truth_gradient(model, target, x, y)
    assert found.kind == "other mode"
    assert "with BatchNorm in eval mode" in found.finding


def test_an_update_that_is_no_gradient_gives_no_verdict(updates, tmp_path):
    """Bound by its maker, it is attacked; that nothing was found then means nothing."""
    save(updates["opposite"], str(tmp_path / "opposite.tar"))
    result, folder = attack(tmp_path, tmp_path / "opposite.tar", "--metric")
    log = (folder / "log.txt").read_text()
    assert "warning: what was sent is the truth's gradient with the opposite sign" in log
    assert result["metrics"]["truth_gradient"]["kind"] == "opposite"
    assert result["metrics"]["verdict"]["verdict"] == "incomplete"
    save(updates["scaled"], str(tmp_path / "scaled.tar"))
    result, folder = attack(tmp_path, tmp_path / "scaled.tar", "--metric")
    assert "times 0.05, as after one local step" in (folder / "log.txt").read_text()
    assert result["metrics"]["truth_gradient"]["norm_ratio"] == pytest.approx(0.05, rel=1e-3)


# A search and its target --------------------------------------------------------------------


@pytest.mark.parametrize(
    "twin",
    [
        ("--enable-dp", "--sigma", "0.01"),
        ("--enable-dp", "--dp-mode", "per-sample", "-C", "0.1", "--sigma", "0.1"),
        ("--seed", "1"),
    ],
)
def test_a_search_does_not_read_the_truth_of_its_target(captured, tmp_path, twin):
    """Noise, clipping or other weights do not hide the target's images."""
    target, simulation = captured(*LENET), captured(*LENET, *twin)
    flags = (
        "--root", tmp_path, "--checkpoint", target, "--simulation-checkpoint", simulation,
        "--superparameters-search", "--lr-tune", "--epochs", 5, "--dry-run",
    )  # fmt: skip
    outcome = call("run.py", *flags)
    assert outcome.code == 2
    assert "is the target itself, or holds images of it" in outcome.err


def test_other_images_of_the_same_labels_may_be_the_simulation(captured, tmp_path):
    """Their gradient on a random LeNet has nearly the direction of the target's."""
    target = captured(*LENET)
    other = captured(*LENET, "--target-idx", "1", "--distinct-labels", "3")
    checkpoint = load(str(other))
    checkpoint["y_true"] = torch.arange(3)
    model = model_of(target_from_checkpoint(checkpoint))
    gradient = batch_gradient(model, checkpoint["x_true"], checkpoint["y_true"], ClientLoss(True))
    save(sent_by(model, gradient, checkpoint["x_true"], torch.arange(3)), str(tmp_path / "own.tar"))
    flags = (
        "--root", tmp_path, "--checkpoint", target, "--simulation-checkpoint",
        tmp_path / "own.tar", "--superparameters-search", "--lr-tune", "--epochs", 5, "--dry-run",
    )  # fmt: skip
    succeed("run.py", *flags)


def test_a_sealed_target_is_recognised_by_the_gradient_of_its_images(tmp_path):
    target = capture_photos(tmp_path, *LENET, "--seal")
    simulation = capture_photos(tmp_path / "own", *LENET)
    flags = (
        "--root", tmp_path, "--checkpoint", target, "--simulation-checkpoint", simulation,
        "--superparameters-search", "--lr-tune", "--epochs", 5, "--labels", "0,1,2", "--dry-run",
    )  # fmt: skip
    assert "is the target itself" in call("run.py", *flags).err
    other = capture_photos(tmp_path / "other", *LENET, "--target-idx", "1")
    assert succeed("run.py", *flags, "--simulation-checkpoint", other)


# Finished, and why not ----------------------------------------------------------------------


def test_the_value_without_a_graph_is_the_objective():
    torch.manual_seed(0)
    model = smooth_network(8)
    x, y = photos(4, 16)
    x = x.double()
    gradient = batch_gradient(model, x, y, ClientLoss(True))
    checkpoint = sent_by(model, gradient, x, y, arch="own")
    weights = Weights(2.0, {"tv": 0.1, "bn": 0.01}, {"tv": 0.01})
    objective = Objective(model, target_from_checkpoint(checkpoint), y, weights)
    start = torch.randn_like(x)
    slow, fast = objective(start, 0.5).floats(), objective.value(start, 0.5).floats()
    assert fast.total == pytest.approx(slow.total, rel=1e-10)
    assert fast.gradient == pytest.approx(slow.gradient, rel=1e-10)
    assert fast.terms == pytest.approx(slow.terms, rel=1e-10)
    order = torch.tensor([2, 0, 3, 1])
    at = arrival(objective, start, x[order], y[order])
    assert at.truth.gradient < 1e-20
    assert at.reconstruction.total == pytest.approx(objective(start, 1.0).total.item())
    assert not at.arrived
    assert at.reason.startswith("the optimiser did not arrive: ")


@pytest.mark.parametrize(
    ("finish", "doubt"),
    [
        ((0.5,), "its loss was still falling"),
        ((None,), "the attack had one iteration"),
        ((0.0, "not finite"), "the attack ended early (not finite)"),
        ((0.0,), None),
        ((None, None, "conv1: the mask is not known"), None),
        ((None, None, "conv1: about 9 MiB, more than the 8 MiB of --max-memory"), "a limit of"),
    ],
)
def test_what_leaves_a_doubt_of_an_attack_that_did_not_arrive(finish, doubt):
    low, high = Losses(0.5, 0.4, {}), Losses(0.7, 0.6, {})
    fall, *stopped = finish
    found = Finish(fall, Arrival(truth=low, reconstruction=high), *stopped)
    assert found.doubt is None if doubt is None else doubt in found.doubt
    assert Finish(fall, Arrival(truth=high, reconstruction=low), *stopped).doubt is None


def test_the_second_half_of_a_curve_tells_whether_it_falls():
    assert second_half_fall([3.0]) is None
    assert second_half_fall([4.0, 2.0]) == 0.5
    assert second_half_fall([1 / (k + 1) for k in range(100)]) > 0.4
    assert abs(second_half_fall([9.0] * 5 + [1.0] * 40)) < 1e-12


def test_an_objective_that_prefers_another_image_is_said():
    low, high = Losses(0.5, 0.4, {}), Losses(0.7, 0.6, {})
    found = Arrival(truth=high, reconstruction=low)
    assert found.arrived
    assert found.reason.startswith("this objective does not single the truth out: it is 0.7 there")


def test_iterations_must_be_given(captured, tmp_path):
    flags = ("--root", tmp_path, "--checkpoint", captured(*LENET), "--lr", 0.1, "--metric")
    outcome = call("run.py", *flags)
    assert outcome.code == 2
    assert outcome.err.startswith("error: --epochs: missing; give the number of iterations")


def test_an_attack_that_was_cut_short_is_no_sign_of_safety(captured, tmp_path):
    """It says that the loss still fell before it says anything else."""
    path = captured(*LENET, "--with-control")
    flags = ("--lr", 0.05, "--grad-sign", "--metric", "--TV", 1e-4)
    result, folder = attack(tmp_path, path, *flags, "--epochs", 12)
    log = (folder / "log.txt").read_text()
    found = result["metrics"]["attack"]
    assert found["loss_fall"] > 0.1
    assert not found["arrived"]
    assert "the loss was still falling: by" in log
    said = log.index("gradient loss", log.index("control, other gradient"))
    assert said < log.index(result["metrics"]["verdict"]["sentence"])
    assert result["metrics"]["verdict"]["verdict"] != "no leakage shown"
    assert "at the truth 0" in log
    assert json.dumps(found, allow_nan=False)


def test_sealing_keeps_the_id_on_both_sides(updates):
    checkpoint, truth = seal(updates["same"])
    assert checkpoint["id"] == truth["id"] == updates["same"]["id"]
    assert not {"x_true", "decoys", "truth_salt", "checkpoint_digest"} & checkpoint.keys()
