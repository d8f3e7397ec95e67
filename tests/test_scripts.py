"""Both scripts end to end: what is written, repeatability, interruption, original commands."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from inversion.priors import PRIOR_FUNCTIONS
from models.binding import bind
from models.build import build_model, find_head
from models.checkpoint import load
from tests.support import HANG, ROOT, attack, call, capture_photos, succeed
from utils.console import Reporter

RESULT_KEYS = {
    "format", "settings", "target", "versions", "git", "device", "processes", "seconds",
    "iterations", "iterations_per_second", "peak_memory_mib", "bn_source", "stopped", "losses",
    "labels", "metrics", "controls", "information", "seeds", "rounds", "search",
    "layerwise", "memory", "threat", "update",
}  # fmt: skip


def images_of(folder):
    return torch.load(folder / "x_recon.pth", weights_only=True)


@pytest.fixture(scope="module")
def attacked(captured, tmp_path_factory):
    """One attack from two seeds with everything that a run can be asked for: what it left."""
    root = tmp_path_factory.mktemp("attacked")
    path = captured("-a", "convnet", "-b", "4", "--upload-bn")
    result, folder = attack(
        root, path, "--epochs", 5, "--n-seed", 2, "--TV", 0.01, "--BN", 0.001, "--exact-bn",
        "--input-norm=-1e-6", "--grad-sign", "--input-boxed", "--min-grads-loss", "--metric",
        "--seed", 3,
    )  # fmt: skip
    return SimpleNamespace(root=root, folder=folder, result=result, checkpoint=load(str(path)))


def test_the_results_lie_in_the_folder_of_the_id(attacked):
    assert attacked.folder == attacked.root / "results" / "exp" / "test"


def test_the_result_has_the_promised_entries(attacked):
    result = attacked.result
    assert result.keys() == RESULT_KEYS
    assert list(result)[0] == "format"
    assert result["format"] == 1
    assert result["settings"]["epochs"] == 5
    assert result["iterations"] == 10
    assert result["processes"] == 1
    assert result["bn_source"] == "batch"
    assert result["losses"].keys() == {"gradient", "total", "tv", "bn", "norm"}


def test_the_seed_of_the_lowest_gradient_loss_is_chosen(attacked):
    seeds = attacked.result["seeds"]
    assert [seed["seed"] for seed in seeds] == [3, 4]
    lowest = min(seed["gradient_loss"] for seed in seeds)
    assert attacked.result["losses"]["gradient"] == lowest


def test_the_scores_have_the_promised_entries(attacked):
    scores = attacked.result["metrics"]
    assert scores.keys() == {
        "pairing", "mean", "std", "exact_images", "images", "baselines", "controls",
        "leakage", "identification", "paired", "verdict", "attack", "truth_gradient",
    }  # fmt: skip
    assert scores["mean"].keys() == scores["std"].keys() == {"mse", "psnr", "ssim", "lpips"}
    assert scores["mean"]["lpips"] is None
    assert len(scores["images"]) == 4


def test_the_labels_are_those_of_the_client(attacked):
    assert attacked.result["labels"]["accuracy"] == 1
    labels = torch.load(attacked.folder / "y_recon.pth", weights_only=True)
    assert torch.equal(labels, attacked.checkpoint["y_true"])


def test_the_images_lie_in_the_box_of_their_colours(attacked):
    x = images_of(attacked.folder)
    assert x.shape == (4, 3, 32, 32)
    mean, std = (
        torch.tensor(attacked.checkpoint["dataset_setup"][key]).view(-1, 1, 1)
        for key in ("mean", "std")
    )
    raw = x * std + mean
    assert raw.min() >= -1e-6
    assert raw.max() <= 1 + 1e-6


def test_the_losses_of_every_iteration_add_up(attacked):
    with open(attacked.folder / "losses.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert list(rows[0]) == ["seed", "iteration", "rate", "total", "gradient", "tv", "bn", "norm"]
    total = float(rows[0]["gradient"]) + 0.01 * float(rows[0]["tv"]) + 0.001 * float(rows[0]["bn"])
    assert float(rows[0]["total"]) == pytest.approx(total - 1e-6 * float(rows[0]["norm"]))


def test_the_log_holds_plan_and_choice(attacked):
    log = (attacked.folder / "log.txt").read_text()
    assert "plan: 2 seed(s) x 5 = 10 iterations" in log
    assert "chosen: seed" in log


def test_every_image_and_two_overviews_are_pictures(attacked):
    for name in ("pairs.png", "losses.png"):
        assert Image.open(attacked.folder / name).width > 300
    names = sorted(os.listdir(attacked.folder / "images"))
    assert names == [f"{k}_{i:03d}.png" for k in ("reconstruction", "truth") for i in range(4)]
    assert Image.open(attacked.folder / "images" / names[0]).size == (32, 32)


def test_mlco_writes_its_rounds(captured, tmp_path):
    path = captured("-a", "convnet", "-b", "4", "--upload-bn")
    result, folder = attack(
        tmp_path, path, "--MinCombine", "--n-seed", 3, "--epochs", 10, "--T-in", 2, "--seed", 5,
        "--min-grads-loss", "--grad-sign", "--metric",
    )  # fmt: skip
    assert result["iterations"] == 3 * 6 + 4
    assert [found["iteration"] for found in result["rounds"]] == [3, 5, 6]
    for found in result["rounds"]:
        assert len(found["seeds"]) == 4
        assert set(found["seeds"]) <= {5, 6, 7}
        assert len(found["seed_gradient_losses"]) == 3
        assert found["gradient_loss"] <= min(found["seed_gradient_losses"])
    assert result["losses"].keys() == {"gradient", "total"}
    assert [seed["iterations"] for seed in result["seeds"]] == [6] * 3
    with open(folder / "losses.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["seed"] for row in rows} == {"5", "6", "7", "consensus"}
    assert [row["group"] == "" for row in rows if row["seed"] == "6"] == [True] * 3 + [False] * 3
    assert sorted(os.listdir(folder / "consensus")) == ["000003.png", "000005.png", "000006.png"]
    assert (folder / "choices.png").exists()
    log = (folder / "log.txt").read_text()
    assert "consensus after 3 iterations: gradient loss" in log
    assert "combination: greedy (BatchNorm couples the images of a batch)" in log


def test_the_plan_of_the_defaults_says_its_iterations(captured, tmp_path):
    flags = (
        "--root",
        tmp_path,
        "--checkpoint",
        captured("-a", "lenet", "-b", "3"),
        "--lr",
        0.1,
        "--epochs",
        1,
    )
    mlco = ("--MinCombine", "--epochs", 24000, "--n-seed", 8, "--dry-run")
    out = succeed("run.py", *flags, *mlco).out
    assert "= 124,800 iterations" in out
    assert "rounds: 1,000 + 1,000 + 1,000 + 1,000 + 1,000 + 1,000 + 1,000 + 200" in out
    assert "combination: gram" in out
    out = succeed("run.py", *flags, *mlco, "--combine-memory", 1).out
    assert "combination: greedy (24 per-sample gradients of 6 MiB in all exceed" in out
    rates = ("--T-init-rate", 0.5, "--total-T-in-rate", 0, "--T-end-rate", 0.5)
    out = succeed("run.py", *flags, *mlco, *rates).out
    assert "8 seed(s) x (12,000 initial + 0 in 0 rounds) + 12,000 final = 108,000" in out


@pytest.mark.parametrize("offload", [[], ["--offload-seeds"]])
def test_mlco_is_repeatable(captured, tmp_path, offload):
    path = captured("-a", "lenet", "-b", "3")
    flags = ("--MinCombine", "--n-seed", 2, "--epochs", 10, "--T-in", 2)
    _, first = attack(tmp_path, path, *flags)
    _, again = attack(tmp_path, path, *flags, *offload)
    assert torch.equal(images_of(first), images_of(again))


def test_mean_is_said_to_be_the_mean(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "3")
    result, folder = attack(tmp_path, path, "--strategy", "mean", "--n-seed", 2, "--epochs", 3)
    assert "chosen: mean" in (folder / "log.txt").read_text()
    parts = [attack(tmp_path, path, "--seed", s, "--epochs", 3)[1] for s in (0, 1)]
    mean = sum(images_of(part) for part in parts) / 2
    torch.testing.assert_close(images_of(folder), mean)
    assert result["losses"]["gradient"] > 0


def test_a_closed_output_does_not_end_the_attack(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "3")
    command = (
        f"{sys.executable} run.py --root {tmp_path} --checkpoint {path} --epochs 30 --lr 0.1 -p 1"
    )
    subprocess.run(f"{command} | head -1", cwd=ROOT, shell=True, check=True, capture_output=True)
    result = json.loads((tmp_path / "results" / "exp" / "test" / "result.json").read_text())
    assert result["iterations"] == 30


def test_a_second_run_replaces_nothing(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "3")
    _, first = attack(tmp_path, path)
    before = (first / "result.json").read_bytes()
    _, second = attack(tmp_path, path)
    assert (first.name, second.name) == ("test", "test-2")
    assert (first / "result.json").read_bytes() == before


def test_the_same_seed_gives_the_same_bits(captured, tmp_path):
    """And restart i of seed s is restart 0 of seed s + i, noise included."""
    path = captured("-a", "convnet", "-b", "4", "--upload-bn")
    flags = (
        "--epochs", 6, "--BN", 0.01, "--exact-bn", "--TV", 0.01, "--grad-sign",
        "--input-noise", 0.2,
    )  # fmt: skip
    result, first = attack(tmp_path, path, *flags, "--n-seed", 3, "--seed", 4)
    _, again = attack(tmp_path, path, *flags, "--n-seed", 3, "--seed", 4)
    assert torch.equal(images_of(first), images_of(again))
    singles = {seed: attack(tmp_path, path, *flags, "--seed", seed) for seed in (4, 5, 6)}
    for seed in result["seeds"]:
        assert singles[seed["seed"]][0]["losses"]["gradient"] == seed["gradient_loss"]
    winner = min(result["seeds"], key=lambda seed: seed["gradient_loss"])["seed"]
    assert torch.equal(images_of(first), images_of(singles[winner][1]))
    assert not torch.equal(images_of(singles[4][1]), images_of(singles[5][1]))


def test_capturing_twice_gives_the_same_bits(tmp_path):
    flags = ("-a", "resnet18", "-b", "9", "--upload-bn", "--seed", "2", "--target-idx", "1")
    a, b = (load(str(capture_photos(tmp_path / name, *flags))) for name in "ab")
    for key in ("target_gradient", "bn_mean_list", "bn_var_list"):
        assert all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True))
    assert torch.equal(a["x_true"], b["x_true"])


def test_lenet_gives_the_photographs_away(captured, tmp_path):
    """The demo with a fifth of its iterations."""
    path = captured("-a", "lenet", "-b", "8", "--outlayer-state", "keep")
    result, _ = attack(
        tmp_path, path, "--epochs", 600, "--lr", 0.05, "--TV", 1e-4, "--TV-end", 1e-6,
        "--grad-sign", "--input-boxed", "--min-grads-loss", "--metric", "--no-controls",
    )  # fmt: skip
    scores = result["metrics"]
    assert scores["mean"]["psnr"] >= 24
    assert scores["mean"]["psnr"] > scores["baselines"]["mean colour"]["psnr"] + 5
    assert all(image["above_baselines"] for image in scores["images"])


def test_a_gradient_of_other_images_gives_no_photographs(captured, tmp_path):
    """The control: the same attack on the gradient of a batch of crops, scored on these."""
    path = captured("-a", "lenet", "-b", "8", "--outlayer-state", "keep")
    other = captured("-a", "lenet", "-b", "8", "--outlayer-state", "keep", "--target-idx", "1")
    checkpoint = load(str(path))
    checkpoint["target_gradient"] = load(str(other))["target_gradient"]
    bind(checkpoint)
    torch.save(checkpoint, tmp_path / "mixed.pth.tar")
    result, _ = attack(
        tmp_path, tmp_path / "mixed.pth.tar", "--epochs", 200, "--lr", 0.05, "--TV", 1e-4,
        "--grad-sign", "--input-boxed", "--min-grads-loss", "--metric",
    )  # fmt: skip
    assert not any(image["above_baselines"] for image in result["metrics"]["images"])
    assert result["metrics"]["truth_gradient"]["kind"] == "other"
    assert result["metrics"]["verdict"]["verdict"] == "incomplete"


@pytest.mark.parametrize("flags", [("--optim", "LBFGS"), ("--gradient-loss-fun", "L2")])
def test_other_choices_lower_the_loss(captured, tmp_path, flags):
    path = captured("-a", "lenet", "-b", "3")
    _, folder = attack(tmp_path, path, *flags, "--epochs", 15, "--lr", 0.5)
    with open(folder / "losses.csv") as file:
        losses = [float(row["gradient"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("method", ["exact", "plain"])
def test_both_pixel_gradients_run(captured, tmp_path, method):
    path = captured("-a", "convnet", "-b", "4", "--upload-bn")
    flags = ("--pixel-gradient", method, "--epochs", 3, "--TV", 0.1)
    result, _ = attack(tmp_path, path, *flags, "--bn-grad", "detached")
    assert result["settings"]["bn_grad"] == "detached"
    exact, _ = attack(tmp_path, path, *flags)
    assert exact["losses"]["gradient"] != result["losses"]["gradient"]


def test_forcing_statistics_beside_a_protected_gradient_warns(captured, tmp_path):
    protection = ("--enable-dp", "-C", "1", "--sigma", "1e-4")
    path = captured("-a", "convnet", "-b", "4", "--upload-bn", *protection)
    flags = ("--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1)
    warned = succeed("run.py", *flags, "--bn-coupling", "forced")
    lines = [line for line in warned.out.splitlines() if line.startswith("warning: --bn-coup")]
    assert len(lines) == 1
    assert "the client clipped them or added noise" in lines[0]


def test_exact_bn_without_statistics_warns_and_records(captured, tmp_path):
    path = captured("-a", "convnet", "-b", "4")
    flags = ("--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1, "--BN", 0.1)
    warned = succeed("run.py", *flags, "--exact-bn")
    lines = [line for line in warned.out.splitlines() if line.startswith("warning")]
    assert len(lines) == 1
    assert "--upload-bn" in lines[0]
    assert "warning" not in succeed("run.py", *flags).out
    result = json.loads((tmp_path / "results" / "exp" / "test" / "result.json").read_text())
    assert result["bn_source"] == "running"


@pytest.mark.parametrize("script", ["training.py", "run.py"])
def test_dry_run_prints_the_plan_and_writes_nothing(captured, tmp_path, script):
    flags = ["--data-name", "photos", "-a", "lenet", "-b", 3, "--results", tmp_path / "new"]
    if script == "run.py":
        flags = ["--checkpoint", captured("-a", "lenet", "-b", "3"), "--root", tmp_path / "new",
                 "--lr", 0.1, "--epochs", 70, "--n-seed", 3]  # fmt: skip
    outcome = succeed(script, *flags, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert "parameters" in outcome.out
    if script == "run.py":
        assert "3 seed(s) x 70 = 210 iterations" in outcome.out
        assert "ms per iteration" in outcome.out
        assert "peak memory" in outcome.out


def test_a_loss_that_is_not_finite_is_said(captured, tmp_path, monkeypatch):
    path = captured("-a", "lenet", "-b", "3")
    flags = ("--root", tmp_path, "--checkpoint", path, "--epochs", 30)
    outcome = call("run.py", *flags, "--lr", "1e30", "--input-norm=-1e-6", "--n-seed", 2)
    assert outcome.code == 0
    assert outcome.out.count(": at iteration 1 the prior norm is inf, so it ended") == 2
    result = json.loads((tmp_path / "results" / "exp" / "test" / "result.json").read_text())
    assert result["stopped"] == "not finite"
    assert {seed["reason"] for seed in result["seeds"]} == {"at iteration 1 the prior norm is inf"}
    assert result["losses"]["gradient"] > 0


def strict(path):
    """The content of a JSON file, which holds no NaN or Infinity, as some writers leave them."""

    def refuse(word):
        raise AssertionError(f"{path}: {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_has_no_value_is_null_in_the_result(captured, tmp_path):
    """SSIM and LPIPS of a tiny image, the interval over one image, the loss of a failed seed."""
    path = captured("-a", "lenet", "-b", "1", "--image-size", "8")
    attack(tmp_path, path, "--metric")
    result = strict(tmp_path / "results" / "exp" / "test" / "result.json")
    (image,) = result["metrics"]["images"]
    assert image["ssim"] is image["lpips"] is result["metrics"]["mean"]["ssim"] is None
    assert image["psnr"] == result["metrics"]["mean"]["psnr"] > 0
    assert not image["exact"]
    difference = result["metrics"]["leakage"]["psnr"]
    assert difference["low"] is difference["high"] is None
    assert difference["mean"] == difference["images"][0]
    checkpoint = load(str(path))
    checkpoint["target_gradient"][0][0] = 1e30  # its square is not finite in float32
    bind(checkpoint)
    torch.save(checkpoint, tmp_path / "overflow.tar")
    outcome = call(
        "run.py", "--root", tmp_path, "--id", "failed", "--checkpoint", tmp_path / "overflow.tar",
        "--lr", "0.1", "--epochs", 1, "--gradient-loss-fun", "L2",
    )  # fmt: skip
    assert outcome.code == 1
    assert "no seed had a finite loss" in outcome.err
    assert "at iteration 0 the gradient distance is inf" in outcome.err
    result = strict(tmp_path / "results" / "exp" / "failed" / "result.json")
    assert result["losses"] == {"gradient": None, "total": None}
    assert result["seeds"][0]["gradient_loss"] is None


LONG = ("--epochs", "1000000", "--lr", "0.1", "-p", "20", "--n-seed", "3")


def check_what_an_interruption_saved(root):
    folder = root / "results" / "exp" / "test"
    result = json.loads((folder / "result.json").read_text())
    assert result["stopped"] == "interrupted"
    assert len(result["seeds"]) == 1
    assert images_of(folder).shape == (3, 3, 32, 32)
    assert (folder / "pairs.png").exists()


def test_an_interrupted_run_saves_what_there_is(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "3")
    process = subprocess.Popen(
        [sys.executable, "run.py", "--root", str(tmp_path), "--checkpoint", str(path), *LONG],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = ""
    while "iteration 40/" not in seen:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        seen += line
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=HANG)
    assert process.returncode == 130, errors
    assert "interrupted after" in rest
    check_what_an_interruption_saved(tmp_path)


def test_a_terminated_run_saves_what_there_is(captured, tmp_path, monkeypatch):
    """In this process, which would end if the script did not handle the signal."""
    say = Reporter.say

    def say_and_terminate(self, text):
        say(self, text)
        if "iteration 40/" in text:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Reporter, "say", say_and_terminate)
    path = captured("-a", "lenet", "-b", "3")
    outcome = call("run.py", "--root", tmp_path, "--checkpoint", path, *LONG)
    assert outcome.code == 143, outcome.err
    assert "interrupted after" in outcome.out
    check_what_an_interruption_saved(tmp_path)


def test_lines_from_before_the_folder_reach_the_log(tmp_path, capsys):
    reporter = Reporter()
    reporter.say("early")
    reporter.log_to(tmp_path / "log.txt")
    reporter.say("late")
    assert (tmp_path / "log.txt").read_text() == "early\nlate\n"
    assert capsys.readouterr().out == "early\nlate\n"


def test_a_trained_head_is_kept_or_its_loss_is_said(tmp_path):
    import torchvision

    weights = torchvision.models.resnet18(num_classes=8).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    flags = ("--data-name", "photos", "-a", "resnet18", "-b", 2, "--pretrained",
             tmp_path / "resnet18.pth", "--results")  # fmt: skip
    lost = succeed("training.py", *flags, tmp_path / "a")
    assert "head fc is overwritten" in lost.out
    kept = succeed("training.py", *flags, tmp_path / "b", "--outlayer-state", "keep")
    assert "overwritten" not in kept.out
    (path,) = (tmp_path / "b").glob("*.tar")
    assert torch.equal(load(str(path))["state_dict"]["fc.weight"], weights["fc.weight"])


def test_a_gradient_of_zero_is_refused(tmp_path):
    """Whose bias makes the network certain of the one label there is."""
    model = build_model("lenet", 8, (3, 32, 32))
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state[f"{find_head(model)[0]}.bias"][0] = 1000
    torch.save(state, tmp_path / "certain.pth")
    outcome = call(
        "training.py", "--data-name", "photos", "-a", "lenet", "-b", 1, "--results",
        tmp_path / "new", "--pretrained", tmp_path / "certain.pth", "--outlayer-state", "keep",
    )  # fmt: skip
    assert outcome.code == 2
    assert outcome.err == (
        "error: --arch lenet: the gradient of this batch is zero: the network is already certain "
        "of every label; give other weights\n"
    )
    assert "settings" not in outcome.out
    assert not (tmp_path / "new").exists()


def test_what_the_network_cannot_process_is_said_before_the_settings(
    captured, tmp_path, monkeypatch
):
    def refuse(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(torch.nn.Linear, "forward", refuse)
    path = captured("-a", "lenet", "-b", "3")
    outcome = call("run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1)
    assert outcome.code == 2
    assert "lenet cannot process its images (3, 32, 32): mat1 and mat2" in outcome.err
    assert outcome.out == ""
    assert not list(tmp_path.iterdir())


def test_a_bug_in_a_prior_shows_as_a_bug(captured, tmp_path, monkeypatch):
    """It is no fault of the checkpoint, and its traceback is not swallowed."""

    def broken(candidate):
        return candidate.x @ candidate.x[0, 0, :3]

    monkeypatch.setitem(PRIOR_FUNCTIONS, "tv", broken)
    path = captured("-a", "lenet", "-b", "3")
    flags = ("--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1, "--TV", 0.1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call("run.py", *flags)
    assert not list(tmp_path.iterdir())


def test_time_of_day_is_not_in_the_results(captured, tmp_path):
    """Two runs a second apart differ in nothing but their durations."""
    path = captured("-a", "lenet", "-b", "3")
    a, _ = attack(tmp_path, path, "--metric")
    time.sleep(1)
    b, _ = attack(tmp_path, path, "--metric")
    for result in (a, b):
        for key in ("seconds", "iterations_per_second", "peak_memory_mib"):
            del result[key]
        for control in result["controls"].values():
            del control["seconds"]
    assert a == b
