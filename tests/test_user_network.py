"""A network of the user's, binary cross-entropy, non-square images: both scripts, end to end."""

import csv
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inversion.audit.inputs import make_case
from inversion.audit.interface import MATCHING, audit_gradient, ground_truth
from inversion.audit.subject import chance_of_labels
from inversion.layerwise.head import head_features
from inversion.objective import Objective
from inversion.pixel_gradient import exact
from inversion.search.trial import Problem
from inversion.search.tune import carry_user_network
from inversion.settings import AttackSettings, Loop, Weights
from models.build import find_head
from models.checkpoint import Task, check_labels, load, load_truth, make_checkpoint
from models.forced import forced_normalisation, forced_statistics
from models.gradient import (
    ClientLoss,
    batch_gradient,
    per_sample_gradients,
    trainable_parameters,
    whole_batch_gradient,
)
from models.losses import image_losses, output_problem
from models.reading import target_from_checkpoint
from models.target import GroundTruth, model_of
from models.user_network import load_user_network, probe
from tests.support import ROOT, attack, call, scored, smooth_network, succeed
from tests.test_datasets import image_folder
from train.flags import image_size
from train.label_vectors import label_vectors, output_count, read_label_file
from train.photos import photo_batch
from train.request import Request
from train.variation import base_flags, simulate
from utils.errors import InputError
from utils.image_files import decode
from utils.matching import label_numbers
from utils.metrics import label_accuracy
from utils.shard import ALONE
from utils.tensor_files import save

TINY = ROOT / "tests" / "networks" / "tiny.py"
BCE = ClientLoss(train_mode=False, kind="bce")
PHOTOS = ("--data-name", "photos", "--image-size", "12x16", "--outlayer-state", "keep")


def capture(folder, network, *flags):
    """Capture photographs of 12 × 16 pixels under a network of tiny.py; return the checkpoint."""
    succeed("training.py", *PHOTOS, "--model", f"{TINY}:{network}", "--results", folder, *flags)
    (path,) = folder.glob("*-checkpoint.pth.tar")
    return path


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    return capture(folder, "UNet", "-b", "2", "--with-control", "--decoys", "19", "--upload-bn")


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("binary")
    flags = ("--loss", "bce", "--channels", "1", "--distinct-labels", "2", "--mean", "0.5")
    flags += ("--std", "0.25", "--with-control", "--decoys", "9", "--seal")
    return capture(folder, "DenseNet", "-b", "4", *flags)


# Whole runs ----------------------------------------------------------------------------------


def test_a_unet_from_a_file_is_audited(unet, tmp_path):
    checkpoint = load(str(unet))
    assert unet.name == "idtest_tiny-UNet_random_photos_b2_i0-checkpoint.pth.tar"
    assert checkpoint["arch"] == "tiny.py:UNet"
    assert len(checkpoint["model_sha256"]) == 64
    assert checkpoint["dataset_setup"]["size"] == (3, 12, 16)
    flags = ("--model", f"{TINY}:UNet", "--metric", "--epochs", "25", "--bn-coupling", "forced")
    result, folder = attack(tmp_path, unet, *flags, "--grad-sign")
    assert result["target"]["arch"] == "tiny.py:UNet"
    assert result["metrics"]["truth_gradient"]["kind"] == "same"
    assert result["metrics"]["controls"].keys() == {"mean image", "prior only", "other gradient"}
    assert result["metrics"]["verdict"]["sentence"]
    assert result["metrics"]["identification"]["candidates"] == 20
    rows = (folder / "losses.csv").read_text().splitlines()
    losses = [float(row["gradient"]) for row in csv.DictReader(rows)]
    assert result["losses"]["gradient"] < 0.5 * losses[0]  # through skip connections
    assert (folder / "pairs.png").exists()


