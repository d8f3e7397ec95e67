"""The attack without the client's gradient: what runs, what is written, what is left out."""

import json
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from inversion.audit import controls
from inversion.audit.inputs import make_case, shuffled
from inversion.objective import Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import PIXEL_GRADIENTS, exact, prior_only
from inversion.settings import PRIOR_ONLY, AttackSettings, Loop, Weights
from models.binding import bind
from models.build import build_model
from models.checkpoint import load
from models.gradient import whole_batch_gradient
from models.reading import target_from_checkpoint
from tests.support import attack, call, capture_photos, photos, smooth_network, target_of
from utils.shard import ALONE
from utils.tensor_files import save


@pytest.mark.parametrize("train_mode", [True, False])
def test_prior_only_is_the_objective_without_its_gradient(train_mode):
    torch.manual_seed(0)
    model = smooth_network(8)
    x, y = photos(4, 16)
    target = target_of(model, x.double(), y, train_mode=train_mode)
    weights = Weights(0.0, {"tv": 0.1, "bn": 0.01, "norm": -1e-3}, {"tv": 0.01})
    objective = Objective(model, target, y, weights, bn_source="running")
    start = torch.randn(4, 3, 16, 16).double()
    losses, derivative = prior_only(objective, start, 0.5)
    theirs, slow = exact(objective, start, 0.5)
    torch.testing.assert_close(derivative, slow)
    torch.testing.assert_close(losses.total, theirs.total)
    assert losses.gradient is None
    assert losses.criterion == losses.total
    assert losses.terms.keys() == theirs.terms.keys()


def test_prior_only_without_priors_stays_at_the_start():
    model = build_model("lenet", 8, (3, 32, 32))
    x, y = photos(2, 32)
    objective = Objective(model, target_of(model, x, y), y, Weights())
    start = torch.randn(2, 3, 32, 32)
    loop = Loop(3, 0.1, signed=True, keep_best=True)
    result = reconstruct(lambda x, p: prior_only(objective, x, p), start, loop)
    assert torch.equal(result.x, start)


def test_prior_only_takes_no_gradient(monkeypatch):
    """It costs what it must: no pass through the network without a BN prior, none backwards."""
    model = build_model("convnet", 8, (3, 32, 32))
    x, y = photos(2, 32)
    target = target_of(model, x, y)
    objectives = [
        Objective(model, target, y, Weights(priors=priors))
        for priors in ({"tv": 0.1}, {"tv": 0.1, "bn": 0.1})
    ]
    passes = []
    model.register_forward_hook(lambda *_: passes.append("forward"))
    monkeypatch.setattr("inversion.objective.batch_gradient", lambda *_, **__: 1 / 0)
    prior_only(objectives[0], x)
    assert passes == []
    prior_only(objectives[1], x)
    assert passes == ["forward"]


DEMO = ("-a", "lenet", "-b", "8", "--outlayer-state", "keep", "--with-control")
SHORT = (
    "--epochs", 300, "--lr", 0.05, "--TV", 1e-4, "--TV-end", 1e-6, "--grad-sign", "--input-boxed",
    "--min-grads-loss", "--metric",
)  # fmt: skip


@pytest.fixture(scope="module")
def demo_runs(captured, tmp_path_factory):
    """The demo with a tenth of its iterations: true and shuffled gradient → result, log, folder."""
    found = {}
    for gradient in ("true", "shuffled"):
        folder = tmp_path_factory.mktemp(gradient)
        flags = (*SHORT, "--target-gradient", gradient)
        result, folder = attack(folder, captured(*DEMO), *flags)
        found[gradient] = result, (folder / "log.txt").read_text(), folder
    return found


def test_the_true_gradient_leaks_and_it_is_said_how_much(demo_runs):
    result, log, folder = demo_runs["true"]
    found, verdict = result["metrics"]["leakage"], result["metrics"]["verdict"]
    assert found["psnr"]["low"] > 3
    assert found["ssim"]["low"] < found["ssim"]["mean"] < found["ssim"]["high"]
    assert verdict["verdict"] == "leakage: reconstruction"
    assert verdict["p"] < 0.001
    assert result["metrics"]["identification"]["ranks"] == [1] * 8
    assert f"leakage: reconstruction: SSIM {found['ssim']['mean']:+.3f} (95 % interval" in log
    assert f"worst image {verdict['worst_image']} (rank 1 of 100, SSIM +" in log
    assert "no leakage" not in log
    assert "8 of 8 images stand above every control" in log
    for name in ("controls.png", "decoys.png"):
        assert (folder / name).exists()


def test_a_shuffled_gradient_does_not(demo_runs):
    result, log, _ = demo_runs["shuffled"]
    assert result["metrics"]["verdict"]["verdict"] == "no leakage shown"
    assert "no leakage shown: p = " in log
    assert "what was sent is shuffled" in log
    assert "why it found no more: " in log


