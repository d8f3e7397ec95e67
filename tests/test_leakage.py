"""What of a reconstruction is leakage: controls, intervals, and the gradient information ratio."""

import json
import math
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import run
from inversion.leakage import gradient_information_ratio, information_ratio
from inversion.objective import Objective, Weights
from inversion.optimise import Loop, reconstruct
from inversion.pixel_gradient import exact, prior_only
from models.build import build_model
from models.gradient import batch_gradient, gradient_mode
from models.target import target_from_checkpoint
from tests.support import attack, call, capture_photos, photos, smooth_network, succeed, target_of
from utils.checkpoint import load, save
from utils.metrics import RESAMPLES, bootstrap_interval
from utils.scoring import leakage, leakage_verdict, score_reconstruction

# Gradient information ratio -----------------------------------------------------------------


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("arch", ["lenet", "convnet", "resnet18"])
def test_information_equals_a_slow_loop(arch, train_mode):
    """Every sample's loss inside the batch, differentiated alone, against torch's own modules."""
    torch.manual_seed(0)
    model = build_model(arch, 8, (3, 32, 32)).double()
    x, y = photos(5, 32, target_idx=1)
    x = x.double()
    found = gradient_information_ratio(model, x, y, train_mode=train_mode)
    assert found.independent == (arch == "lenet" or not train_mode)

    whole = torch.cat([g.flatten() for g in batch_gradient(model, x, y, train_mode=train_mode)])
    total = torch.zeros_like(whole)
    for i in range(5):
        with gradient_mode(model, train_mode):
            logits = model(x)
            loss = F.cross_entropy(logits[i : i + 1], y[i : i + 1])
            g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, model.parameters())])
        total += g
        expected = {
            "confidence": logits.softmax(1)[i, y[i]],
            "predicted": logits[i].argmax(),
            "predicted_confidence": logits.softmax(1)[i].max(),
            "norm": g.norm(),
            "squared_l2": (g - whole).square().sum(),
            "cosine_distance": 1 - F.cosine_similarity(g, whole, dim=0),
            "sign_rate": 100 * (g.sign() == whole.sign()).double().mean(),
            "information": g @ whole,
        }
        for name, value in expected.items():
            assert getattr(found, name)[i].item() == pytest.approx(value.item(), rel=1e-6), name
    torch.testing.assert_close(total / 5, whole, rtol=0, atol=1e-5 * whole.norm().item())
    assert found.batch_norm == pytest.approx(whole.norm().item())
    assert found.information.mean().item() == pytest.approx(found.batch_norm**2)
    assert found.ratio.sum().item() == pytest.approx(100, abs=0.01)


def test_ratio_shifts_negative_information():
    ratio = information_ratio(torch.tensor([-1.0, 0.0, 2.0]))
    assert ratio.tolist() == [0, 25, 75]  # shifted to 0, 1, 3
    assert information_ratio(torch.tensor([1.0, 3.0])).tolist() == [25, 75]  # not shifted
    assert information_ratio(torch.zeros(4)).tolist() == [25] * 4


def test_information_of_the_model_leaves_it_alone():
    model = build_model("convnet", 8, (3, 32, 32)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradient_information_ratio(model, *photos(3, 32), train_mode=True)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [["--model-eval"], []])
def test_information_is_printed_and_written(captured, tmp_path, mode):
    path = captured("-a", "convnet", "-b", "4", *mode)
    result, folder = attack(tmp_path, path, "--epochs", 2, "--GInfoR")
    found = result["information"]
    assert sum(found["ratio"]) == pytest.approx(100, abs=0.01)
    assert found["independent"] == bool(mode)
    assert found["label"] == [0, 1, 2, 3]
    log = (folder / "log.txt").read_text()
    kind = "every image's own gradient" if mode else "share inside the batch's statistics"
    assert kind in log
    assert "| equal signs % | information | ratio % |" in log
    assert "| batch |" in log
    norm = load(str(path))["target_gradient"]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in norm))
    assert found["batch_norm"] == pytest.approx(norm, rel=1e-5)


def test_information_needs_the_truth(tmp_path):
    path = capture_photos(tmp_path, "-a", "lenet", "-b", "2", "--seal")
    flags = ("--root", tmp_path, "--checkpoint", path, "--labels", "0,1", "--lr", 0.1, "--GInfoR")
    outcome = call("run.py", *flags)
    assert outcome.code == 2
    assert "--GInfoR" in outcome.err
    assert "holds no truth" in outcome.err
    (truth,) = tmp_path.glob("*-truth.pth.tar")
    assert "ratio %" in succeed("run.py", *flags, "--truth", truth).out


# Intervals ----------------------------------------------------------------------------------


