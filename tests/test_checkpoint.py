"""Checkpoints: what they hold, what is refused, and that a failed write harms nothing."""

import argparse
import datetime
import os
import pickle
import resource
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from models.gradient import batch_gradient
from models.target import model_of, target_from_checkpoint, truth_from_checkpoint
from tests.support import ROOT, attack, call, smooth_network, succeed
from utils.checkpoint import FORMAT, free_path, load, load_truth, make_checkpoint, save, seal
from utils.cli import FaultError, InputError

KEYS = {
    "clock", "batch_size", "dataset_setup", "arch", "model_eval", "state_dict",
    "free_last_layers_list", "target_gradient", "bn_mean_list", "bn_var_list", "x_true", "y_true",
    "args",
}  # fmt: skip


def test_keys_and_plain_types(captured):
    path = captured("-a", "convnet", "-b", "4", "--upload-bn")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == KEYS | {"format", "trainable"}
    assert checkpoint["format"] == FORMAT
    assert datetime.datetime.fromisoformat(checkpoint["clock"])
    assert checkpoint["dataset_setup"].keys() == {"mean", "std", "size", "n_classes"}
    assert checkpoint["dataset_setup"]["size"] == (3, 32, 32)
    assert len(checkpoint["dataset_setup"]["mean"]) == 3
    assert checkpoint["free_last_layers_list"] == ["all"]
    assert checkpoint["x_true"].shape == (4, 3, 32, 32)
    assert checkpoint["args"]["batch_size"] == 4
    assert path.name == "idtest_convnet_random_photos_b4_i0-checkpoint.pth.tar"


def test_capture_is_the_gradient_of_the_mean_cross_entropy(captured):
    """Against a plain backward pass, and BN statistics against hooks of another make."""
    checkpoint = load(str(captured("-a", "convnet", "-b", "4", "--upload-bn")))
    model = model_of(target_from_checkpoint(checkpoint)).train()
    inputs = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    loss = nn.CrossEntropyLoss()(model(checkpoint["x_true"]), checkpoint["y_true"])
    loss.backward()
    for parameter, g in zip(model.parameters(), checkpoint["target_gradient"], strict=True):
        torch.testing.assert_close(parameter.grad, g)
    for x, mean, var in zip(
        inputs, checkpoint["bn_mean_list"], checkpoint["bn_var_list"], strict=True
    ):
        flat = x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(flat.mean(1), mean)
        torch.testing.assert_close(flat.var(1, correction=0), var)


def test_a_second_capture_overwrites_nothing(tmp_path):
    flags = ("--data-name", "photos", "-a", "lenet", "-b", 2, "--results", tmp_path)
    first = succeed("training.py", *flags)
    second = succeed("training.py", *flags)
    names = sorted(path.name for path in tmp_path.glob("*.tar"))
    stem = "idtest_lenet_random_photos_b2_i0"
    assert names == [f"{stem}-2-checkpoint.pth.tar", f"{stem}-checkpoint.pth.tar"]
    assert names[1] in first.out
    assert names[0] in second.out
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert len(list(tmp_path.glob("*.log"))) == 2
    assert free_path(str(tmp_path / names[1])).endswith("-3-checkpoint.pth.tar")