def test_a_binary_densenet_of_grey_images_is_audited(binary, tmp_path):
    checkpoint = load(str(binary))
    assert checkpoint["loss"] == "bce"
    assert checkpoint["dataset_setup"]["n_classes"] == 1
    assert checkpoint["dataset_setup"]["mean"] == [0.5]
    truth = binary.with_name(binary.name.replace("-checkpoint", "-truth"))
    flags = ("--model", f"{TINY}:DenseNet", "--truth", truth, "--metric", "--GInfoR")
    result, folder = attack(tmp_path, binary, *flags, "--epochs", "5")
    assert result["target"]["loss"] == "bce"
    assert result["metrics"]["truth_gradient"]["fits"]
    assert [image["label_true"] for image in result["metrics"]["images"]] == [[0], [1], [0], [1]]
    assert {image["reconstruction"] for image in result["metrics"]["images"][::2]} == {0, 2}
    assert result["labels"]["accuracy"] == 1
    assert result["information"]["label"] == [[0], [1], [0], [1]]
    assert "0 / 0" in (folder / "log.txt").read_text()
    given = attack(tmp_path, binary, *flags[:2], "--labels", "0,1,0,1")[0]
    assert given["labels"]["reconstructed"] == [[0], [1], [0], [1]]


def test_several_findings_per_image_come_from_a_csv_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "scans", classes=("a",), count=12, size=(20, 30), mode="L")
    files = sorted((tmp_path / "scans" / "a").iterdir())
    with open("labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "cardiomegaly", "effusion", "nodule"])
        for i, path in enumerate(files):
            rows.writerow([f"a/{path.name}", i % 2, 1, (i + 1) % 2])
    flags = ("--data-name", "folder", "--data", "scans", "--labels-csv", "labels.csv")
    flags += ("--loss", "bce", "--image-size", "12,16", "--channels", "1", "-b", "4")
    flags += ("--with-control", "--decoys", "1", "--outlayer-state", "keep", "--model-eval")
    shutil.copy(TINY, "net.py")
    shutil.copy(TINY.with_name("beside.py"), "beside.py")
    private = ("--enable-dp", "--dp-mode", "per-sample", "-C", "1", "--results", ".")
    outcome = succeed("training.py", *flags, "--model", "net.py:DenseNet", *private)
    assert "2 distinct label vectors of 3 outputs" in outcome.out
    (path,) = tmp_path.glob("*-checkpoint.pth.tar")
    checkpoint = load(str(path))
    assert sorted(map(tuple, checkpoint["y_true"].tolist()))[0] in {(0, 1, 1), (1, 1, 0)}
    result, folder = attack(tmp_path, path, "--model", "net.py:DenseNet", "--metric", "--controls")
    assert len(result["metrics"]["images"][0]["label"]) == 3
    assert result["metrics"]["identification"]["candidates"] == 2
    y = checkpoint["y_true"].int()
    rows = "\n".join(" ".join(map(str, row)) for row in y.tolist())
    (tmp_path / "y.txt").write_text(rows)
    given = attack(tmp_path, path, "--model", "net.py:DenseNet", "--labels", "y.txt")[0]
    assert given["labels"]["reconstructed"] == y.tolist()


def test_two_processes_run_the_file_too(unet, tmp_path, in_two_processes):
    network = ("--model", f"{TINY}:UNet")
    alone = attack(tmp_path, unet, *network)[0]
    together = attack(tmp_path, unet, *network, "--nproc", "2")[0]
    assert together["processes"] == 2
    assert together["losses"]["total"] == pytest.approx(alone["losses"]["total"], rel=1e-4)
    flags = ("--dry-run", "--nproc", "2", "-b", "2", "--model", f"{TINY}:DenseNet", "--loss", "bce")
    succeed("training.py", *PHOTOS, *flags, "--results", tmp_path)


def test_weights_from_a_file_are_loaded_and_the_head_is_found_where_the_logits_are(tmp_path):
    torch.manual_seed(3)
    builder = load_user_network(f"{TINY}:UNet")
    model = builder(8, (3, 12, 16))
    assert find_head(model)[0] == "last"  # by the order of the modules
    probe(model, 8, (3, 12, 16), builder.path)
    assert find_head(model)[0] == "head"
    torch.save({"model": {f"model.{n}": v for n, v in model.state_dict().items()}}, tmp_path / "w")
    flags = ("--pretrained", tmp_path / "w", "-b", "2", "--dry-run")
    outcome = succeed("training.py", *PHOTOS, "--model", f"{TINY}:UNet", *flags)
    assert "head head (8, 16): keep" in outcome.out
    kept = capture(tmp_path, "UNet", *flags[:4])
    for name, value in load(str(kept))["state_dict"].items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_network_without_a_convolution_or_with_a_function_behind_its_head(tmp_path):
    flags = ("--data-name", "photos", "--image-size", "8x16", "-b", "3", "--results", tmp_path)
    image = ("--loss", "bce", "--distinct-labels", "2")
    refused = call("training.py", *flags, "--model", f"{TINY}:no_head")
    assert "--outlayer-state normal: tiny.py:no_head: the outputs of no linear" in refused.err
    capture(tmp_path, "no_head", "-b", "2")
    refused = call("training.py", *flags, *image, "--model", f"{TINY}:Attention")
    assert "its output for 2 images is (2, 3), not the logits (2, 1)" in refused.err
    x, y = torch.rand(3, 3, 8, 16), torch.arange(3)
    loss, network = ClientLoss(True), load_user_network(f"{TINY}:Attention")
    torch.manual_seed(0)
    model = network(3, (3, 8, 16))
    sent = whole_batch_gradient(model, x, y, loss, moments=True)
    task = Task("any", 3, (3, 8, 16), 3, [0] * 3, [1] * 3, loss)
    target = target_from_checkpoint(make_checkpoint(model, sent, task), network)
    objective = Objective(model_of(target), target, y, Weights())
    assert objective.value(x).gradient < 1e-6
    assert exact(objective, torch.rand_like(x), 0.0)[1].abs().max() > 0


# Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ("as_tuple", "it returns a tuple of 2, not one tensor of logits; return the logits alone"),
        ("as_dict", "it returns a dict with out, aux, not one tensor of logits"),
        ("as_map", "its output for 2 images is (2, 8, 12, 16), not the logits (2, 8): a map, as"),
        ("squeezed", "its output for 2 images is (2,), not the logits (2, 8)"),
        ("seven", "(2, 7), not the logits (2, 8): give it one output per class of the data"),
        ("random", "its output is random: two passes of the same images differ; use nn.Dropout"),
        ("broken_forward", "cannot process images (3, 12, 16): tiny.py, line "),
        ("broken", "IndexError: tuple index out of range"),
        ("nothing", "tiny.py:nothing returns NoneType, not an nn.Module"),
        ("three", "tiny.py:three(one, two, three) can be called neither with (num_classes, image"),
        ("network", "network is a network, not a function that builds one"),
        ("missing", "tiny.py defines no function missing"),
    ],
)
def test_what_is_no_classifier_is_refused_in_one_line(network, says):
    outcome = call("training.py", *PHOTOS, "-b", "2", "--model", f"{TINY}:{network}", "--dry-run")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert f"--model {TINY}:{network}: " in outcome.err
    assert says in outcome.err


