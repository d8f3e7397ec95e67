"""Checkpoints: what they hold, what is refused, and that a failed write harms nothing."""

import argparse
import contextlib
import datetime
import os
import pickle
import re
import resource
import signal
import zipfile
from dataclasses import replace

import pytest
import torch
from torch import nn

from inversion.audit import inputs
from models.build import build_model
from models.checkpoint import FORMAT, Task, load, load_truth, make_checkpoint, seal
from models.gradient import ClientLoss, Update, batch_gradient, kept_bytes
from models.local import LocalSteps
from models.reading import target_from_checkpoint, truth_from_checkpoint
from models.target import GroundTruth, Protection, check_gradient_fits, model_of, outline_of
from tests.support import Hostile, attack, call, smooth_network, succeed
from utils import memory
from utils.errors import FaultError, InputError, naming
from utils.files import free_stem
from utils.tensor_files import save

SETUP = {"mean": [0.5] * 3, "std": [0.2] * 3, "size": (3, 32, 32), "n_classes": 8}
PRIVATE = {
    "mode": "per-sample", "sigma": 1.0, "clip": 1.0, "noise_multiplier": 1.0, "epsilon": 1.0,
    "delta": 1e-5, "steps": 1, "sample_rate": 1.0,
}  # fmt: skip
KEYS = {
    "clock", "batch_size", "dataset_setup", "arch", "model_eval", "state_dict",
    "free_last_layers_list", "target_gradient", "bn_mean_list", "bn_var_list", "x_true", "y_true",
    "args",
}  # fmt: skip
NEW_KEYS = {"format", "trainable", "label_smoothing", "protection", "replace_bn", "id"}
NEW_KEYS |= {"truth_digest", "truth_salt", "checkpoint_digest", "loss", "model_sha256"}
NEW_KEYS |= {"local_steps", "local_lr", "local_batch", "local_epochs", "resolution"}


def test_keys_and_plain_types(captured):
    path = captured("-a", "convnet", "-b", "4", "--upload-bn")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.pop("checksums").keys() == checkpoint.keys() == KEYS | NEW_KEYS
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
    assert free_stem(str(tmp_path / stem), ["-checkpoint.pth.tar"]).endswith(f"{stem}-3")
    (tmp_path / names[0]).unlink()  # handed to the attacker: its companions still count
    assert f"{stem}-3-checkpoint" in succeed("training.py", *flags).out