def test_sealed_file_holds_only_what_an_attacker_has(tmp_path):
    flags = ("--data-name", "photos", "-a", "lenet", "-b", 3, "--results", tmp_path, "--seal")
    succeed("training.py", *flags)
    (path,) = tmp_path.glob("*-checkpoint.pth.tar")
    (truth_path,) = tmp_path.glob("*-truth.pth.tar")
    checkpoint = torch.load(path, weights_only=True)
    assert "x_true" not in checkpoint
    assert "y_true" not in checkpoint
    assert checkpoint["args"] == {}
    assert truth_from_checkpoint(load(str(path))) is None
    truth = truth_from_checkpoint(load_truth(str(truth_path)))
    assert truth.x.shape == (3, 3, 32, 32)
    assert truth.y.tolist() == [0, 1, 2]
    # nothing in the attacker's file, nested or not, has the truth's shape
    stored = [checkpoint["state_dict"].values(), checkpoint["target_gradient"]]
    assert not any(t.shape == truth.x.shape for group in stored for t in group)

    no_truth = call("run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1)
    assert no_truth.code == 2
    assert "--truth" in no_truth.err
    assert "--labels" in no_truth.err
    result, _ = attack(tmp_path, path, "--labels", "2,0,1")
    assert result["labels"] == {
        "method": "given", "reconstructed": [2, 0, 1], "true": None, "accuracy": None,
    }  # fmt: skip
    assert result["metrics"] is None
    result, _ = attack(tmp_path, path, "--truth", truth_path, "--metric")
    assert result["labels"]["true"] == [0, 1, 2]
    assert result["metrics"]["mean"]["psnr"] > 0


def test_without_metric_and_with_labels_the_truth_is_not_used(captured, tmp_path):
    """The same run on a checkpoint with a wrong truth gives the same images."""
    path = captured("-a", "lenet", "-b", "3")
    checkpoint = load(str(path))
    checkpoint["x_true"] = checkpoint["x_true"] * torch.nan
    checkpoint["y_true"] = torch.tensor([99, 99, 99])
    save(checkpoint, str(tmp_path / "poisoned.pth.tar"))
    images = []
    for source in (path, tmp_path / "poisoned.pth.tar"):
        _, folder = attack(tmp_path, source, "--labels", "0 1 2", "--epochs", 3)
        images.append(torch.load(folder / "x_recon.pth", weights_only=True))
    assert torch.equal(*images)


class OriginalArguments(argparse.Namespace):
    """Stands in for nothing: only argparse.Namespace itself is allowed."""


def original_checkpoint(path, tmp_path, **changes):
    """A file with the keys of the original project and an argparse.Namespace inside."""
    checkpoint = load(str(path))
    for key in ("format", "trainable"):
        del checkpoint[key]
    checkpoint["args"] = argparse.Namespace(arch="convnet", free_last_layers_list=["all"], gpu=0)
    checkpoint["clock"] = str(datetime.datetime.now())
    checkpoint |= changes
    target = tmp_path / "original-checkpoint.pth.tar"
    torch.save(checkpoint, target)
    return target


@pytest.mark.parametrize("clock", ["2022-01-01 10:00:00.5", datetime.datetime(2022, 1, 1)])
def test_files_of_the_original_load(captured, tmp_path, clock):
    source = captured("-a", "convnet", "-b", "4", "--upload-bn")
    path = original_checkpoint(source, tmp_path, clock=clock)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    result, _ = attack(tmp_path, path, "--epochs", 2, "--BN", 0.01, "--exact-bn", "--metric")
    assert result["bn_source"] == "batch"


def test_partial_gradients_of_the_original_are_refused(captured, tmp_path):
    source = captured("-a", "convnet", "-b", "4")
    path = original_checkpoint(source, tmp_path, free_last_layers_list=["fc"])
    with pytest.raises(InputError, match=r"free_last_layers_list \['fc'\]"):
        load(str(path))


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_nothing_runs(captured, tmp_path, zipped):
    checkpoint = load(str(captured("-a", "lenet", "-b", "3")))
    checkpoint["args"] = Hostile(tmp_path / "ran")
    path = tmp_path / "hostile.pth.tar"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    outcome = call("run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "refused: it holds" in outcome.err
    assert "system" in outcome.err
    assert not (tmp_path / "ran").exists()
    assert torch.load(path, weights_only=False) is not None
    assert (tmp_path / "ran").exists()  # the file really was hostile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": FORMAT + 1}, r"format 2, written by a newer version"),
        ({"format": "x"}, "newer version"),
        ({"local_steps": 5}, "an update of 5 local steps is no gradient"),
        ({"arch": None}, "missing arch"),
        ({"dataset_setup": {"mean": [0], "std": [1]}}, r"dataset_setup\[size\]"),
    ],
)
def test_unfit_checkpoints_are_refused(captured, tmp_path, change, message):
    checkpoint = load(str(captured("-a", "lenet", "-b", "3"))) | change
    checkpoint = {key: value for key, value in checkpoint.items() if value is not None}
    path = str(tmp_path / "c.pth.tar")
    save(checkpoint, path)
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "list", "folder", "missing"])
def test_unreadable_checkpoints_are_refused(captured, tmp_path, damage):
    path = tmp_path / "c.pth.tar"
    whole = captured("-a", "lenet", "-b", "3").read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage != "missing":
        path.write_bytes(
            {"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[damage]
        )
    with pytest.raises(InputError, match=r"--checkpoint .*c\.pth\.tar"):
        load(str(path))


def test_gradients_that_do_not_fit_name_the_parameter(captured):
    checkpoint = load(str(captured("-a", "convnet", "-b", "4", "--upload-bn")))
    gradient = checkpoint["target_gradient"]

    def refused(message, **change):
        with pytest.raises(InputError, match=message):
            model_of(target_from_checkpoint(checkpoint | change))

    refused(r"gradient of 3\.weight has shape \(2, 2\)",
            target_gradient=[*gradient[:3], torch.ones(2, 2), *gradient[4:]])  # fmt: skip
    refused("none for 14.bias", target_gradient=gradient[:-1])
    refused("weights do not fit lenet", arch="lenet")
    refused("gradient of 0.weight is not finite",
            target_gradient=[gradient[0] * torch.nan, *gradient[1:]])  # fmt: skip
    refused("BN statistics of 3 means", bn_mean_list=checkpoint["bn_mean_list"][:3])
    refused("has no parameter head.weight", trainable=["head.weight"])


def own_gradient():
    model = smooth_network()
    x, y = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1])
    names = [name for name, _ in model.named_parameters()]
    return model, dict(zip(names, batch_gradient(model, x, y, train_mode=True), strict=True))


