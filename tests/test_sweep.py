"""A sweep: the client simulated again, every value attacked, one table, whatever the workers."""

import csv
import json
import math
import os
import signal
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm

from benchmarks import defences_table
from inversion.audit import subject
from inversion.audit.attack import Recorder
from inversion.audit.budget import Pace
from inversion.audit.flags import parser
from inversion.audit.identification import identify
from inversion.audit.inputs import load_inputs
from inversion.audit.settings import settings_from
from inversion.audit.subject import label_finding
from inversion.audit.suite_report import checkpoint_entry
from inversion.audit.sweep import job, picture
from inversion.audit.sweep import run as sweeping
from inversion.audit.sweep.job import attacks_of, decoys_per_image, run_job
from inversion.audit.sweep.picture import Panel, positions, save_sweeps
from inversion.audit.sweep.row import Job, Row
from inversion.audit.sweep.table import entries, rows_of, sweep_table, verdict_cell
from inversion.audit.verdict import (
    ALPHA,
    IDENTIFIABLE,
    INCOMPLETE,
    NOT_ARRIVED,
    NOT_SHOWN,
    corrected,
    judge,
)
from models.checkpoint import load
from models.gradient import ClientLoss, batch_gradient
from models.reading import target_from_checkpoint
from models.target import model_of
from tests.support import call, succeed
from train.flags import parser as client_parser
from train.settings import settings_from as client_settings_from
from train.variation import base_flags, simulate, varied
from utils.console import Silent
from utils.files import null_if_nan
from utils.script import Interrupts
from utils.shard import ALONE
from utils.tensor_files import save

CLIENT = ("-a", "lenet", "-b", "2", "--image-size", "16", "--outlayer-state", "keep")
CONTROL = ("--with-control", "--decoys", "29")
ATTACK = ("--epochs", 3, "--lr", 0.05, "--TV", 1e-4)


@pytest.fixture(scope="module")
def checkpoint(captured):
    return captured(*CLIENT, *CONTROL, "--target-idx", "10")


def sweep(folder, checkpoint, *flags):
    """Sweep; return the outcome, sweep.json and the folder."""
    outcome = succeed("run.py", "--root", folder, "--checkpoint", checkpoint, *ATTACK, *flags)
    (results,) = (folder / "results" / "exp").iterdir()
    return outcome, json.loads((results / "sweep.json").read_text()), results


def without_times(record):
    return [{name: v for name, v in row.items() if name != "seconds"} for row in record["rows"]]


@pytest.fixture(scope="module")
def swept(checkpoint, tmp_path_factory):
    """Three values, one of which cannot be captured, in one process."""
    folder = tmp_path_factory.mktemp("swept")
    return sweep(folder, checkpoint, "--sweep", "sigma=0,0.5,much")


def test_a_client_is_simulated_as_it_was(checkpoint):
    original = load(str(checkpoint))
    again, command = simulate(base_flags(original["args"], None), "", "", 0, 1, torch.device("cpu"))
    for name in ("x_true", "y_true"):
        assert torch.equal(original[name], again[name])
    assert all(
        torch.equal(a, b)
        for a, b in zip(original["target_gradient"], again["target_gradient"], strict=True)
    )
    assert again["protection"] is None
    assert command == (
        "python training.py --data-name=photos --target-idx=10 --batch-size=2 --image-size=16 "
        "--arch=lenet --outlayer-state=keep --decoys=29 --with-control"
    )