def test_errors_of_the_file_are_named_with_file_and_line(tmp_path):
    for content, says in (
        ("import torch\n\nx = 1 / 0\n", "net.py, line 3: ZeroDivisionError: division by zero"),
        ("def build(:\n", "net.py, line 1: SyntaxError: invalid syntax"),
        ("import no_such_package\n", "net.py, line 1: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(3)\n", "net.py, line 2: SystemExit: 3"),
    ):
        (tmp_path / "net.py").write_text(content)
        with pytest.raises(InputError) as refused:
            load_user_network(f"{tmp_path}/net.py:build")
        assert str(refused.value).startswith(says)
    for text, says in (("net", "is not FILE.py:function"), ("no.py:f", "no.py: No such file")):
        with pytest.raises(InputError, match=says):
            load_user_network(text)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--loss", "bce", "--label-smoothing", "0.1"), "--label-smoothing 0.1: moves a share"),
        (("--mean", "0.5"), "--mean: a normalisation has both; give --std as well"),
        (("--mean", "0.5", "--std", "1,1"), "--std: 2 numbers, --mean has 1"),
        (("--mean", "0.5", "--std", "1", "-a", "lenet"), "--mean: 1 numbers for images of 3"),
        (("--std", "0,1,1", "--mean", "0,0,0"), "argument --std: 0 must be above 0"),
        (("--image-size", "8x8x8"), "argument --image-size: '8x8x8' is neither a side nor HxW"),
        (("--image-size", "8x0"), "argument --image-size: 0 is below 1"),
        (("-a", "lenet", "--model", "net.py:f"), "--arch lenet: --model net.py:f is the network"),
        (("--labels-csv", "y.csv"), "--labels-csv y.csv: only for --data-name folder"),
    ],
)
def test_flags_that_contradict_one_another(flags, says):
    outcome = call("training.py", "--data-name", "photos", "-b", "2", *flags, "--dry-run")
    assert outcome.code == 2
    assert says in outcome.err