def test_bootstrap_interval():
    values = np.array([0.0, 1.0, 2.0, 5.0, 7.0])
    low, high = bootstrap_interval(values)
    draw = np.random.default_rng(1)
    means = draw.choice(values, (RESAMPLES, 5)).mean(1)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.1)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.1)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(np.full(6, 2.5)) == (2.5, 2.5)
    assert all(math.isnan(v) for v in bootstrap_interval(np.array([1.0])))


def test_leakage_is_what_stands_above_the_best_control():
    scores = {"psnr": [20.0, 12.0, 30.0], "ssim": [0.5, math.nan, 0.9], "lpips": [0.1, 0.2, 0.3]}
    controls = [
        {"psnr": [10.0, 13.0, 11.0], "ssim": [0.1] * 3, "lpips": [0.5, 0.1, 0.4]},
        {"psnr": [12.0, 11.0, 10.0], "ssim": [0.2] * 3, "lpips": [0.6, 0.3, 0.2]},
    ]
    found = leakage(scores, controls)
    assert found.keys() == {"psnr", "lpips"}  # one SSIM is missing
    assert found["psnr"]["images"] == [8, -1, 19]
    assert found["psnr"]["mean"] == pytest.approx(26 / 3)
    assert found["lpips"]["images"] == pytest.approx([0.4, -0.1, -0.1])
    assert found["psnr"]["low"] < 26 / 3 < found["psnr"]["high"]
    perfect = leakage({"psnr": [math.inf]}, [{"psnr": [10.0]}])
    assert perfect["psnr"]["mean"] == 90  # up to 100 dB


@pytest.mark.parametrize(
    ("psnr", "ssim", "verdict"),
    [
        ([3.0, 4.0, 5.0], [0.1, 0.2, 0.3], "leakage above the prior:"),
        ([-3.0, -4.0, -5.0], [0.1, 0.2, 0.3], "leakage above the prior:"),  # structure alone
        ([-3.0, 9.0, -5.0], [-0.1, 0.2, -0.3], "leakage above the prior not shown on average:"),
        ([-3.0, -4.0, -5.0], [-0.1, -0.2, -0.3], "no leakage above the prior:"),
        ([-3.0, 0.0, -5.0], [-0.1, 0.2, -0.3], "no leakage above the prior:"),  # none above
        ([-3.0, 0.9] + [-5.0] * 9, [-0.1] * 11, "no leakage above the prior:"),  # none clearly
        # One patient among eleven: below on average, and yet not called safe.
        ([-3.0, 8.0] + [-9.0] * 9, [-0.1] * 11, "leakage above the prior not shown on average:"),
        ([2.0], [-0.1], "leakage above the prior:"),
        ([-2.0], [-0.1], "no leakage above the prior:"),
    ],
)
def test_verdict(psnr, ssim, verdict):
    zero = {"psnr": [0.0] * len(psnr), "ssim": [0.0] * len(psnr)}
    found = leakage({"psnr": psnr, "ssim": ssim}, [zero])
    text = leakage_verdict(found, {"prior only": found})
    assert text.startswith(verdict)
    assert "best of the controls prior only" in text
    assert f"{sum(v > 0 for v in psnr)} of {len(psnr)} images stand above" in text
    best = int(np.argmax(psnr))
    assert (f"image {best} the most, by +" in text) == (max(psnr) > 0)
    assert (f"image {best} is nearest, " in text) == (max(psnr) <= 0)
    assert ("look at them" in text) == ("not shown" in verdict)
    assert ("95 % interval" in text) == (len(psnr) > 1)
    assert ("too narrow" in text) == (1 < len(psnr) < 8)
    assert ("nothing follows about a defence" in text) == (
        found["psnr"]["high"] < -1 or psnr == [-2]
    )


def test_every_control_is_told_alone():
    scores = {"psnr": [9.0, 8.5, 9.5]}
    flat, other = {"psnr": [12.0] * 3}, {"psnr": [7.0] * 3}
    alone = {"prior only": leakage(scores, [flat]), "other gradient": leakage(scores, [other])}
    text = leakage_verdict(leakage(scores, [flat, other]), alone)
    assert text.startswith("no leakage above the prior: PSNR -3.00 dB")
    assert "prior only PSNR -3.00 dB" in text
    assert "other gradient PSNR +2.00 dB" in text


