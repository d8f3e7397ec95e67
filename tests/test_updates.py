"""Imported updates: files of several frameworks, what is undone, what is refused."""

import io
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from models.build import build_model
from models.checkpoint import load
from models.gradient import ClientLoss, batch_gradient, whole_batch_gradient
from models.local import LocalSteps, local_gradient
from models.reading import target_from_checkpoint
from tests.support import attack, call, photos, succeed
from train.update_files import read_update_file
from train.update_settings import LocalSettings
from train.updates import gradient_from_update, named_tensors
from utils.errors import InputError

SIZE, CLASSES, RATE = 12, 8, 0.25
SHAPE = (3, SIZE, SIZE)


def network(arch="convnet"):
    torch.manual_seed(4)
    return build_model(arch, CLASSES, SHAPE)


def trained(model, x, y, *, steps=1, optimiser=torch.optim.SGD, **options):
    """The state dict after steps of a plain PyTorch client in train mode, and the one before."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = {"lr": RATE, **options}
    optimiser = optimiser([p for p in model.parameters() if p.requires_grad], **options)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(before)
    return before, after


def imported(before, after, how=None, *, arch="convnet", images=4, **options):
    how = how or LocalSettings(1, RATE)
    return gradient_from_update(
        network(arch), before, after, how, batch_size=images, image_shape=SHAPE, **options
    )


def relative(found, true):
    gap = sum((a.double() - b.double()).square().sum() for a, b in zip(found, true, strict=True))
    return (gap / sum(b.double().square().sum() for b in true)).sqrt().item()


@pytest.fixture(scope="module")
def client():
    """One step of a convnet client in float64: states, and what it would have captured."""
    model, (x, y) = network().double(), photos(4, SIZE)
    before, after = trained(model, x.double(), y)
    sent = whole_batch_gradient(model, x.double(), y, ClientLoss(True), moments=True)
    return before, after, sent


def arrays(state):
    return [value.numpy() for value in state.values()]


def as_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def difference(before, after):
    return {k: after[k] - before[k] for k in before}


WRITERS = {
    "a.pth": lambda path, state, _: torch.save(state, path),
    "wrapped.tar": lambda path, state, _: torch.save({"epoch": 3, "state_dict": state}, path),
    "prefix.pt": lambda path, state, _: torch.save(
        {f"module.{k}": v for k, v in state.items()}, path
    ),
    "list.npz": lambda path, state, _: np.savez(path, *arrays(state)),
    "named.npz": lambda path, state, _: np.savez_compressed(
        path, **{k: v.numpy() for k, v in state.items()}
    ),
    "a.safetensors": lambda path, state, _: save_file(state, path),
    "tensors.pt": lambda path, state, _: torch.save(list(state.values()), path),
    "parameters.pt": lambda path, state, _: torch.save(
        {"tensors": [as_bytes(a) for a in arrays(state)], "tensor_type": "numpy.ndarray"}, path
    ),
    "weights.dxo.pt": lambda path, state, _: torch.save(
        {"kind": "WEIGHTS", "data": state, "meta": {}}, path
    ),
    "difference.dxo.pt": lambda path, state, before: torch.save(
        {
            "kind": "WEIGHT_DIFF",
            "data": difference(before, state),
            "meta": {"NUM_STEPS_CURRENT_ROUND": 1},
        },
        path,
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_gradient_of_a_direct_capture(name, client, tmp_path):
    """And the statistics of the batch, since the buffers were sent as well."""
    before, after, sent = client
    WRITERS[name](tmp_path / name, after, before)
    content = read_update_file(str(tmp_path / name))
    assert content.difference in (None, "difference" in name)
    found = imported(before, content.values, difference=bool(content.difference))
    assert relative(found.update.gradient, sent.gradient) < 1e-12
    assert relative(found.update.bn_mean, sent.bn_mean) < 1e-12
    assert relative(found.update.bn_var, sent.bn_var) < 1e-12
    assert found.local is None
    assert found.resolution < 1e-12


@pytest.mark.parametrize("rate", [0.01, 1.0, 100.0])
def test_float32_loses_what_the_resolution_says(rate):
    """w₀ − w₁ keeps eps · |w| / (lr · |g|) of the gradient; at a large rate that is under 1e-6."""
    model, (x, y) = network(), photos(4, SIZE)
    true = batch_gradient(model, x, y, ClientLoss(True))
    found = imported(*trained(model, x, y, lr=rate), LocalSettings(1, rate))
    error = relative(found.update.gradient, true)
    assert error < 2 * found.resolution
    assert error > 0.02 * found.resolution
    if rate == 100.0:
        assert error < 1e-6


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (LocalSettings(1, RATE, optimiser="momentum", momentum=0.9), {"momentum": 0.9}),
        (
            LocalSettings(1, RATE, optimiser="nesterov", momentum=0.9, weight_decay=0.01),
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        ),
        (LocalSettings(1, RATE, weight_decay=0.05), {"weight_decay": 0.05}),
    ],
)
def test_one_step_of_torchs_optimisers_is_undone(how, options, client):
    model, (x, y) = network().double(), photos(4, SIZE)
    before, after = trained(model, x.double(), y, **options)
    assert relative(imported(before, after, how).update.gradient, client[2].gradient) < 1e-11


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (LocalSettings(1, RATE, optimiser="adam"), "adam: its first step is the sign"),
        (LocalSettings(1, RATE, optimiser="nesterov"), "give --local-momentum"),
        (LocalSettings(2, RATE, optimiser="momentum", momentum=0.9), "2 steps of momentum"),
        (LocalSettings(2, RATE, weight_decay=0.1), "0.1: over 2 steps it acts"),
    ],
)
def test_what_cannot_be_undone_is_refused(how, says, client):
    with pytest.raises(InputError, match=says):
        imported(client[0], client[1], how)


def test_adams_first_step_is_indeed_a_sign():
    model, (x, y) = network().double(), photos(4, SIZE)
    before, after = trained(model, x.double(), y, optimiser=torch.optim.Adam, lr=0.01)
    gradient = batch_gradient(model, x.double(), y, ClientLoss(True))
    names = [name for name, _ in model.named_parameters()]
    for name, g in zip(names, gradient, strict=True):
        step = (before[name] - after[name]) / 0.01
        assert torch.allclose(step, g / (g.abs() + 1e-8), atol=1e-9)


def test_several_steps_give_the_mean_gradient(client):
    model, (x, y) = network().double(), photos(4, SIZE)
    before, after = trained(model, x.double(), y, steps=3)
    found = imported(before, after, LocalSettings(3, RATE))
    true = local_gradient(model, x.double(), y, ClientLoss(True), LocalSteps(3, RATE))
    assert relative(found.update.gradient, true) < 1e-12
    assert found.local == LocalSteps(3, RATE)
    assert found.update.bn_mean is None
    assert "those of 3 local steps are mixed" in " ".join(found.remarks)
    with pytest.raises(InputError, match="counts 3 forward passes .* give --local-steps 3"):
        imported(before, after, LocalSettings(2, RATE))


# What was sent ------------------------------------------------------------------------------


def test_frozen_and_unsent_parameters_are_left_out(client):
    model, (x, y) = network(), photos(4, SIZE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("14"))  # the head
    before, after = trained(model, x, y)
    heads = tuple(name for name, _ in model.named_parameters() if name.startswith("14"))
    assert len(heads) == 2
    frozen = imported(before, after)
    assert frozen.trainable == heads
    assert "not trained (unchanged): 0.weight" in frozen.remarks[0]
    partial = imported(before, {k: after[k] for k in heads})
    assert partial.trainable == heads
    assert partial.remarks[0].startswith("not sent: 0.weight")
    assert "were not sent" in partial.remarks[1]
    assert relative(partial.update.gradient, frozen.update.gradient) == 0
    used = network()
    gradient_from_update(
        used, before, after, LocalSettings(1, RATE), batch_size=4, image_shape=SHAPE
    )
    assert [n for n, p in used.named_parameters() if p.requires_grad] == list(heads)


@pytest.mark.parametrize("kept", ["all", "without counters", "parameters"])
def test_a_list_is_named_by_its_length(kept):
    model = network()
    state = model.state_dict()
    names = {
        "all": list(state),
        "without counters": [k for k in state if not k.endswith("num_batches_tracked")],
        "parameters": [name for name, _ in model.named_parameters()],
    }[kept]
    found = named_tensors([state[name] for name in names], model, "AFTER")
    assert list(found) == names
    with pytest.raises(InputError, match="a list of 3 arrays for a network of 14, 22, 26"):
        named_tensors([np.zeros(1)] * 3, model, "AFTER")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {**s, "more": torch.ones(2)}, "AFTER: does not fit the network: surplus more"),
        (lambda s: {**s, "0.weight": torch.ones(2)}, r"reshaped 0\.weight \(2,\)"),
        (lambda s: {**s, "0.weight": s["0.weight"].long()}, r"of another kind 0\.weight"),
        (lambda s: {**s, "0.weight": s["0.weight"] / 0}, r"0\.weight is not finite"),
        (lambda s: {**s, "0.weight": "text"}, r"AFTER: 0\.weight"),
        (lambda s: {}, "AFTER: holds no tensors"),
    ],
)
def test_tensors_of_another_network_are_refused(change, says, client):
    with pytest.raises(InputError, match=says):
        imported(client[0], change(client[1]))


def test_a_state_before_that_is_not_whole_is_refused(client):
    before, after, _ = client
    with pytest.raises(InputError, match="BEFORE: does not fit the network: missing 0.weight"):
        imported({k: v for k, v in before.items() if k != "0.weight"}, after)
    without = {k: v for k, v in before.items() if "running" not in k}
    assert imported(without, after).trainable  # train mode does not use them
    with pytest.raises(InputError, match="missing 1.running_mean"):
        imported(without, after, train_mode=False)
    with pytest.raises(InputError, match="nothing was trained"):
        imported(before, before)


# Batch statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_batch_statistics_follow_from_the_buffers(momentum):
    """Also where the average is cumulative and has seen passes before."""
    model, (x, y) = network().double(), photos(4, SIZE)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
            layer.num_batches_tracked.fill_(2)
    before, after = trained(model, x.double(), y)
    true = whole_batch_gradient(model, x.double(), y, ClientLoss(True), moments=True)
    found = imported(before, after, bn_momentum=momentum or 0).update
    assert relative(found.bn_mean, true.bn_mean) < 1e-11
    assert relative(found.bn_var, true.bn_var) < 1e-11


def test_another_momentum_is_noticed_where_a_variance_is_negative(client):
    with pytest.raises(InputError, match="momentum is not 0.001; give --bn-momentum"):
        imported(client[0], client[1], bn_momentum=0.001)


def test_no_statistics_where_they_do_not_follow(client):
    before, after, _ = client
    kept = {k: before[k] if "running" in k or "tracked" in k else v for k, v in after.items()}
    found = imported(before, kept)
    assert found.update.bn_mean is None
    assert "are unchanged" in found.remarks[0]
    assert "eval mode" in imported(before, after, train_mode=False).remarks[0]


# The files, and the script -------------------------------------------------------------------


def test_files_that_are_no_update_are_refused(tmp_path):
    np.savez(tmp_path / "object.npz", np.array([{"a": 1}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no archive")
    torch.save({"kind": "METRICS", "data": {}}, tmp_path / "metrics.pt")
    torch.save({"tensors": [b"x"], "tensor_type": "numpy.ndarray"}, tmp_path / "bytes.pt")
    torch.save({"tensors": [], "tensor_type": "other"}, tmp_path / "other.pt")
    torch.save(3, tmp_path / "three.pt")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez_compressed(tmp_path / "whole.npz", np.arange(5000.0))
    damaged = bytearray((tmp_path / "whole.npz").read_bytes())
    damaged[200] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    torch.save({"kind": ["WEIGHTS"], "data": {}}, tmp_path / "kinds.pt")
    for name, part in (
        ("zip.pt", b"PK\x03\x04"),
        ("archive.pt", (tmp_path / "whole.npz").read_bytes()),
    ):
        torch.save({"tensors": [part], "tensor_type": "numpy.ndarray"}, tmp_path / name)
    for name, says in (
        ("none.pth", "no such file"),
        ("object.npz", "unreadable or damaged"),
        ("text.npz", "unreadable or damaged"),
        ("text.safetensors", "unreadable or damaged"),
        ("metrics.pt", "a DXO of kind 'METRICS'"),
        ("bytes.pt", "Parameters: unreadable"),
        ("other.pt", "Parameters of type 'other'"),
        ("three.pt", "holds no weights"),
        ("array.npz", "unreadable or damaged"),
        ("damaged.npz", "unreadable or damaged"),
        ("kinds.pt", "a DXO of kind"),
        ("zip.pt", "Parameters: unreadable"),
        ("archive.pt", "Parameters: unreadable"),
    ):
        with pytest.raises(InputError, match=says):
            read_update_file(str(tmp_path / name))


def test_names_of_a_file_cannot_steer_a_terminal(client):
    before, after, _ = client
    after = {f"\x1b]0;{name}\x07": value for name, value in after.items()}
    with pytest.raises(InputError, match="AFTER: does not fit the network") as refusal:
        imported(before, after)
    assert str(refusal.value).isprintable()


def write_states(folder, *, arch="convnet", steps=1, index=0, **options):
    model, (x, y) = network(arch), photos(4, SIZE, index)
    before, after = trained(model, x, y, steps=steps, **options)
    torch.save(before, folder / "before.pth")
    np.savez(folder / "after.npz", *arrays(after))
    return str(folder / "before.pth"), str(folder / "after.npz")


def import_of(folder, *flags, arch="convnet", **options):
    files = write_states(folder, arch=arch, **options)
    common = ("-a", arch, "-b", "4", "--image-size", SIZE, "--local-lr", RATE, "--results", folder)
    outcome = succeed("training.py", "--import-update", *files, *common, *flags)
    (path,) = folder.glob("*-checkpoint.pth.tar")
    return path, outcome.out


def test_an_update_with_its_images_is_attacked_and_scored(tmp_path):
    flags = ("--data-name", "photos", "--with-control", "--decoys", "2")
    path, printed = import_of(tmp_path, *flags)
    assert "a list of 26 arrays" in printed
    assert "one step: the gradient, with a relative rounding error of" in printed
    assert "the images named give this update: cosine distance" in printed
    checkpoint = load(str(path))
    target = target_from_checkpoint(checkpoint)
    assert target.local is None
    assert target.resolution == checkpoint["resolution"]
    assert target.bn_mean is not None
    assert len(checkpoint["control"]["bn_mean_list"]) == len(target.bn_mean)
    result, _ = attack(tmp_path, path, "--metric", "--epochs", "2", "--exact-bn", "--BN", "0.1")
    assert result["metrics"]["truth_gradient"]["kind"] == "same"
    assert result["bn_source"] == "batch"


def write_backup(folder, x, y):
    folder.mkdir()
    torch.save(x, folder / "x_true.pth.bk")
    torch.save(y, folder / "y_true.pth.bk")
    return folder


@pytest.mark.parametrize("arch", ["convnet", "lenet"])
def test_other_images_than_the_clients_are_noticed(arch, tmp_path):
    """Also where gradients of all images are near, as those of a random LeNet."""
    _, printed = import_of(tmp_path, "--data-name", "photos", arch=arch, index=3)
    assert "warning: the images named do not give this update: cosine distance" in printed
    assert "Give --data-backup with" in printed


def test_a_backup_of_few_classes_is_the_clients_for_a_network_of_more(tmp_path):
    """In its order: after another one the mini-batches are others."""
    (x, _), (other, _) = photos(4, SIZE), photos(8, SIZE, 5)
    y, model = torch.tensor([0, 1, 1, 0]), network("lenet")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for part in (slice(0, 2), slice(2, 4)):
        optimiser.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimiser.step()
    torch.save(before, tmp_path / "before.pth")
    torch.save(model.state_dict(), tmp_path / "after.pth")
    labels = torch.cat([y, torch.tensor([0, 1] * 4)])
    right = write_backup(tmp_path / "right", torch.cat([x, other]), labels)
    order = [2, 3, 0, 1]
    wrong = write_backup(
        tmp_path / "wrong", torch.cat([x[order], other]), torch.cat([y[order], labels[4:]])
    )
    common = (
        "training.py", "--import-update", tmp_path / "before.pth", tmp_path / "after.pth", "-a",
        "lenet", "-b", "4", "--local-lr", RATE, "--local-steps", "2", "--local-batch", "2",
        "--data-name", "folder", "--with-control", "--decoys", "1", "--results", tmp_path,
    )  # fmt: skip
    printed = succeed(*common, "--data-backup", right, "--num-classes", CLASSES).out
    assert "the images named give this update" in printed
    assert "2 distinct labels of 8" in printed
    (path,) = tmp_path.glob("*-checkpoint.pth.tar")
    checkpoint = load(str(path))
    assert target_from_checkpoint(checkpoint).num_classes == CLASSES
    assert torch.equal(checkpoint["x_true"], x)
    printed = succeed(*common, "--data-backup", wrong, "--num-classes", CLASSES, "--dry-run").out
    assert "warning: the images named do not give" in printed
    late = write_backup(tmp_path / "late", x, y + 7)
    outcome = call(*common, "--data-backup", late, "--num-classes", CLASSES)
    assert "labels 7 to 8, but --num-classes 8 has classes 0 to 7" in outcome.err
    assert "give --num-classes" in call(*common, "--data-backup", right).err


def test_a_folder_of_fewer_classes_than_the_network_lists_its_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{number}.png")
    folder = ("--data-name", "folder", "--data", tmp_path / "set", "--dry-run")
    files = write_states(tmp_path)
    common = (
        "training.py", "--import-update", *files, "-a", "convnet", "-b", "4", "--image-size", SIZE,
        "--local-lr", RATE, "--results", tmp_path, *folder,
    )  # fmt: skip
    printed = succeed(*common, "--num-classes", CLASSES).out
    assert "2 distinct labels of 8" in printed
    assert "  image 0, label " in printed
    assert "warning: the images named do not give" in printed
    assert "does not fit the network" in call(*common).err


def test_several_steps_of_unknown_images_are_attacked(tmp_path):
    path, printed = import_of(
        tmp_path, "--num-classes", CLASSES, "--local-steps", "3", arch="lenet", steps=3, lr=0.001
    )
    assert "the images are not known" in printed
    assert "update of 3 local steps" in printed
    assert not list(tmp_path.glob("*.png"))
    result, _ = attack(tmp_path, path, "--labels", "0,1,2,3", "--epochs", "3")
    assert result["update"]["model"] == "sme"
    assert 0 <= result["update"]["alpha"] <= 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--import-update: needs the client's step size"),
        (("--local-lr", "1", "--pretrained", __file__), "--pretrained: the weights are those of"),
        (("--local-lr", "1", "--enable-dp", "-C", "1"), "--enable-dp: an imported update is as"),
        (("--local-lr", "1", "--nproc", "2"), "--nproc: one process reads the files"),
        (("--local-lr", "1", "--with-control"), "--with-control: needs the client's images"),
        (("--local-lr", "1", "--local-steps", "2"), "--import-update: AFTER: 1.num_batches"),
        (("--local-lr", "1", "--data-name", "folder"), "--data-name folder: its classes"),
    ],
)
def test_imports_that_cannot_be_are_refused(flags, says, tmp_path):
    files = write_states(tmp_path)
    flags = flags if "folder" in flags else (*flags, "--num-classes", CLASSES)
    outcome = call(
        "training.py", "--import-update", *files, "-a", "convnet", "-b", "4", "--image-size", SIZE,
        "--results", tmp_path, *flags,
    )  # fmt: skip
    assert outcome.code == 2, outcome.out
    assert outcome.err.startswith(f"error: {says}")


def test_a_dxo_that_counts_steps_wants_them_confirmed(tmp_path):
    files = write_states(tmp_path, arch="lenet", steps=2)
    state, before = np.load(files[1]), torch.load(files[0])
    data = {
        name: torch.as_tensor(array) - old
        for (name, old), array in zip(before.items(), state.values(), strict=True)
    }
    meta = {"NUM_STEPS_CURRENT_ROUND": 2}
    torch.save({"kind": "WEIGHT_DIFF", "data": data, "meta": meta}, tmp_path / "dxo.pt")
    common = (
        "--import-update", files[0], tmp_path / "dxo.pt", "-a", "lenet", "-b", "4", "--image-size",
        SIZE, "--local-lr", RATE, "--num-classes", CLASSES, "--results", tmp_path, "--dry-run",
    )  # fmt: skip
    assert "AFTER counts 2 steps of this round" in call("training.py", *common).err
    assert "dry run" in succeed("training.py", *common, "--local-steps", "2").out


def test_without_safetensors_its_files_are_refused(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="needs the package safetensors"):
        read_update_file(str(tmp_path / "a.safetensors"))


def test_weights_are_not_taken_for_a_difference(tmp_path):
    """A file that says what it holds is believed, and the flag that contradicts it is refused."""
    before, after = write_states(tmp_path, arch="lenet")
    names = torch.load(before).keys()
    arrays_of = np.load(after).values()
    data = {n: torch.as_tensor(a) for n, a in zip(names, arrays_of, strict=True)}
    torch.save({"kind": "WEIGHTS", "data": data, "meta": {}}, tmp_path / "dxo.pt")
    common = (
        "-a", "lenet", "-b", "4", "--image-size", SIZE, "--local-lr", RATE, "--num-classes",
        CLASSES, "--results", tmp_path, "--dry-run", "--update-difference",
    )  # fmt: skip
    outcome = call("training.py", "--import-update", before, tmp_path / "dxo.pt", *common)
    assert outcome.code == 2
    assert "says that it holds weights" in outcome.err