def test_controls_do_not_know_the_clients_gradient(demo_runs):
    """The same images whether the client's gradient is true or shuffled, but for the control whose
    gradient is shuffled as well."""
    true, shuffled = (demo_runs[gradient][0] for gradient in ("true", "shuffled"))
    for name in ("mean image", "prior only"):
        images = [of["metrics"]["controls"][name]["images"] for of in (true, shuffled)]
        assert images[0] == images[1]
    assert true["metrics"]["mean"] != shuffled["metrics"]["mean"]
    names = {"mean image", "prior only", "other gradient"}
    assert true["controls"].keys() == true["metrics"]["controls"].keys() == names


def test_time_of_controls_stands_apart(demo_runs):
    result, log, _ = demo_runs["true"]
    assert result["iterations"] == 300
    seconds = {name: of["seconds"] for name, of in result["controls"].items()}
    assert [of["iterations"] for of in result["controls"].values()] == [0, 300, 300]
    assert seconds["mean image"] == 0 < min(seconds["prior only"], seconds["other gradient"])
    assert result["iterations_per_second"] == pytest.approx(300 / result["seconds"])
    assert re.search(r"controls: \d+:\d\d beside that", log)


def test_an_attack_is_the_same_without_controls(captured, tmp_path):
    flags = ("--epochs", 20, *SHORT[2:])
    result, _ = attack(tmp_path / "with", captured(*DEMO), *flags)
    alone, folder = attack(tmp_path / "without", captured(*DEMO), *flags, "--no-controls")
    assert result["controls"] is not None
    assert alone["controls"] is alone["metrics"]["controls"] is alone["metrics"]["leakage"] is None
    assert alone["metrics"]["mean"] == result["metrics"]["mean"]
    assert "control, " not in (folder / "log.txt").read_text()


def test_long_attacks_have_controls_only_when_asked(captured, tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "CONTROL_SECONDS", 0)
    path = captured("-a", "lenet", "-b", "3")
    result, folder = attack(tmp_path, path, "--metric")
    assert result["controls"] is None
    assert "give --controls to have them" in (folder / "log.txt").read_text()
    result, folder = attack(tmp_path, path, "--metric", "--controls")
    assert result["controls"].keys() == {"mean image", "prior only"}
    assert "training.py --with-control" in (folder / "log.txt").read_text()
    result, _ = attack(tmp_path, path)
    assert result["controls"] is None  # nothing is scored


@pytest.mark.parametrize(
    ("flags", "prior_only_iterations"),
    [
        (("--n-seed", 2), 6),
        (("--n-seed", 2, "--strategy", "mean"), 12),
        (("--n-seed", 2, "--MinCombine", "--T-in", 1), 6),
        (("--optim", "LBFGS", "--lr", 1), 6),
    ],
)
def test_controls_of_every_strategy(captured, tmp_path, flags, prior_only_iterations):
    """As many seeds as matter: one where seeds would be chosen by their gradient."""
    path = captured("-a", "convnet", "-b", "3", "--upload-bn", "--with-control")
    result, _ = attack(
        tmp_path, path, "--epochs", 6, "--TV", 0.01, "--BN", 0.01, "--exact-bn", "--metric", *flags
    )
    assert result["controls"]["prior only"]["iterations"] == prior_only_iterations
    assert result["controls"]["other gradient"]["iterations"] == result["iterations"]
    assert np.isfinite(result["metrics"]["leakage"]["psnr"]["mean"])


def test_statistics_of_the_batch_are_leakage_and_no_prior(captured, tmp_path):
    """Prior only pulls to running statistics though the attack has the batch's."""
    path = captured("-a", "convnet", "-b", "3", "--upload-bn", "--with-control")
    flags = ("--epochs", 5, "--BN", 0.01, "--metric", "--grad-sign")
    exact_bn, _ = attack(tmp_path, path, *flags, "--exact-bn")
    running, _ = attack(tmp_path, path, *flags)
    assert (exact_bn["bn_source"], running["bn_source"]) == ("batch", "running")
    ours, theirs = (of["metrics"]["controls"] for of in (exact_bn, running))
    assert ours["prior only"]["images"] == theirs["prior only"]["images"]
    assert ours["other gradient"]["images"] != theirs["other gradient"]["images"]


def test_controls_force_their_own_statistics_or_none():
    torch.manual_seed(0)
    model = smooth_network(8)
    x, y = photos(4, 16)
    target = target_of(model, x.double(), y)
    settings = AttackSettings(Weights(), Loop(1, 0.1), bn_coupling="forced")
    case = make_case(settings, model, target, y, None, torch.device("cpu"), ALONE)
    x_other = torch.randn(x.shape, dtype=torch.float64)
    sent = whole_batch_gradient(model, x_other, y, target.loss, moments=True)
    other = case.attacked_by(settings, controls._with_update(target, sent)).objective
    assert other.gradient_distance(x_other) < 1e-20 < 1e-3 < other.gradient_distance(x.double())
    assert case.objective.gradient_distance(x.double()) < 1e-20
    without = case.attacked_by(settings.without_gradient(), replace(target, bn_mean=None))
    assert without.objective.couples_images