def test_controls_are_paired_by_the_same_rule():
    true = torch.rand(3, 3, 16, 16)
    y = torch.arange(3)
    shuffled = true[[1, 2, 0]]
    scores, text = score_reconstruction(
        true, true, y, y, by_index=False, controls={"prior only": shuffled}
    )
    assert scores["controls"]["prior only"]["reconstruction"] == [2, 0, 1]
    assert scores["leakage"]["psnr"]["mean"] == 0  # as good as the attack
    assert "no leakage above the prior" in text
    assert "control: prior only" in text
    scores, text = score_reconstruction(
        true, true, y, y, by_index=True, controls={"prior only": shuffled}
    )
    assert scores["leakage"]["psnr"]["mean"] > 50
    assert "\nleakage above the prior: PSNR +" in text
    assert score_reconstruction(true, true, y, y, by_index=True)[0]["leakage"] is None


# Controls -----------------------------------------------------------------------------------


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
    assert losses.gradient == losses.total
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
    found = result["metrics"]["leakage"]["psnr"]
    assert found["low"] > 3
    assert found["low"] < found["mean"] < found["high"]
    assert f"leakage above the prior: PSNR {found['mean']:+.2f} dB (95 % interval" in log
    assert "no leakage above the prior" not in log
    assert "8 of 8 images stand above every control" in log
    assert (folder / "controls.png").exists()


def test_a_shuffled_gradient_does_not(demo_runs):
    result, log, _ = demo_runs["shuffled"]
    assert "no leakage above the prior" in log
    assert "what was sent is shuffled" in log
    assert all(of["low"] <= 0 for of in result["metrics"]["leakage"].values())


def test_controls_do_not_know_the_clients_gradient(demo_runs):
    """The same images whether the client's gradient is true or shuffled."""
    true, shuffled = (demo_runs[gradient][0] for gradient in ("true", "shuffled"))
    for name, control in true["metrics"]["controls"].items():
        del control["leakage"], shuffled["metrics"]["controls"][name]["leakage"]
    assert true["metrics"]["controls"] == shuffled["metrics"]["controls"]
    assert true["metrics"]["mean"] != shuffled["metrics"]["mean"]
    names = {"mean image", "prior only", "other gradient"}
    assert true["controls"].keys() == true["metrics"]["controls"].keys() == names


def test_time_of_controls_stands_apart(demo_runs, captured, tmp_path):
    result, log, _ = demo_runs["true"]
    assert result["iterations"] == 300
    seconds = {name: of["seconds"] for name, of in result["controls"].items()}
    assert [of["iterations"] for of in result["controls"].values()] == [0, 300, 300]
    assert seconds["mean image"] == 0 < min(seconds["prior only"], seconds["other gradient"])
    assert result["iterations_per_second"] == pytest.approx(300 / result["seconds"])
    assert re.search(r"controls: \d+:\d\d beside that", log)
    alone, folder = attack(tmp_path, captured(*DEMO), *SHORT, "--no-controls")
    assert alone["controls"] is alone["metrics"]["controls"] is alone["metrics"]["leakage"] is None
    assert alone["metrics"]["mean"] == result["metrics"]["mean"]
    assert "control, " not in (folder / "log.txt").read_text()


def test_long_attacks_have_controls_only_when_asked(captured, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CONTROL_SECONDS", 0)
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
    mixed = run.shuffled(target, 0)
    for field in ("gradient", "bn_mean", "bn_var"):
        for a, b in zip(getattr(target, field), getattr(mixed, field), strict=True):
            assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
            assert a.numel() < 8 or a.unique().numel() == 1 or not torch.equal(a, b)
    assert run.shuffled(replace(target, bn_mean=None, bn_var=None), 0).bn_mean is None


def test_what_the_attack_found_is_written_before_the_controls(captured, tmp_path, monkeypatch):
    """So that nothing that happens to a control can take it away."""
    path = captured("-a", "lenet", "-b", "3")
    monkeypatch.setattr(run, "run_controls", lambda *_: 1 / 0)
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
    save(checkpoint, str(path))
    result, folder = attack(tmp_path, path, "--metric")
    assert result["controls"].keys() == {"mean image", "prior only"}
    log = (folder / "log.txt").read_text()
    assert "control, other gradient: left out: the target's gradient is zero" in log


def test_an_interrupted_control_is_left_out(captured, tmp_path, monkeypatch):
    """What the attack made is kept, and so are the controls that are done."""
    path = captured("-a", "lenet", "-b", "3", "--with-control")

    raised = []

    def interrupted(objective, x, progress=0.0):
        if progress == 0.5 and not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGINT)
        return prior_only(objective, x, progress)

    monkeypatch.setattr(run, "prior_only", interrupted)
    outcome = call(
        "run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 3, "--metric"
    )
    assert outcome.code == 130
    assert "control, prior only: interrupted, left out" in outcome.out
    result = json.loads((tmp_path / "results" / "exp" / "test" / "result.json").read_text())
    assert result["controls"].keys() == {"mean image"}
    assert result["stopped"] is None
    assert result["iterations"] == 3