@pytest.mark.parametrize("defence", ["batch:1:0.1", "topk:0.1", "larger-batch:3"])
def test_its_command_captures_the_same_client(defence, checkpoint, tmp_path):
    """Noise too, whose seed the command names."""
    base = [*base_flags(load(str(checkpoint))["args"], None), "--decoys=3"]  # the last one counts
    swept, command = simulate(base, "defence", defence, 1, 1, torch.device("cpu"))
    succeed(*command.split()[1:], "--results", tmp_path)
    (path,) = tmp_path.glob("*-checkpoint.pth.tar")
    again = load(str(path))
    for a, b in zip(swept["target_gradient"], again["target_gradient"], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(swept["decoys"], again["decoys"])


@pytest.mark.parametrize(
    ("given", "parameter", "value", "expected"),
    [
        ([], "sigma", "0.1", {"enable_dp": True, "sigma": 0.1}),
        ([], "sigma", "0", {"enable_dp": False, "sigma": None}),
        ([], "C", "none", {"enable_dp": False, "max_per_sample_grad_norm": None}),
        (["--enable-dp", "-C", "2"], "sigma", "0", {"enable_dp": True, "sigma": 0.0}),
        (
            ["--enable-dp", "-C", "2", "--sigma", "0.1", "--dp-mode", "per-sample"],
            "C", "3",
            {"dp_mode": "per-sample", "max_per_sample_grad_norm": 3.0, "sigma": 0.1},
        ),
        (["--enable-dp", "--sigma", "1"], "batch-size", "3", {"batch_size": 3, "sigma": 1.0}),
        ([], "label-smoothing", "0.2", {"label_smoothing": 0.2}),
        (["--label-smoothing", "0.2"], "label-smoothing", "none", {"label_smoothing": 0.0}),
        ([], "replace-bn", "groupnorm", {"replace_bn": "groupnorm"}),
        ([], "local-steps", "4", {"local_steps": 4}),
        ([], "defence", "topk:0.1", {"defence": "topk:0.1"}),
        (
            ["--enable-dp", "-C", "2"], "defence", "none",
            {"defence": "none", "enable_dp": False, "max_per_sample_grad_norm": None},
        ),
        (["--local-steps", "4", "--local-lr", "0.1"], "local-steps", "2", {"local_steps": 2}),
        (
            ["--local-steps", "4", "--local-lr", "0.1"], "local-steps", "none",
            {"local_steps": None, "local_lr": None},
        ),
    ],
)  # fmt: skip
def test_a_parameter_is_changed_and_nothing_else(given, parameter, value, expected):
    base = ["--data-name", "photos", "-b", "4", "--target-idx", "10", *given]
    before, after = varied(base, "", "", 0), varied(base, parameter, value, 2)
    changed = {name: v for name, v in vars(after).items() if v != getattr(before, name)}
    expected = {name: v for name, v in expected.items() if v != getattr(before, name)}
    assert changed == {"target_idx": 12, **expected}


@pytest.mark.parametrize(
    ("defence", "parameter", "value", "expected"),
    [
        ("larger-batch:8", "batch-size", "3", {"batch_size": 3}),
        ("local-steps:4", "local-steps", "2", {"local_steps": 2}),
        ("local-steps:4", "sigma", "0.1", {"local_steps": 4, "sigma": 0.1, "enable_dp": True}),
        ("local-steps:4", "defence", "none", {"local_steps": None, "local_lr": None}),
        ("local-steps:4", "defence", "local-steps:2", {"local_steps": 2, "local_lr": 0.1}),
        ("groupnorm", "defence", "none", {"replace_bn": None}),
        ("groupnorm", "defence", "topk:0.1", {"replace_bn": None, "defence": "topk:0.1"}),
        ("larger-batch:8", "defence", "int8", {"batch_size": 8, "defence": "int8"}),
    ],
)
def test_a_defence_that_is_another_flag_does_not_overrule_the_sweep(
    defence, parameter, value, expected
):
    steps = ["--local-lr", "0.1"] if defence.startswith("local-steps") else []
    given = ["--data-name", "photos", "-b", "4", "--defence", defence, *steps]
    record = client_settings_from(client_parser().parse_args(given)).record
    args = varied(base_flags(record), parameter, value, 0)
    made = client_settings_from(args).record
    assert {name: made[name] for name in expected} == expected


def test_decoys_are_enough_for_the_batch():
    base = ["--data-name", "photos", *CLIENT]
    found, _ = simulate(base, "batch-size", "1", 0, 120, torch.device("cpu"))
    assert found["decoys"].shape[1] == 119


def test_a_bound_stands_beside_its_epsilon(checkpoint, tmp_path):
    """Φ(Φ⁻¹(1 / 30) + 1) for a noise multiplier of 1, here from another implementation."""
    flags = ("--sweep", "defence=dp-sgd:1:1,random:0.5")
    outcome, record, _ = sweep(tmp_path, checkpoint, *flags)
    private, sparse = record["rows"]
    assert private["mu"] == pytest.approx(1)
    assert private["bound"] == pytest.approx(norm.cdf(norm.ppf(1 / 30) + 1))
    assert private["epsilon"] > 1
    assert (sparse["mu"], sparse["bound"], sparse["epsilon"]) == (None, None, None)
    assert f"≤ {private['bound']:.2g}" in outcome.out


@pytest.mark.parametrize("without", [(), ("--without", "bn")])
def test_nothing_is_guaranteed_beside_batch_statistics(without, captured, tmp_path):
    """Whether or not this attacker has them: the client sent them."""
    given = ("-a", "convnet", "-b", "2", "--image-size", "16", "--model-eval", "--upload-bn")
    private = ("--defence", "dp-sgd:1:1", "--noise-seed", "1")
    target = captured(*given, *private, *CONTROL)
    words = map(str, ("--checkpoint", target, *ATTACK, "--root", tmp_path, "--metric", *without))
    settings = settings_from(parser().parse_args(list(words)))
    case, sealed = load_inputs(settings, Silent(), ALONE, 0)
    assert "the message as a whole carries no guarantee" in " ".join(case.guarantee)
    source = subject.Source(str(target), None, "", None, None, {})
    of = subject.Subject(source, settings, case, sealed, {}, Pace(1, 1))
    entry = checkpoint_entry(of, label_finding(case, sealed), [], False, {})["protection"]
    assert {entry[name] for name in ("epsilon", "delta", "mu", "bound")} == {None}
    row = job.client_fields(settings, case, sealed)
    assert (row["epsilon"], row["mu"], row["bound"]) == (None, None, None)
    assert row["protection"]["epsilon"] > 0


def test_noise_differs_between_batches_and_is_the_same_again():
    def sent(repeat, value="0.5"):
        base = ["--data-name", "photos", *CLIENT, "--decoys", "1", "--enable-dp", "-C", "1"]
        base += ["--sigma", "0.1", "--dp-mode", "per-sample"]
        return simulate(base, "sigma", value, repeat, 1, torch.device("cpu"))[0]

    first, again, other = sent(0), sent(0), sent(1)
    assert torch.equal(first["target_gradient"][0], again["target_gradient"][0])
    assert first["args"]["noise_seed"] != other["args"]["noise_seed"]
    assert first["protection"]["epsilon"] > 0


def test_rows_tell_what_was_found(swept):
    _, record, _ = swept
    plain, noisy, refused = record["rows"]
    assert [row["value"] for row in record["rows"]] == ["0", "0.5", "much"]
    assert plain["cosine"] == pytest.approx(1, abs=1e-6)
    assert noisy["cosine"] < 0.5
    assert plain["label_accuracy"] == 1
    assert plain["protection"] is None
    assert noisy["protection"]["sigma"] == 0.5
    assert plain["candidates"] == 30
    for row in (plain, noisy):
        assert row["reason"] is None
        assert row["batch_size"] == len(row["leakage"]) == 2
        for name in ("psnr", "ssim"):
            above = np.subtract(row["scores"][name], row["controls"][name])
            if name == row["metric"]:
                assert row["leakage"] == pytest.approx(above.tolist())
        assert row["sentence"].startswith(row["verdict"])
        assert len(row["lowest_control"]) == 2
        assert max(row["lowest_control"]) < 0
        assert row["arrived"] is False  # after 3 iterations
    assert refused["verdict"] is None
    assert "argument --sigma: 'much' is not a number" in refused["reason"]


def test_table_and_files(swept):
    outcome, record, folder = swept
    header, *lines = csv.reader((folder / "sweep.csv").open())
    assert len(lines) == len(record["rows"]) == 3
    first = dict(zip(header, lines[0], strict=True))
    assert first["parameter"] == "sigma"
    assert float(first["leakage_max"]) == pytest.approx(max(record["rows"][0]["leakage"]))
    assert float(first["control_psnr"]) == pytest.approx(
        np.mean(record["rows"][0]["controls"]["psnr"])
    )
    assert dict(zip(header, lines[2], strict=True))["verdict"] == ""
    assert "which no defence has tuned" in outcome.out
    assert "left out: much: " in outcome.out
    assert "each of the 2 verdicts" in outcome.out
    table = [line for line in outcome.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["sigma", "0", "0.5", "much"]
    assert (folder / "log.txt").read_text().endswith(outcome.out.splitlines()[-1] + "\n")
    assert not (folder / "clients").exists()
    for name in ("sweep.png", "images.png"):
        assert np.asarray(Image.open(folder / name).convert("RGB")).std() > 1


def test_every_entry_of_a_sweep_is_described(swept):
    """In docs/files.md, and none that is not there."""
    from tests.test_readme import first_column, section

    _, record, folder = swept
    text = section("docs/files.md", "sweep.json")
    whole, rows = text.split("The entries of `rows`:")
    assert sorted(first_column(whole)) == sorted(record)
    assert sorted(first_column(rows)) == sorted(record["rows"][0])
    assert all(f"`{path.name}`" in text for path in folder.iterdir())


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing catches it to save or to write."""


def test_a_killed_sweep_goes_on_with_the_clients_that_are_missing(
    checkpoint, swept, tmp_path, monkeypatch
):
    """The last ones by two workers, which find what one does."""
    _, whole, pictures = swept
    words = ["run.py", "--root", tmp_path, "--checkpoint", checkpoint, *ATTACK]
    words += ["--sweep", "sigma=0,0.5,much", "--keep-checkpoints"]
    keep, kept = sweeping.keep, []

    def keep_and_die(result, *rest):
        keep(result, *rest)
        kept.append(result.row.value)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "keep", keep_and_die)
        with pytest.raises(Killed):
            call(*words)
    (folder,) = (tmp_path / "results" / "exp").iterdir()
    outcome = succeed(*words, "--resume", folder, "--sweep-workers", 2)
    assert kept == ["0"]
    assert "1 of 3 clients were attacked before" in outcome.out
    assert "[1/3" not in outcome.out
    record = json.loads((folder / "sweep.json").read_text())
    assert without_times(record) == without_times(whole)
    for name in ("sweep.png", "images.png"):
        assert (folder / name).read_bytes() == (pictures / name).read_bytes()
    assert not (folder / "state").exists()
    assert len(list((folder / "clients").glob("sigma=0.5-0-checkpoint.pth.tar"))) == 1


def test_several_weights_are_tried_and_corrected_for(checkpoint, tmp_path):
    _, record, _ = sweep(tmp_path, checkpoint, "--sweep", "C=1", "--sweep-TV", "1e-4,1e-2")
    (row,) = record["rows"]
    assert [attempt["tv"] for attempt in row["attempts"]] == [1e-4, 1e-2]
    assert row["tv"] in (1e-4, 1e-2)


def test_local_steps_are_compared_with_the_gradient_before_them(captured, tmp_path):
    """And the true colours are shown, whatever the attacker takes for them."""
    steps = ("--local-steps", "2", "--local-lr", "2", "--target-idx", "10")
    target = captured(*CLIENT, *CONTROL, *steps)
    flags = ("--without", "normalisation", "--sweep", "local-steps=2", "--root", tmp_path)
    words = map(str, ("--checkpoint", target, *ATTACK, *flags))
    client = partial(simulate, base_flags(load(str(target))["args"]))
    settings = settings_from(parser().parse_args(list(words)))
    with Interrupts() as interrupts:
        result = run_job(settings, client, Job("2", 0), tmp_path, interrupts)
    (path,) = tmp_path.glob("*checkpoint.pth.tar")
    content = load(str(path))
    x, y, model = content["x_true"], content["y_true"], model_of(target_from_checkpoint(content))
    true = batch_gradient(model, x, y, ClientLoss(not content["model_eval"]))
    both = (torch.cat([g.flatten() for g in of]) for of in (true, content["target_gradient"]))
    expected = torch.cosine_similarity(*both, 0).item()
    assert result.row.cosine == pytest.approx(expected, abs=1e-5)
    assert expected < 0.999
    mean, std = (torch.tensor(content["dataset_setup"][k]).view(-1, 1, 1) for k in ("mean", "std"))
    colours = (x * std + mean).clamp(0, 1) * 255
    assert np.abs(colours.numpy() - result.true).max() <= 1


def test_a_layerwise_attack_tells_the_deepest_layer(captured, tmp_path):
    target = captured(*CLIENT, *CONTROL, "--target-idx", "10")
    flags = ("--attack", "layerwise", "--sweep", "sigma=0,1")
    outcome = succeed("run.py", "--root", tmp_path, "--checkpoint", target, *flags)
    record = json.loads((tmp_path / "results/exp/test/sweep.json").read_text())
    plain, noisy = record["rows"]
    assert plain["certified"] > noisy["certified"]
    assert "deepest certified" in outcome.out
    assert plain["deepest"] in outcome.out


def test_an_interrupted_sweep_keeps_what_is_done_and_says_how_to_go_on(
    checkpoint, swept, tmp_path, monkeypatch
):
    """In the middle of an attack, which goes on there."""
    on_step, steps = Recorder.on_step, []

    def interrupted(recorder, index, step, losses, rate):
        steps.append(step)
        if len(steps) == 11:  # the first client had an attack and two controls of three each
            os.kill(os.getpid(), signal.SIGINT)
        return on_step(recorder, index, step, losses, rate)

    monkeypatch.setattr(Recorder, "on_step", interrupted)
    flags = ["--root", tmp_path, "--checkpoint", checkpoint, *ATTACK, "--sweep", "sigma=0,0.5,much"]
    outcome = call("run.py", *flags)
    assert outcome.code == 128 + signal.SIGINT
    (folder,) = (tmp_path / "results" / "exp").iterdir()
    record = json.loads((folder / "sweep.json").read_text())
    assert record["interrupted"] is True
    assert without_times(record) == without_times(swept[1])[:1]
    assert "1 of 3 clients" in outcome.out
    script, *again = outcome.out.splitlines()[-1].split()[1:]
    succeed(script, *again)
    record = json.loads((folder / "sweep.json").read_text())
    assert record["interrupted"] is False
    assert without_times(record) == without_times(swept[1])
    assert steps == [0, 1, 2] * 6


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        (("--sweep", "sigma"), "--sweep sigma: is written PARAM=V1,V2"),
        (("--sweep", "sigma=0,,1"), "--sweep sigma=0,,1: is written PARAM=V1,V2"),
        (("--sweep", "lr=1,2"), "--sweep lr=1,2: unknown parameter; choose from sigma, C, "),
        (("--sweep", "C=1,1"), "--sweep C=1,1: 1 stands there twice"),
        (("--sweep", "C=1", "--sweep", "sigma=1"), "--sweep sigma=1: one sweep at a time"),
        (("--sweep", "C=1", "--labels", "1,2"), "--labels: the batches of a sweep have labels"),
        (("--sweep", "C=1", "--no-controls"), "--no-controls: no value can be judged without"),
        (("--sweep", "C=1", "--nproc", "2"), "--sweep C=1: every attack runs in one process"),
        (("--sweep", "C=1", "--sweep-TV", "a"), "--sweep-TV a: give weights of 0 or more"),
        (("--sweep", "C=1", "--sweep-TV", "1,1"), "--sweep-TV 1,1: give every weight once"),
        (("--repeats", "2"), "--repeats 2: belongs to --sweep"),
        (("--keep-checkpoints",), "--keep-checkpoints: belongs to --sweep"),
    ],
)
def test_what_a_sweep_refuses(flags, refusal, tmp_path):
    flags = ("--root", tmp_path, "--checkpoint", "none", "--epochs", 1, "--lr", 0.1, *flags)
    outcome = call("run.py", *flags)
    assert (outcome.code, outcome.err[: len(refusal) + 7]) == (2, f"error: {refusal}")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda c: c | {"args": {}}, "holds no record of a client"),
        (lambda c: {k: v for k, v in c.items() if k != "x_true"}, "holds neither its truth nor"),
        (lambda c: c | {"args": c["args"] | {"import_update": ["a", "b"]}}, "was imported"),
        (lambda c: c | {"args": c["args"] | {"model": "net.py:net"}}, "give --model FILE.py"),
        (lambda c: c | {"args": c["args"] | {"seed": "x"}}, "argument --seed: 'x' is not"),
        (lambda c: c | {"args": c["args"] | {"data_name": "none"}}, "--data-name none: unknown"),
    ],
)
def test_checkpoints_without_a_client_are_refused(change, refusal, checkpoint, tmp_path):
    path = tmp_path / "changed.pth.tar"
    save(change(load(str(checkpoint))), str(path))
    outcome = call("run.py", "--root", tmp_path, "--checkpoint", path, *ATTACK, "--sweep", "C=1")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: --checkpoint {path}: ")
    assert refusal in outcome.err


def test_a_sealed_client_is_simulated_from_its_truth(captured, tmp_path):
    path = captured(*CLIENT, "--target-idx", "11", "--seal")
    truth = str(path).replace("-checkpoint", "-truth")
    flags = ("--root", tmp_path, "--checkpoint", path, *ATTACK, "--sweep", "C=1", "--dry-run")
    assert (
        "the client, as it is simulated again: " in succeed("run.py", *flags, "--truth", truth).out
    )
    assert "give the sealed file by --truth" in call("run.py", *flags).err


def test_weights_keep_the_ratio_of_their_decay():
    flags = ["--checkpoint", "x", "--epochs", "1", "--lr", "1", "--TV", "1e-2", "--TV-end", "1e-4"]
    settings = settings_from(parser().parse_args([*flags, "--seed", "5", "--n-seed", "2"])).attack
    first, zero = attacks_of(settings, (1e-3, 0.0), 3)
    assert first.weights.priors == {"tv": 1e-3}
    assert first.weights.priors_end == {"tv": pytest.approx(1e-5)}
    assert first.first_seed == 11
    assert zero.weights.priors == zero.weights.priors_end == {}
    assert attacks_of(settings, (), 0) == [settings]


def test_p_is_corrected_for_the_number_of_attacks():
    matrix = np.random.default_rng(0).normal(size=(2, 100))
    matrix[:, 0] = 9.0, 0.5
    above = {"ssim": {"mean": 0.05, "low": 0.0, "high": 0.1, "images": [0.1, 0.0]}}
    one, three, many = (
        judge(above, identify(matrix), None, metric="ssim", tests=k) for k in (1, 3, 10**4)
    )
    assert corrected(three.p, three.tests) == pytest.approx(3 * one.p)
    assert one.verdict == IDENTIFIABLE
    assert one.identified == [0]
    assert corrected(many.p, many.tests) == 1
    assert many.verdict == INCOMPLETE
    assert many.identified == []


@pytest.mark.parametrize(("attempts", "size"), [(1, 4), (3, 8)])
def test_there_are_decoys_enough_to_identify_one_image(attempts, size):
    candidates = decoys_per_image(attempts) * size
    assert attempts * (1 - (1 - 1 / candidates) ** size) < ALPHA


def test_places_of_values():
    assert positions(["none", "topk:0.1", "int8"]) == ([0, 1, 2], None)
    assert positions(["4", "8"]) == ([0, 1], None)
    places, split = positions(["0", "1e-3", "1e-2", "1e-1"])
    assert places == pytest.approx([-1, 0, 1, 2])
    assert split == -0.5
    places, split = positions(["10", "1000"])
    assert places == pytest.approx([0, 1])
    assert split == 0


def row(value, repeat=0, **changes):
    scores = {"psnr": [20.0, 30.0], "ssim": [0.5, 0.7]}
    made = Row(
        value, repeat, None, batch_size=2, cosine=0.25, label_accuracy=0.5, verdict=NOT_SHOWN,
        metric="ssim", leakage=[0.1, 0.3], scores=scores, controls=scores, candidates=100,
    )  # fmt: skip
    return replace(made, **changes)


def test_cells_of_the_table():
    rows = [
        row("a"),
        row("a", 1, verdict=IDENTIFIABLE, identified=[1], leakage=[0.3, 0.3], epsilon=2.5),
        row("b", deepest="layer1", certified=3),
        Row("c", 0, "cannot be captured"),
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in sweep_table("defence", ["a", "b", "c", "d"], rows).splitlines()
        if line.startswith("|")
    ]
    head, a, b, c, d = (dict(zip(lines[0], line, strict=True)) for line in lines)
    assert a["identified"] == "1 of 4"
    assert a["leakage max"] == "0.300"
    assert a["leakage mean"] == "0.250 (0.200 to 0.300)"
    assert a["labels %"] == "50"
    assert a["verdict"] == "leakage: identifiable (1 of 2)"
    assert (b["deepest certified"], b["verdict"]) == ("layer1", "no leakage shown")
    assert b["PSNR dB"] == "25.0"
    assert c["verdict"] == "cannot be captured"
    assert d["verdict"] == "not run"


@pytest.mark.parametrize(
    ("arrived", "expected"),
    [
        ([True], "no leakage shown"),
        ([False], "no leakage shown (did not arrive)"),
        ([False, False], "no leakage shown (2 of 2, did not arrive)"),
        ([False, True, None], "no leakage shown (3 of 3, 1 did not arrive)"),
    ],
)
def test_an_attack_that_did_not_arrive_is_marked(arrived, expected):
    rows = [row("a", i, arrived=of) for i, of in enumerate(arrived)]
    assert verdict_cell(rows) == expected
    walked = [replace(of, certified=2) for of in rows]  # solved, not optimised
    assert "arrive" not in verdict_cell(walked)
    assert "arrive" not in verdict_cell([*rows, row("a", 9, verdict=IDENTIFIABLE)])


def dots_and_bands(panel, path, monkeypatch):
    """Draw; return the sorted leakages of all dots, and the ends of all bands."""
    figures = []

    def keep(*args, **settings):
        figures.append(Figure(*args, **settings))
        return figures[0]

    monkeypatch.setattr(picture, "Figure", keep)
    save_sweeps([panel], path)
    (axis,) = figures[0].axes
    dots = [c.get_offsets()[:, 0] for c in axis.collections if isinstance(c, PathCollection)]
    bands = [c.get_paths()[0].get_extents() for c in axis.collections
             if isinstance(c, PolyCollection)]  # fmt: skip
    texts = [text.get_text() for text in axis.texts]
    return sorted(np.concatenate(dots)), [(band.x0, band.x1) for band in bands], texts


def test_the_picture_shows_the_leakage_of_the_table(tmp_path, monkeypatch):
    """Whatever the scores: only the difference to the image's own control counts."""
    rows = [
        row("a", leakage=[0.1, 0.3], lowest_control=[-0.2, -0.05], identified=[1]),
        row("b", leakage=[-0.1, 0.2]),
        Row("c", 0, "cannot be captured"),
    ]
    path = tmp_path / "a.png"
    panel = Panel("defence", ["a", "b", "c", "d"], rows)
    dots, bands, texts = dots_and_bands(panel, path, monkeypatch)
    assert dots == pytest.approx([-0.1, 0.1, 0.2, 0.3])
    assert bands == [pytest.approx((-0.2, 0))]
    assert texts == ["no leakage shown", "no leakage shown", "cannot be captured", "not run"]
    assert np.asarray(Image.open(path).convert("RGB")).std() > 1


def test_values_that_are_null_in_a_file_are_not_numbers():
    """SSIM of images that are too small for it."""
    nan = {"psnr": [20.0, 30.0], "ssim": [math.nan, 0.5]}
    small = row("1", scores=nan, controls=nan, metric="psnr")
    record = json.loads(json.dumps({"rows": null_if_nan(entries([small]))}))
    (read,) = rows_of(record)
    assert math.isnan(read.scores["ssim"][0])
    assert read.controls["ssim"][1] == 0.5
    assert sweep_table("C", ["1"], [read]) == sweep_table("C", ["1"], [small])


def test_files_of_before_are_read_and_drawn(swept, tmp_path, capsys):
    """Without the entries that came later; the sentence says what did not arrive."""
    _, record, folder = swept
    assert [*map(asdict, rows_of(record))] == record["rows"]
    old = {k: v for k, v in record["rows"][0].items() if k not in ("lowest_control", "arrived")}
    old["verdict"], old["sentence"] = NOT_SHOWN, f"{NOT_SHOWN}: p = 1; {NOT_ARRIVED}, so"
    (tmp_path / "sweep.json").write_text(json.dumps(record | {"rows": [old]}))
    out = tmp_path / "out.png"
    defences_table.main([str(folder), str(tmp_path), "--picture", str(out)])
    new, before = capsys.readouterr().out.split(f"{tmp_path.name}:")
    assert "| sigma | cosine | labels % | identified |" in new
    assert "argument --sigma: 'much' is not a number" in new
    assert "no leakage shown (did not arrive) |" in before
    one, both = (Image.open(path).size for path in (folder / "sweep.png", out))
    assert both[0] == one[0]
    assert both[1] > 1.5 * one[1]