def test_an_attack_with_forced_statistics_and_its_controls(captured, tmp_path):
    path = captured("-a", "convnet", "-b", "3", "--upload-bn", "--with-control")
    flags = ("--epochs", 4, "--BN", 0.01, "--exact-bn", "--metric", "--n-seed", 2, "--MinCombine")
    flags += ("--T-in", 1)
    forced, folder = attack(tmp_path, path, *flags, "--bn-coupling", "forced")
    assert "combination: gram" in (folder / "log.txt").read_text()
    exactly, folder = attack(tmp_path, path, *flags)
    assert "combination: greedy" in (folder / "log.txt").read_text()
    assert forced["settings"]["bn_coupling"] == "forced"
    ours, theirs = (of["metrics"]["controls"] for of in (forced, exactly))
    assert ours["prior only"]["images"] == theirs["prior only"]["images"]
    assert ours["other gradient"]["images"] != theirs["other gradient"]["images"]


@pytest.mark.usefixtures("in_two_processes")
def test_controls_in_two_processes(captured, tmp_path):
    path = captured("-a", "convnet", "-b", "5", "--upload-bn", "--with-control")
    flags = (
        "--epochs", 4, "--TV", 0.01, "--BN", 0.01, "--exact-bn", "--metric", "--n-seed", 2,
        "--GInfoR",
    )  # fmt: skip
    alone, _ = attack(tmp_path / "1", path, *flags)
    for shard in ("batch", "seeds"):
        found, _ = attack(tmp_path / shard, path, *flags, "--nproc", 2, "--shard", shard)
        assert found["controls"].keys() == alone["controls"].keys()
        for name, control in alone["metrics"]["controls"].items():
            assert found["metrics"]["controls"][name]["images"]["psnr"] == pytest.approx(
                control["images"]["psnr"], abs=0.01
            )
        for name, value in alone["information"].items():
            if name != "seconds":
                assert found["information"][name] == pytest.approx(value, rel=1e-3), name


def test_shuffling_leaves_nothing_of_what_was_sent(captured):
    target = target_from_checkpoint(load(str(captured("-a", "convnet", "-b", "4", "--upload-bn"))))
    mixed = shuffled(target, 0)
    for field in ("gradient", "bn_mean", "bn_var"):
        for a, b in zip(getattr(target, field), getattr(mixed, field), strict=True):
            assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
            assert a.numel() < 8 or a.unique().numel() == 1 or not torch.equal(a, b)
    assert shuffled(replace(target, bn_mean=None, bn_var=None), 0).bn_mean is None


def test_what_the_attack_found_is_written_before_the_controls(captured, tmp_path, monkeypatch):
    """So that nothing that happens to a control can take it away."""
    path = captured("-a", "lenet", "-b", "3")
    monkeypatch.setattr(controls, "run_controls", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attack(tmp_path, path, "--metric", "--epochs", 2)
    folder = tmp_path / "results" / "exp" / "test"
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"]["mean"]["psnr"] > 0
    assert result["controls"] is None
    for name in ("x_recon.pth", "losses.csv", "pairs.png"):
        assert (folder / name).exists()


def test_a_control_that_cannot_be_is_left_out(tmp_path):
    path = capture_photos(tmp_path, "-a", "lenet", "-b", "3", "--with-control")
    checkpoint = load(str(path))
    control = checkpoint["control"]
    control["target_gradient"] = [torch.zeros_like(g) for g in control["target_gradient"]]
    bind(checkpoint)
    save(checkpoint, str(path))
    result, folder = attack(tmp_path, path, "--metric")
    assert result["controls"].keys() == {"mean image", "prior only"}
    assert result["metrics"]["verdict"]["verdict"] == "incomplete"
    log = (folder / "log.txt").read_text()
    assert "control, other gradient: left out: the target's gradient is zero" in log
    assert "incomplete: control other gradient could not be run: without it no verdict" in log


def test_an_interrupted_control_is_left_out(captured, tmp_path, monkeypatch):
    """What the attack made is kept, and so are the controls that are done."""
    path = captured("-a", "lenet", "-b", "3", "--with-control")

    raised = []

    def interrupted(objective, x, progress=0.0):
        if progress == 0.5 and not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGINT)
        return prior_only(objective, x, progress)

    monkeypatch.setitem(PIXEL_GRADIENTS, PRIOR_ONLY, interrupted)
    outcome = call(
        "run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 3, "--metric"
    )
    assert outcome.code == 130
    assert "control, prior only: interrupted, left out" in outcome.out
    result = json.loads((tmp_path / "results" / "exp" / "test" / "result.json").read_text())
    assert result["controls"].keys() == {"mean image"}
    assert result["metrics"]["verdict"]["verdict"] == "incomplete"
    said = "incomplete: control prior only was interrupted; control other gradient was not run"
    assert said in outcome.out
    assert "no leakage" not in outcome.out
    assert result["stopped"] is None
    assert result["iterations"] == 3