def test_a_checkpoint_of_a_users_network_needs_the_file_again(unet, tmp_path):
    flags = ("--checkpoint", unet, "--epochs", "1", "--lr", "0.1", "--root", tmp_path)
    refused = call("run.py", *flags)
    assert "its network tiny.py:UNet came from a file of its user, whose code no" in refused.err
    assert "give --model FILE.py:function" in refused.err
    refused = call("run.py", *flags, "--model", f"{TINY}:DenseNet")
    assert "its weights are not those of tiny.py:UNet for 8 classes: missing first" in refused.err
    shutil.copy(TINY.with_name("beside.py"), tmp_path)
    (tmp_path / "tiny.py").write_text(TINY.read_text() + "\n# changed\n")
    outcome = succeed("run.py", *flags, "--dry-run", "--model", f"{tmp_path}/tiny.py:UNet")
    assert "warning: tiny.py:UNet is not the file that the client built its network" in outcome.out
    assert "warning" not in succeed("run.py", *flags, "--dry-run", "--model", f"{TINY}:UNet").out


def test_code_is_never_taken_from_a_checkpoint(unet, tmp_path, monkeypatch):
    """Whatever its `arch` says: a file of that name, even beside the scripts, is not run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\ndef f(): raise SystemExit\n")
    for arch in ("evil.py:f", f"{tmp_path}/evil.py:f", "evil"):
        save(load(str(unet)) | {"arch": arch}, "changed.tar")
        flags = ("--checkpoint", "changed.tar", "--epochs", "1", "--lr", "0.1")
        assert call("run.py", *flags).code == 2
        assert not (tmp_path / "ran").exists()


def test_a_network_of_the_list_needs_no_file(captured):
    checkpoint = captured("-a", "lenet", "-b", "2")
    flags = ("--checkpoint", checkpoint, "--epochs", "1", "--lr", "0.1")
    refused = call("run.py", *flags, "--model", f"{TINY}:UNet")
    assert f"--model {TINY}:UNet: the checkpoint's network is lenet, of no file" in refused.err


def test_what_matching_and_labels_cannot_do_is_refused(binary, tmp_path):
    truth = binary.with_name(binary.name.replace("-checkpoint", "-truth"))
    flags = ("--checkpoint", binary, "--truth", truth, "--epochs", "1", "--lr", "0.1")
    flags += ("--model", f"{TINY}:DenseNet")
    refused = call("run.py", *flags, "--pseudo-label-init", "from_grads")
    assert "from_grads: the published counts rest on softmax cross-entropy" in refused.err
    given = (*flags[:2], *flags[4:], "--labels")
    refused = call("run.py", *given, "0,1,2,0")
    assert "--labels 0,1,2,0: labels 0 to 2, not from 0 to 1; give 4 rows of 1" in refused.err
    refused = call("run.py", *given, "0,1")
    assert "(2,), not floating-point numbers (4, 1)" in refused.err
    refused = call("run.py", *flags[:4], *flags[8:], "--attack", "layerwise")
    assert "--attack layerwise: " in refused.err
    folder = tmp_path / "hard"
    hard = capture(folder, "no_second_derivative", "-b", "2")
    flags = ("--checkpoint", hard, "--epochs", "1", "--lr", "0.1", "--root", tmp_path)
    refused = call("run.py", *flags, "--model", f"{TINY}:no_second_derivative")
    assert "its gradient cannot be differentiated by the images: " in refused.err


# The loss ------------------------------------------------------------------------------------


def slow_bce(logits, y):
    """Mean over images and outputs, as the definition has it."""
    p = 1 / (1 + torch.exp(-logits))
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("train_mode", [True, False])
def test_the_gradient_of_bce_is_that_of_the_definition(outputs, train_mode):
    torch.manual_seed(0)
    model = smooth_network(outputs)
    x, y = torch.rand(5, 3, 12, 8).double(), torch.randint(2, (5, outputs)).float()
    loss = ClientLoss(train_mode, kind="bce")
    gradient = batch_gradient(model, x, y, loss)
    model.train(train_mode)
    slow = torch.autograd.grad(slow_bce(model(x), y.double()), [*model.parameters()])
    torch.testing.assert_close(gradient, slow)
    logits = model(x)
    torch.testing.assert_close(image_losses(logits, y, loss).mean(), slow_bce(logits, y.double()))
    if train_mode:
        return
    shares = [batch_gradient(model, x[p], y[p], loss, total=5) for p in (slice(2), slice(2, 5))]
    torch.testing.assert_close(tuple(a + b for a, b in zip(*shares, strict=True)), slow)
    chunks = [*per_sample_gradients(model, x, y, loss, chunk_bytes=1)]
    for i, chunk in enumerate(chunks):
        own = batch_gradient(model, x[i : i + 1], y[i : i + 1], loss)
        torch.testing.assert_close(tuple(g[0] for g in chunk), own)


def test_the_pixel_gradient_of_bce_is_the_difference_quotient():
    torch.manual_seed(1)
    model, objective = bce_objective(train_mode=True)
    x, direction = torch.rand(2, 1, 3, 12, 8).double()[0], torch.randn(1, 3, 12, 8).double()
    x, direction = x.repeat(3, 1, 1, 1), direction.repeat(3, 1, 1, 1)
    x += 0.1 * torch.randn_like(x)
    derivative = (exact(objective, x, 0.0)[1] * direction).sum()
    values = [objective.value(x + step * direction).total for step in (1e-5, -1e-5)]
    assert derivative.item() == pytest.approx((values[0] - values[1]).item() / 2e-5, rel=1e-5)


def bce_objective(train_mode):
    """A smooth network of four outputs and the objective of a batch of three."""
    model = smooth_network(4)
    x, y = torch.rand(3, 3, 12, 8).double(), torch.randint(2, (3, 4)).float()
    loss = ClientLoss(train_mode, kind="bce")
    sent = whole_batch_gradient(model, x, y, loss, moments=True)
    task = Task("any", 3, (3, 12, 8), 4, [0] * 3, [1] * 3, loss)
    checkpoint = make_checkpoint(model, sent, task, truth=GroundTruth(x, y))
    target = target_from_checkpoint(checkpoint)
    assert target.loss == loss
    return model, Objective(model, target, y, Weights())


def test_forced_statistics_give_the_gradient_of_bce_too():
    torch.manual_seed(2)
    model = smooth_network(2)
    x, y = torch.rand(4, 3, 8, 12).double(), torch.randint(2, (4, 2)).float()
    loss = ClientLoss(True, kind="bce")
    sent = whole_batch_gradient(model, x, y, loss, moments=True)
    task = Task("any", 4, (3, 8, 12), 2, [0] * 3, [1] * 3, loss)
    target = target_from_checkpoint(make_checkpoint(model, sent, task))
    with forced_normalisation(model, forced_statistics(model, target), 4) as added:
        forced = batch_gradient(model, x, y, loss, added=added)
    torch.testing.assert_close(forced, sent.gradient)


def test_the_head_of_bce_is_solved_for_its_features():
    torch.manual_seed(0)
    weight, bias = 0.1 * torch.randn(9, 40).double(), 0.1 * torch.randn(9).double()
    weight.requires_grad_(), bias.requires_grad_()
    features, y = torch.rand(5, 40).double(), torch.randint(2, (5, 9)).double()
    loss = F.binary_cross_entropy_with_logits(features @ weight.T + bias, y)
    gradients = torch.autograd.grad(loss, (weight, bias))
    head = head_features(
        weight.detach(), bias.detach(), gradients[0], y, bias_gradient=gradients[1]
    )
    assert head.rank == 5
    torch.testing.assert_close(head.features, features)
    wrong = head_features(
        weight.detach(), bias.detach(), gradients[0], 1 - y, bias_gradient=gradients[1]
    )
    assert wrong.residual > 0.01


def test_a_multi_label_gradient_is_solved_layer_by_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 5, 2, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 6 * 4, 6)
    )
    x, y = torch.rand(2, 1, 12, 8), torch.tensor([[1.0, 0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 0]])
    sent = whole_batch_gradient(model.double(), x.double(), y, BCE)
    task = Task("any", 2, (1, 12, 8), 6, [0], [1], BCE)
    target = target_from_checkpoint(make_checkpoint(model, sent, task))
    settings = AttackSettings(Weights(), Loop(1, 0.1), method="layerwise")
    case = make_case(settings, model, target, y, None, torch.device("cpu"), ALONE)
    from inversion.layerwise.attack import layerwise_attack

    found = layerwise_attack(case.objective.model, target, y, torch.rand(20, 1, 12, 8).double())
    assert found.method == "solved"
    assert (found.images - x).abs().max() < 1e-6


def test_output_problem_names_what_is_missing():
    assert not output_problem(torch.zeros(2, 1), 2, 1)
    assert output_problem(torch.zeros(2), 2, 1).endswith("do not squeeze the last dimension")
    assert output_problem([1], 2, 3).startswith("it returns a list of 1, not one tensor")


# Labels --------------------------------------------------------------------------------------


def test_label_vectors_come_from_classes():
    assert label_vectors(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert label_vectors(torch.tensor([1, 0]), 1).tolist() == [[1], [0]]
    assert label_vectors(torch.tensor([1, 1]), 1).tolist() == [[1], [1]]
    assert label_vectors(torch.tensor([3, 6, 3]), 1).tolist() == [[0], [1], [0]]
    bce = Request(loss="bce")
    assert [output_count(k, bce) for k in (1, 2, 3)] == [1, 1, 3]
    assert output_count(8, Request(loss="bce", distinct_labels=2)) == 1
    assert output_count(2, Request()) == 2


def test_a_file_of_labels_is_read_and_its_faults_are_named(tmp_path):
    image_folder(tmp_path, classes=("a",), count=2)
    names = [f"a/{path.name}" for path in sorted((tmp_path / "a").iterdir())]
    path = tmp_path / "labels.csv"
    path.write_text(f"file,x,y\n{names[1]},1,0.5\n\n{names[0]},0,1\n")
    found = read_label_file(str(path), str(tmp_path))
    assert found.classes == ["x", "y"]
    assert found.labels == [(1, 0.5), (0, 1)]
    for line, says in (
        ("a/no.png,0,1", "line 3: .* holds no file a/no.png"),
        (f"{names[1]},0,1", "line 3: .* comes twice"),
        (f"{names[0]},0", "line 3: 1 labels for 2 classes"),
        (f"{names[0]},0,-1", "line 3: '-1' is no label"),
        (f"{names[0]},0,", "line 3: '' is no label"),
    ):
        path.write_text(f"file,x,y\n{names[1]},1,0\n{line}\n")
        with pytest.raises(InputError, match=says):
            read_label_file(str(path), str(tmp_path))
    path.write_text("file,x\n")
    with pytest.raises(InputError, match="needs a header line"):
        read_label_file(str(path), str(tmp_path))


def test_images_are_paired_within_equal_label_vectors():
    torch.manual_seed(0)
    true = torch.rand(3, 1, 12, 16)
    y = torch.tensor([[1.0, 0], [1, 1], [1, 0]])
    order = [1, 2, 0]  # image 0 lies where the labels are those of image 1
    found, y_found = true[order], y[[0, 0, 1]]
    scores, text = scored(found, true, y_found, y)
    pairs = {image["true"]: image["reconstruction"] for image in scores["images"]}
    assert pairs[1] == 2  # the only one with its label, although image 0 is nearer
    assert "11 / 11" in text
    assert "label accuracy 100.0 %" in text
    numbers = label_numbers(y_found, y)
    assert (numbers[0][:, None] == numbers[1][None]).tolist() == [
        [True, False, True], [True, False, True], [False, True, False]
    ]  # fmt: skip
    assert label_numbers(torch.tensor([3, 1]), torch.tensor([1, 3]))[0].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (torch.zeros(2), "of shape (2,), not floating-point numbers (2, 3)"),
        (torch.zeros(2, 3).long(), "are torch.int64"),
        (torch.full((2, 3), 2.0), "labels 2 to 2, not from 0 to 1"),
        (torch.full((2, 3), torch.nan), "is not finite"),
        ([1, 0], "are [1, 0], not numbers (2, 3)"),
    ],
)
def test_label_vectors_of_a_file_are_checked(y, says):
    with pytest.raises(InputError) as refused:
        check_labels(y, 2, 3, "bce")
    assert says in str(refused.value)
    check_labels(torch.rand(2, 3), 2, 3, "bce")


# Images and the rest -------------------------------------------------------------------------


def test_images_may_be_wider_than_high(tmp_path):
    assert image_size("24") == 24
    assert image_size("24x32") == image_size("24,32") == (24, 32)
    square, wide = (photo_batch(2, 0, size, seed=0)[0] for size in (24, (24, 48)))
    assert wide.shape == (2, 3, 24, 48)
    grey = photo_batch(2, 1, (8, 4), seed=0, channels=1)[0]
    colours = photo_batch(2, 1, (8, 4), seed=0)[0]
    assert grey.shape == (2, 1, 8, 4)
    luma = (colours * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert (grey - luma).abs().max() < 0.02
    assert torch.equal(photo_batch(2, 0, (24, 24), seed=0)[0], square)
    image_folder(tmp_path, classes=("a",), count=1, size=(60, 40))
    (path,) = (tmp_path / "a").iterdir()
    assert torch.equal(decode(str(path), 3, (16, 16)), decode(str(path), 3, 16))
    whole, part = decode(str(path), 3, (20, 30)), decode(str(path), 3, (20, 20))
    assert whole.shape == (3, 20, 30)
    torch.testing.assert_close(whole[:, :, 5:25], part)


def test_the_networks_of_the_list_take_such_images(tmp_path):
    for arch in ("lenet", "convnet"):
        flags = ("-a", arch, "-b", "2", "--dry-run", "--results", tmp_path)
        outcome = succeed("training.py", *PHOTOS, *flags, "--channels", "1")
        assert "2 images (1, 12, 16)" in outcome.out


def test_a_searched_network_reaches_a_process_that_cannot_import_it(unet, tmp_path):
    from ray import cloudpickle

    shutil.copy(TINY.with_name("beside.py"), tmp_path)
    shutil.copy(TINY, tmp_path / "only_here.py")
    builder = load_user_network(f"{tmp_path}/only_here.py:DenseNet")
    model = builder(2, (1, 12, 16))
    loss = ClientLoss(False)
    x, y = torch.rand(2, 1, 12, 16), torch.tensor([0, 1])
    sent = whole_batch_gradient(model, x, y, loss)
    task = Task("only_here.py:DenseNet", 2, (1, 12, 16), 2, [0], [1], loss)
    target = target_from_checkpoint(make_checkpoint(model, sent, task), builder)
    problem = Problem(model, target, GroundTruth(x, y), y, AttackSettings(Weights(), Loop(1, 0.1)))
    carry_user_network(problem)
    (tmp_path / "problem").write_bytes(cloudpickle.dumps(problem))
    code = (
        f"import pickle; p = pickle.load(open('{tmp_path}/problem', 'rb'));"
        "print(p.target.builder.name, sum(q.numel() for q in p.model.parameters()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(TINY.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    count = sum(p.numel() for p in trainable_parameters(model).values())
    assert done.stdout.split() == ["only_here.py:DenseNet", str(count)]
    assert pickle.loads(pickle.dumps(target)).builder == builder


def test_the_examples_of_the_documentation_build_what_they_say():
    for name, shape, classes in (("unet", (3, 24, 32), 8), ("densenet_bce", (1, 24, 32), 3)):
        builder = load_user_network(f"{ROOT}/docs/examples/{name}.py:build")
        model = builder(classes, shape)
        probe(model, classes, shape, builder.path)
        assert find_head(model)[1].weight.shape[0] == classes


# With the other parts ------------------------------------------------------------------------


def test_a_sweep_runs_the_file_of_the_command_line_and_never_that_of_a_checkpoint(binary, tmp_path):
    truth = load_truth(str(binary.with_name(binary.name.replace("-checkpoint", "-truth"))))
    with pytest.raises(InputError, match="came from a file of its user; give --model"):
        base_flags(truth["args"])
    with pytest.raises(InputError, match="one of the list; leave --model out"):
        base_flags({**truth["args"], "model": None}, "net.py:f")
    record = {**truth["args"], "model": f"{tmp_path}/evil.py:f"}
    flags = base_flags(record, f"{TINY}:DenseNet")
    again, command = simulate(flags, "", "", 0, 1, torch.device("cpu"))
    assert torch.equal(again["x_true"], truth["x_true"])
    assert torch.equal(again["y_true"], truth["y_true"])
    assert "--image-size=12,16" in command
    assert "evil" not in command


def test_the_python_interface_takes_label_vectors():
    torch.manual_seed(0)
    model = smooth_network(2).float()
    images, pool = torch.rand(2, 3, 12, 16), torch.rand(8, 3, 12, 16)
    labels = [[1, 0], [1, 1]]
    task = Task("any", 2, (3, 12, 16), 2, [0] * 3, [1] * 3, BCE)
    truth = ground_truth(model, task, images, labels, pool, 4 * labels)
    assert truth.y.tolist() == labels
    assert truth.decoys.shape[:2] == (2, 3)
    gradient = batch_gradient(model, images, truth.y, BCE)
    found = audit_gradient(model, gradient, task, MATCHING, truth=truth, steps=2, controls=False)
    assert found.scores["images"][0]["label_true"] == [1, 0]
    given = audit_gradient(model, gradient, task, MATCHING, labels=labels, steps=2)
    assert given.case.y.tolist() == labels


def test_the_chance_of_label_vectors_is_that_of_all_vectors():
    y = torch.tensor([[0.0, 1], [0, 1], [1, 1]])
    cases = torch.cartesian_prod(*3 * [torch.arange(4)])  # three vectors of four, as numbers
    true = torch.tensor([1, 1, 3])
    share = sum(label_accuracy(case, true) for case in cases) / len(cases)
    assert chance_of_labels(y, 2) == pytest.approx(share)