def test_sealed_file_holds_only_what_an_attacker_has(tmp_path):
    flags = ("--data-name", "photos", "-a", "lenet", "-b", 3, "--results", tmp_path, "--seal")
    private = ("--with-control", "--enable-dp", "-C", "1e6")  # clips nothing
    succeed("training.py", *flags, *private)
    (path,) = tmp_path.glob("*-checkpoint.pth.tar")
    (truth_path,) = tmp_path.glob("*-truth.pth.tar")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.pop("checksums").keys() == checkpoint.keys()
    assert "x_true" not in checkpoint
    assert "y_true" not in checkpoint
    assert checkpoint["args"] == {}
    assert truth_from_checkpoint(load(str(path))) is None
    truth = truth_from_checkpoint(load_truth(str(truth_path)))
    assert truth.x.shape == (3, 3, 32, 32)
    assert truth.y.tolist() == [0, 1, 2]
    shapes = [g.shape for g in checkpoint["target_gradient"]]
    assert [g.shape for g in truth.control.gradient] == shapes
    assert "mean" in load_truth(str(truth_path))["protection_norms"]
    private = {"x_true", "y_true", "truth_salt", "checkpoint_digest"}
    assert checkpoint.keys() == (KEYS | NEW_KEYS) - private
    values = set(truth.x.flatten().tolist())
    stored = [*checkpoint["state_dict"].values(), *checkpoint["target_gradient"]]
    assert not any(values & set(t.flatten().tolist()) - {0.0, 1.0} for t in stored)

    no_truth = call("run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1)
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
    checkpoint["x_true"] = "nothing"
    checkpoint["y_true"] = torch.tensor([99, 99, 99])
    save(checkpoint, str(tmp_path / "poisoned.pth.tar"))
    images = []
    for source in (path, tmp_path / "poisoned.pth.tar"):
        _, folder = attack(tmp_path, source, "--labels", "0 1 2", "--epochs", 3)
        images.append(torch.load(folder / "x_recon.pth", weights_only=True))
    assert torch.equal(*images)


def original_checkpoint(path, tmp_path, **changes):
    """A file with the keys of the original project and an argparse.Namespace inside."""
    checkpoint = load(str(path))
    for key in NEW_KEYS:
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


def test_protection_in_files_of_the_original(captured, tmp_path):
    settings = argparse.Namespace(enable_dp=True, sigma=0.01, max_per_sample_grad_norm=0.5)
    path = original_checkpoint(captured("-a", "lenet", "-b", "2"), tmp_path, args=settings)
    record = target_from_checkpoint(load(str(path))).protection
    assert record == Protection("batch", sigma=0.01, clip=0.5)
    settings.enable_dp = False
    path = original_checkpoint(captured("-a", "lenet", "-b", "2"), tmp_path, args=settings)
    assert target_from_checkpoint(load(str(path))).protection is None


def test_partial_gradients_of_the_original_are_refused(captured, tmp_path):
    source = captured("-a", "convnet", "-b", "4")
    path = original_checkpoint(source, tmp_path, free_last_layers_list=["fc"])
    with pytest.raises(InputError, match=r"free_last_layers_list \['fc'\]"):
        load(str(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_nothing_runs(captured, tmp_path, zipped):
    checkpoint = load(str(captured("-a", "lenet", "-b", "3")))
    checkpoint["args"] = Hostile(tmp_path / "ran")
    path = tmp_path / "hostile.pth.tar"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    outcome = call("run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1)
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
        ({"format": FORMAT + 1}, f"format {FORMAT + 1}, written by a newer version"),
        ({"format": "x"}, "format 'x' is not the number of a format"),
        ({"local_steps": 5}, "local_lr is None for 5 local steps"),
        ({"local_steps": 5, "local_lr": 0.0}, "local_lr is 0.0 for 5 local steps"),
        ({"local_steps": 5, "local_lr": 0.1, "local_batch": 0}, "local_batch is 0, not a positive"),
        ({"local_steps": 2**31 - 1, "local_lr": 0.1}, "local_steps is 2147483647, more than the"),
        ({"resolution": 2.0}, "resolution is 2.0, not above 0 and up to 1"),
        ({"arch": None}, "missing arch"),
        ({"arch": "\x1b]0;net\x07.py:build"}, "arch is .*, not a printable name"),
        ({"dataset_setup": {"mean": [0], "std": [1]}}, r"dataset_setup\[size\]"),
        ({"dataset_setup": [1]}, r"dataset_setup is \[1\], not a mapping with mean"),
        ({"dataset_setup": SETUP | {"size": (3, 32)}}, r"dataset_setup\['size'\] is \(3, 32\)"),
        (
            {"dataset_setup": SETUP | {"size": (2, 9, 9), "mean": [0] * 2, "std": [1] * 2}},
            "2 channels cannot be shown",
        ),
        ({"dataset_setup": SETUP | {"mean": [0.5]}}, r"dataset_setup\['mean'\] is not 3 numbers"),
        ({"dataset_setup": SETUP | {"mean": "abc"}}, r"dataset_setup\['mean'\] is not 3 numbers"),
        ({"dataset_setup": SETUP | {"std": [1, 0, 1]}}, r"dataset_setup\['std'\] is not above 0"),
        ({"dataset_setup": SETUP | {"n_classes": "8"}}, "n_classes"),
        ({"batch_size": 0}, "batch_size"),
        ({"model_eval": "no"}, "model_eval"),
        ({"state_dict": [1]}, "state_dict is not"),
        ({"state_dict": {"w": torch.tensor([torch.nan])}}, "weights w are not finite"),
        ({"state_dict": {"a.running_var": -torch.ones(2)}}, "a.running_var of weights is below 0"),
        ({"state_dict": {"a.weight": torch.ones(2).long()}}, "a.weight of weights is not floating"),
        ({"state_dict": {"a": torch.ones(2) * 1j}}, "a of weights is not floating-point"),
        ({"state_dict": {"a": torch.ones(2).requires_grad_()}}, "saved without detach"),
        ({"state_dict": {"a": torch.ones(1).expand(9)}}, "9 numbers .*, but only 1 are stored"),
        ({"state_dict": {"a": torch.ones(9).to_sparse()}}, "is a sparse_coo tensor"),
        ({"state_dict": {"a": torch.ones(9, device="meta")}}, "is on the meta device"),
        ({"target_gradient": []}, "target_gradient"),
        ({"target_gradient": [1, 2]}, "target_gradient"),
        ({"target_gradient": [torch.ones(1) / 0], "trainable": ["w"]}, "gradient of w is not fin"),
        ({"target_gradient": [torch.ones(1).long()], "trainable": ["w"]}, "gradient of w is not"),
        ({"trainable": 5}, "trainable is not one name"),
        ({"local_steps": "x"}, "local steps"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, not from 0 to below 1"),
        ({"label_smoothing": "0"}, "label_smoothing is '0'"),
        ({"protection": {"mode": "batch", "sigma": 1.0}}, "protection is no record"),
        ({"protection": {"mode": "batch", "sigma": -1.0, "clip": None}}, "protection is no record"),
        ({"protection": {"mode": "all", "sigma": 1.0, "clip": 1.0}}, "protection is no record"),
        (
            {"protection": {"mode": "batch", "sigma": 1.0, "clip": 1.0, "epsilon": -1.0}},
            "protection is no record",
        ),
        (
            {"protection": {"mode": "batch", "sigma": 1.0, "clip": 1.0, "other": 1.0}},
            "protection is no record",
        ),
        (
            {"protection": {"mode": "per-sample", "sigma": 1.0, "clip": 1.0, "epsilon": 1.0}},
            "protection is no record",
        ),
        ({"protection": {"mode": "batch", "sigma": 1.0, "clip": 0}}, "its clip is 0, not a number"),
        ({"protection": PRIVATE | {"delta": 2}}, "its delta is 2, not between 0 and 1"),
        ({"protection": PRIVATE | {"sample_rate": 1.5}}, "its sample_rate is 1.5, not above 0 and"),
        ({"protection": PRIVATE | {"steps": 1.5}}, "its steps is 1.5, not a positive integer"),
        ({"format": -1}, "format -1 is not the number of a format"),
        ({"format": True}, "format True is not the number of a format"),
        ({"replace_bn": 3}, "replace_bn is 3, not a name"),
        ({"bn_mean_list": [torch.ones(2)], "bn_var_list": None}, "bn_mean_list and bn_var_list"),
        (
            {"bn_mean_list": [torch.ones(2)], "bn_var_list": [-torch.ones(2)]},
            "the BN statistics' variance of layer 0 is below 0",
        ),
        ({"bn_mean_list": "ab", "bn_var_list": "ab"}, "bn_mean_list and bn_var_list"),
    ],
)
def test_unfit_checkpoints_are_refused(captured, tmp_path, change, message):
    checkpoint = load(str(captured("-a", "lenet", "-b", "3"))) | change
    checkpoint = {key: value for key, value in checkpoint.items() if value is not None}
    path = str(tmp_path / "c.pth.tar")
    save(checkpoint, path)
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_true": torch.zeros(2, 3, 32, 32)}, "truth of shape"),
        ({"x_true": [1.0]}, "truth of type list"),
        ({"x_true": torch.zeros(3, 3, 32, 32).long()}, "x_true is not floating-point"),
        ({"x_true": torch.full((3, 3, 32, 32), torch.nan)}, "not finite floating-point"),
        ({"y_true": torch.tensor([1, 2])}, "2 labels for a batch of 3"),
        ({"y_true": torch.tensor([1, 2, 8])}, "labels 1 to 8, but the classes are 0 to 7"),
        ({"y_true": [1, 2, 3]}, "labels for a batch of 3"),
        ({"y_true": torch.ones(3)}, "its labels are floating-point numbers (torch.float32)"),
        ({"control": [1]}, "its control is no gradient"),
        ({"control": {"target_gradient": torch.ones(8)}}, "its control is no gradient"),
        (
            {"control": {"target_gradient": [], "bn_mean_list": torch.ones(2)}},
            "its control is no gradient",
        ),
        ({"control": {"target_gradient": [torch.ones(2)]}}, "its control is no gradient"),
        ({"replace_bn": "nothing"}, "BatchNorm was replaced by 'nothing'"),
    ],
)
def test_unfit_truths_are_refused(captured, tmp_path, change, message):
    """Before anything is attacked or written."""
    save(load(str(captured("-a", "lenet", "-b", "3"))) | change, str(tmp_path / "c.pth.tar"))
    flags = (
        "--root",
        tmp_path,
        "--checkpoint",
        tmp_path / "c.pth.tar",
        "--lr",
        0.1,
        "--epochs",
        1,
        "--metric",
    )
    outcome = call("run.py", *flags)
    assert outcome.code == 2
    assert message in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth.tar"]


def test_an_altered_file_is_refused_by_its_checksums(tmp_path):
    """Though its archive is in order: a number changed, an entry put in, one taken out."""
    flags = ("--data-name", "photos", "-a", "lenet", "-b", 2, "--results", tmp_path, "--seal")
    succeed("training.py", *flags)
    for kind, read, numbers in (
        ("checkpoint", load, lambda content: content["state_dict"]["0.weight"]),
        ("truth", load_truth, lambda content: content["x_true"]),
    ):
        (path,) = tmp_path.glob(f"*-{kind}.pth.tar")
        other = str(tmp_path / "altered.tar")

        def altered(change, path=path, other=other, read=read):
            content = torch.load(path, weights_only=True)
            change(content)
            save(content, other)
            with pytest.raises(InputError, match="altered or damaged since it was written") as told:
                read(other)
            return str(told.value)

        assert "has another" in altered(lambda c, numbers=numbers: numbers(c).view(-1)[5].neg_())
        assert "lacks id" in altered(lambda c: c.pop("id"))
        assert "not written with note" in altered(lambda c: c.update(note=1))
        assert "another id" in altered(lambda c: c["checksums"].update(id={1}))
        content = torch.load(path, weights_only=True)
        del content["checksums"]  # as older files and those of other writers
        save(content, other)
        assert read(other).keys() == content.keys()


def test_sizes_are_compared_with_the_free_memory(captured, tmp_path, monkeypatch):
    path = captured("-a", "convnet", "-b", "4")
    monkeypatch.setattr(memory, "free_memory", lambda: 10**5)
    with pytest.raises(InputError, match=r"needs at least 0\.0 GiB for what it holds"):
        load(str(path))
    monkeypatch.setattr(memory, "free_memory", lambda: 2**23)
    checkpoint = load(str(path))
    setup = checkpoint["dataset_setup"] | {"size": (3, 512, 512)}
    public = {k: v for k, v in checkpoint.items() if k not in ("x_true", "y_true")}
    save(public | {"dataset_setup": setup}, str(tmp_path / "large.tar"))
    with pytest.raises(InputError, match=r"the 4 images \(3, 512, 512\) that it claims"):
        load(str(tmp_path / "large.tar"))
    monkeypatch.setattr(inputs, "free_memory", lambda: 2**27)
    monkeypatch.setattr(memory, "free_memory", lambda: 2**27)
    flags = ("--labels", "0,1,2,3", "--lr", 0.1, "--epochs", 1, "--root", tmp_path)
    outcome = call("run.py", "--checkpoint", tmp_path / "large.tar", *flags)
    assert "for what convnet makes of 4 images (3, 512, 512)" in outcome.err
    assert outcome.code == 2


def test_what_a_network_keeps_is_counted_on_shapes_alone(captured):
    """Against the outputs of its layers."""
    model = model_of(target_from_checkpoint(load(str(captured("-a", "convnet", "-b", "4")))))
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda _, args, out: found.append(out.numel()))
    with torch.no_grad():
        model(torch.zeros(2, 3, 32, 32))
    numbers = sum(found)
    assert kept_bytes(model, (3, 32, 32), True) == 4 * numbers > 0


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
    refused = pytest.raises(InputError, match=r"^--checkpoint .*c\.pth\.tar: \w")
    with refused, naming(f"--checkpoint {path}"):
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
    refused("weights are not those of lenet", arch="lenet")
    refused("BN statistics of 3 means", bn_mean_list=checkpoint["bn_mean_list"][:3])
    refused("has no parameter head.weight", trainable=["head.weight", *checkpoint["trainable"][1:]])