SETUP = {
    "arch": "own", "batch_size": 2, "image_shape": (3, 8, 8), "num_classes": 4,
    "mean": [0] * 3, "std": [1] * 3, "train_mode": True,
}  # fmt: skip


def test_an_own_gradient_makes_a_checkpoint(tmp_path):
    model, gradient = own_gradient()
    by_name = make_checkpoint(model, gradient, **SETUP)
    in_order = make_checkpoint(model, list(gradient.values()), **SETUP)
    for a, b in zip(by_name["target_gradient"], in_order["target_gradient"], strict=True):
        assert torch.equal(a, b)
    save(by_name, str(tmp_path / "own.pth.tar"))
    target = target_from_checkpoint(load(str(tmp_path / "own.pth.tar")))
    assert target.trainable == tuple(gradient)
    assert "x_true" not in by_name


def test_what_is_no_gradient_of_one_step_is_refused():
    model, gradient = own_gradient()
    with pytest.raises(InputError, match="several local steps"):
        make_checkpoint(model, gradient, **SETUP, local_steps=3)
    with pytest.raises(InputError, match="buffer 1.running_mean.*update of local steps"):
        make_checkpoint(model, model.state_dict(), **SETUP)
    with pytest.raises(InputError, match=r"differ at 0\.bias"):
        make_checkpoint(model, {k: v for k, v in gradient.items() if k != "0.bias"}, **SETUP)
    with pytest.raises(InputError, match="11 tensors for 14"):
        make_checkpoint(model, list(gradient.values())[:11], **SETUP)
    with pytest.raises(InputError, match=r"0\.weight has shape"):
        make_checkpoint(model, list(gradient.values())[::-1], **SETUP)


def test_seal_splits_without_loss():
    model, gradient = own_gradient()
    truth = (torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    whole = make_checkpoint(model, gradient, **SETUP, truth=truth, settings={"seed": 3})
    sealed, private = seal(whole)
    assert private["args"] == {"seed": 3}
    assert torch.equal(private["x_true"], truth[0])
    assert sealed.keys() == whole.keys() - {"x_true", "y_true"}


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = str(tmp_path / "c.pth.tar")
    save({"a": 1}, path)

    def breaks(content, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left")

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(FaultError, match="could not be written"):
        save({"a": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert os.listdir(tmp_path) == ["c.pth.tar"]


def test_a_full_disk_is_a_fault(tmp_path):
    """A limit on file sizes acts as a full disk: exit code 1, no half-written files."""
    limit = 100_000
    outcome = subprocess.run(
        [sys.executable, "training.py", "--data-name", "photos", "-a", "lenet", "-b", "2",
         "--results", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        ),
    )  # fmt: skip
    assert outcome.returncode == 1, outcome.stderr
    assert "could not be written" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