def own_gradient():
    model = smooth_network()
    x, y = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1])
    names = [name for name, _ in model.named_parameters()]
    return model, dict(zip(names, batch_gradient(model, x, y, ClientLoss(True)), strict=True))


OWN = Task("own", 2, (3, 8, 8), 4, mean=[0] * 3, std=[1] * 3, loss=ClientLoss(True))


def test_an_own_gradient_makes_a_checkpoint(tmp_path):
    model, gradient = own_gradient()
    by_name = make_checkpoint(model, gradient, OWN)
    in_order = make_checkpoint(model, list(gradient.values()), OWN)
    for a, b in zip(by_name["target_gradient"], in_order["target_gradient"], strict=True):
        assert torch.equal(a, b)
    save(by_name, str(tmp_path / "own.pth.tar"))
    target = target_from_checkpoint(load(str(tmp_path / "own.pth.tar")))
    assert target.trainable == tuple(gradient)
    assert "x_true" not in by_name


def test_several_local_steps_are_stored_with_how_they_were_taken(tmp_path):
    model, gradient = own_gradient()
    local = LocalSteps(4, 0.5, 2, 2)
    checkpoint = make_checkpoint(model, gradient, OWN, local=local, resolution=1e-4)
    save(checkpoint, str(tmp_path / "own.pth.tar"))
    target = target_from_checkpoint(load(str(tmp_path / "own.pth.tar")))
    assert (target.local, target.resolution) == (local, 1e-4)
    for change, g in zip(target.weight_change, gradient.values(), strict=True):
        assert torch.equal(change, -2.0 * g)
    one = target_from_checkpoint(make_checkpoint(model, gradient, OWN, local=LocalSteps(1, 0.5)))
    assert (one.local, one.resolution) == (None, None)
    with pytest.raises(ValueError, match="one gradient was sent"):
        _ = one.weight_change


def test_what_is_no_gradient_of_one_step_is_refused():
    model, gradient = own_gradient()
    with pytest.raises(InputError, match="local_lr is 0 for 3 local steps"):
        make_checkpoint(model, gradient, OWN, local=LocalSteps(3, 0))
    with pytest.raises(InputError, match="buffer 1.running_mean.*by gradient_from_update"):
        make_checkpoint(model, model.state_dict(), OWN)
    with pytest.raises(InputError, match=r"differ at 0\.bias"):
        make_checkpoint(model, {k: v for k, v in gradient.items() if k != "0.bias"}, OWN)
    with pytest.raises(InputError, match="11 tensors for 14"):
        make_checkpoint(model, list(gradient.values())[:11], OWN)
    with pytest.raises(InputError, match=r"0\.weight has shape"):
        make_checkpoint(model, list(gradient.values())[::-1], OWN)


def test_a_wrapped_model_and_half_precision_make_a_checkpoint():
    """DataParallel's prefix is dropped; the attack computes in float32 at least."""
    model, gradient = own_gradient()
    wrapped = nn.DataParallel(model.float())
    half = {f"module.{name}": g.half() for name, g in gradient.items()}
    for given in (half, list(half.values())):
        checkpoint = make_checkpoint(wrapped, given, OWN)
        assert checkpoint["trainable"] == list(gradient)
        assert checkpoint["state_dict"].keys() == model.state_dict().keys()
        assert {g.dtype for g in target_from_checkpoint(checkpoint).gradient} == {torch.float32}


def test_own_values_are_checked():
    model, gradient = own_gradient()
    with pytest.raises(InputError, match="'mean'"):
        make_checkpoint(model, gradient, replace(OWN, mean=[0]))
    truth = GroundTruth(torch.rand(1, 3, 8, 8), torch.tensor([0]))
    with pytest.raises(InputError, match="truth of shape"):
        make_checkpoint(model, gradient, OWN, truth=truth)
    with pytest.raises(InputError, match="bn_mean_list and bn_var_list"):
        make_checkpoint(model, Update(gradient, bn_mean=[torch.ones(4)]), OWN)


def test_arrays_of_numpy_make_the_same_checkpoint():
    model, gradient = own_gradient()
    truth = GroundTruth(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    ones = [torch.ones(n) for n in (4, 5, 6)]
    tensors = make_checkpoint(model, Update(gradient, ones, ones), OWN, truth=truth)
    by_name, ones = {name: g.numpy() for name, g in gradient.items()}, [t.numpy() for t in ones]
    theirs = GroundTruth(truth.x.numpy(), truth.y.numpy())
    arrays = make_checkpoint(model, Update(by_name, ones, ones), OWN, truth=theirs)
    for key in ("target_gradient", "bn_mean_list", "bn_var_list"):
        for a, b in zip(tensors[key], arrays[key], strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
    assert torch.equal(arrays["x_true"], truth.x)
    with pytest.raises(InputError, match="gradient: not a sequence of tensors"):
        make_checkpoint(model, ["text"] * len(gradient), OWN)


def test_a_compiled_model_has_the_names_of_its_own(captured):
    model, gradient = own_gradient()
    compiled = torch.compile(model)  # nothing is compiled before it is called
    given = {f"_orig_mod.{name}": g for name, g in gradient.items()}
    checkpoint = make_checkpoint(compiled, given, OWN)
    assert checkpoint["trainable"] == list(gradient)
    assert checkpoint["state_dict"].keys() == model.state_dict().keys()

    plain = load(str(captured("-a", "lenet", "-b", "3")))
    wrapped = {f"_orig_mod.module.{name}": w for name, w in plain["state_dict"].items()}
    names = [f"_orig_mod.{name}" for name in plain["trainable"]]
    target = target_from_checkpoint(plain | {"state_dict": wrapped, "trainable": names})
    assert model_of(target).state_dict().keys() == plain["state_dict"].keys()
    assert target.trainable == tuple(plain["trainable"])


def test_gradients_in_another_order_are_put_in_order_by_their_names(tmp_path):
    """Control included, whether the truth is in the checkpoint or in a file of its own."""
    flags = ("--data-name", "photos", "-a", "convnet", "-b", 2, "--with-control", "--seal")
    succeed("training.py", *flags, "--results", tmp_path)
    sound = load(str(next(tmp_path.glob("*-checkpoint.pth.tar"))))
    truth = load_truth(str(next(tmp_path.glob("*-truth.pth.tar"))))
    order = torch.randperm(len(sound["trainable"]), generator=torch.Generator().manual_seed(0))
    other = sound | {
        key: [sound[key][place] for place in order] for key in ("trainable", "target_gradient")
    }
    theirs = truth["control"]["target_gradient"]
    control = truth["control"] | {"target_gradient": [theirs[place] for place in order]}
    target = target_from_checkpoint(other)
    assert target.trainable == tuple(sound["trainable"])
    model_of(target)
    for a, b in zip(target.gradient, sound["target_gradient"], strict=True):
        assert torch.equal(a, b)
    for found in (
        truth_from_checkpoint(truth | {"control": control}, other),
        truth_from_checkpoint(other | truth | {"control": control}),
    ):
        for a, b in zip(found.control.gradient, theirs, strict=True):
            assert torch.equal(a, b)


def test_a_model_with_its_parameters_in_another_order_is_refused():
    model, gradient = own_gradient()
    target = target_from_checkpoint(make_checkpoint(model, gradient, OWN))
    check_gradient_fits(model, target)
    biases = [i for i, name in enumerate(target.trainable) if name in ("0.bias", "1.bias")]
    names = list(target.trainable)
    names[biases[0]], names[biases[1]] = names[biases[1]], names[biases[0]]
    with pytest.raises(InputError, match="in another order than the parameters"):
        check_gradient_fits(model, replace(target, trainable=tuple(names)))


def test_a_flipped_bit_is_told_by_the_checksum_of_its_member(captured, tmp_path):
    whole = bytearray(captured("-a", "lenet", "-b", "3").read_bytes())
    weights = load(str(captured("-a", "lenet", "-b", "3")))["state_dict"]["2.weight"]
    place = whole.index(weights.numpy().tobytes()) + 1000
    whole[place] ^= 1
    path = tmp_path / "c.pth.tar"
    path.write_bytes(whole)
    with pytest.raises(
        InputError, match=r"damaged: \S+/data/\d+ does not match its checksum; copy"
    ):
        load(str(path))


def test_files_of_the_format_without_checksums_are_read(captured, tmp_path):
    checkpoint = load(str(captured("-a", "lenet", "-b", "3")))
    path = tmp_path / "c.pth.tar"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load(str(path))["x_true"], checkpoint["x_true"])


def test_a_compressed_archive_is_refused_before_it_is_unpacked(captured, tmp_path):
    source, path = captured("-a", "lenet", "-b", "3"), tmp_path / "c.pth.tar"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(2**27) if name.endswith("data/0") else old.read(name))
    assert path.stat().st_size < 2**20
    with pytest.raises(InputError, match="is compressed, and torch.save compresses nothing"):
        load(str(path))


def test_sizes_that_a_file_claims_are_compared_before_anything_is_built(captured, tmp_path):
    """A head of 2³¹ classes, and images of a hundred thousand pixels a side: petabytes."""
    checkpoint = load(str(captured("-a", "lenet", "-b", "3")))
    for change in ({"n_classes": 2**31 - 1}, {"size": (3, 100_000, 100_000)}):
        setup = checkpoint["dataset_setup"] | change
        target = target_from_checkpoint(checkpoint | {"dataset_setup": setup})
        with pytest.raises(InputError, match=r"weights are not those of lenet.*reshaped 7\.weight"):
            model_of(target)


@pytest.mark.parametrize("arch", ["regnet_y_400mf", "maxvit_t", "resnet18", "convnet"])
def test_the_outline_of_a_network_has_its_names_shapes_and_dtypes(arch):
    size = (3, 224, 224)
    real = build_model(arch, 7, size).state_dict()
    outline = outline_of(arch, 7, size, None).state_dict()
    assert list(outline) == list(real)
    assert {k: (v.shape, v.dtype) for k, v in outline.items()} == {
        k: (v.shape, v.dtype) for k, v in real.items()
    }
    assert all(v.is_meta for k, v in outline.items() if k.endswith(("0.weight", "fc.weight")))


def test_bn_statistics_that_do_not_fit_are_not_blamed_on_the_control(tmp_path):
    flags = ("--data-name", "photos", "-a", "convnet", "-b", 2, "--with-control", "--upload-bn")
    succeed("training.py", *flags, "--results", tmp_path)
    (path,) = tmp_path.glob("*-checkpoint.pth.tar")
    sound = load(str(path))
    short = {key: [v[:5] for v in sound[key]] for key in ("bn_mean_list", "bn_var_list")}
    for change, message in (
        (short, "its BN statistics of layer 0 have shape (5,), but the layer 32 channels"),
        ({"control": sound["control"] | short}, "its control is no gradient of this network with "
         "as many BN statistics: its BN mean 0 has shape (5,), the checkpoint's (32,)"),
    ):  # fmt: skip
        save(sound | change, str(tmp_path / "c.tar"))
        outcome = call(
            "run.py",
            "--checkpoint",
            tmp_path / "c.tar",
            "--lr",
            0.1,
            "--epochs",
            1,
            "--root",
            tmp_path,
        )
        assert outcome.code == 2
        assert message in outcome.err


def test_integers_are_taken_only_where_the_network_has_them(captured, tmp_path):
    checkpoint = load(str(captured("-a", "convnet", "-b", "4", "--upload-bn")))
    counter = "1.num_batches_tracked"
    assert checkpoint["state_dict"][counter].dtype == torch.int64
    state = checkpoint["state_dict"] | {counter: torch.tensor(1.5)}
    target = target_from_checkpoint(checkpoint | {"state_dict": state})
    with pytest.raises(InputError, match=f"of another kind {counter} torch.float32 instead of"):
        model_of(target)


def test_seal_splits_without_loss():
    model, gradient = own_gradient()
    truth = GroundTruth(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    whole = make_checkpoint(model, gradient, OWN, truth=truth, settings={"seed": 3})
    sealed, private = seal(whole)
    assert private["args"] == {"seed": 3}
    assert torch.equal(private["x_true"], truth.x)
    private = {"x_true", "y_true", "truth_salt", "checkpoint_digest"}
    assert sealed.keys() == whole.keys() - private


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


@contextlib.contextmanager
def no_file_above(limit):
    """Let this process write no file of more than `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("script", "limit"), [("training.py", 100_000), ("run.py", 20_000)])
def test_a_full_disk_is_a_fault(captured, tmp_path, script, limit):
    """A limit on file sizes acts as a full disk: exit code 1, no half-written files."""
    flags = ["--data-name", "photos", "-a", "lenet", "-b", "2", "--results", str(tmp_path)]
    if script == "run.py":
        path = captured("-a", "lenet", "-b", "3")
        flags = ["--checkpoint", str(path), "--lr", "0.1", "--epochs", "1", "--root", str(tmp_path)]
    with no_file_above(limit):
        outcome = call(script, *flags)
    assert outcome.code == 1, outcome.err
    assert re.search(r"\S+ could not be written: File too large", outcome.err)
    assert outcome.err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tar", ".pth", ".png")]
    assert not list(tmp_path.rglob(".writing-*"))
