"""The search: trials go on where they were, a killed search too, and what is found is used."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inversion.audit import searching as audit_searching
from inversion.search import tune as searching
from inversion.search.trial import Problem, image_error, run_trial
from inversion.search.tune import Budget, SearchResult, SearchUnavailableError, available
from inversion.settings import PRIORS, RANGES, AttackSettings, Loop, Weights
from models.build import build_model
from models.target import GroundTruth
from tests.support import HANG, ROOT, call, photos, succeed, target_of, wait_until

TARGET = ("-a", "convnet", "-b", "4", "--upload-bn")
SIMULATION = (*TARGET, "--target-idx", "3")


def problem():
    torch.manual_seed(0)
    model = build_model("convnet", 8, (3, 16, 16))
    x, y = photos(4, 16)
    target = target_of(model, x, y)
    settings = AttackSettings(
        Weights(priors={"tv": 1e-3}), Loop(30, 0.1, signed=True, keep_best=True), noise=0.1
    )
    return Problem(model, target, GroundTruth(x, y), y, settings)


def test_a_trial_goes_on_where_it_was():
    reports = [10, 15, 20]
    whole, first, rest = [], [], []
    settings = {"lr": 0.2, "bn": 1e-3, "grads_weight": 0.5}
    run_trial(settings, problem(), reports, lambda *report: whole.append(report))
    run_trial(settings, problem(), reports[:1], lambda *report: first.append(report))
    run_trial(settings, problem(), reports, lambda *report: rest.append(report), first[0][1])
    assert [figures["iterations"] for figures, _ in whole] == reports
    assert [figures["begun_at"] for figures, _ in rest] == [10, 10]
    assert torch.equal(whole[-1][1]["x"], rest[-1][1]["x"])
    assert whole[-1][0]["mse"] == rest[-1][0]["mse"] > 0
    other = []
    run_trial({**settings, "lr": 0.3}, problem(), reports, lambda *report: other.append(report))
    assert not torch.equal(other[-1][1]["x"], whole[-1][1]["x"])


def test_a_trial_forces_statistics_as_the_attack_does():
    given = problem()
    forced = given.objective(replace(given.settings, bn_coupling="forced"))
    assert given.objective(given.settings).couples_images
    assert forced.gradient_distance(given.truth.x) < 1e-9
    assert not forced.couples_images


def test_a_loss_that_is_not_finite_fails_the_trial():
    with pytest.raises(FloatingPointError, match="at iteration 0 the weighted sum"):
        run_trial({"lr": 0.1, "tv": 1e39}, problem(), [10], lambda *report: None)


def test_the_error_is_paired_and_in_colours():
    given = problem()
    assert image_error(given.truth.x.flip(0), given) == pytest.approx(0, abs=1e-12)
    assert image_error(given.truth.x.flip(0) + 0.1, given) == pytest.approx(
        (0.1 * given.target.std).square().mean().item(), rel=0.2
    )


@pytest.mark.parametrize("first", [1, 20, 2000])
def test_reports_start_and_end_as_asked(first):
    reports = Budget(1, first, 3000).reports()
    assert reports[0] == first
    assert reports[-1] == 3000
    assert reports == sorted(set(reports))
    assert len(reports) <= 12


def test_ranges_are_those_of_the_original():
    found = {name: (r.kind, r.low, r.high) for name, r in RANGES.items()}
    assert found == {
        "epochs": ("integer", 5000, 20000), "lr": ("uniform", 0.1, 1.0),
        "grads_weight": ("uniform", 0.01, 1.0), "tv": ("loguniform", 1e-6, 0.1),
        "bn": ("loguniform", 1e-6, 0.1), "norm": ("uniform", -1e-6, 0.0),
    }  # fmt: skip
    assert all(PRIORS[name].range is RANGES[name] for name in ("tv", "bn", "norm"))


def test_what_is_missing_is_named(monkeypatch):
    there = set()
    monkeypatch.setattr(
        searching.importlib.util, "find_spec", lambda name: name if name in there else None
    )
    with pytest.raises(SearchUnavailableError, match=r"pip install 'ray\[tune\]'"):
        available("auto")
    there |= {"ray"}
    assert available("auto")[0] == "random"
    with pytest.raises(SearchUnavailableError, match=r"requirements-bohb\.txt"):
        available("bohb")
    with pytest.raises(SearchUnavailableError, match="pip install optuna"):
        available("optuna")
    there |= {"optuna"}
    assert available("auto")[0] == "optuna"
    there |= {"hpbandster", "ConfigSpace"}
    assert available("auto")[0] == "bohb"
    assert available("random") == ("random", "asked for")


BUDGET = ("--num-samples", "4", "--max-t", "60", "--min-t", "20", "--HP-epochs", "60",
          "--max-concurrent", "2", "--verbose", "0")  # fmt: skip


def saved_iterations(folder):
    """Trial id → iterations after which it goes on when the search is resumed, by Tune's notes."""
    found = {}
    for file in folder.glob("tune/experiment_state-*.json"):
        try:
            notes = json.loads(file.read_text())["trial_data"]
        except json.JSONDecodeError:  # it is being written
            continue
        for trial, progress in (map(json.loads, pair) for pair in notes):
            if "iterations" in progress["last_result"]:
                found[trial["trial_id"]] = progress["last_result"]["iterations"]
    return found


@contextlib.contextmanager
def started(words):
    """run.py as a process of its own, killed when the context ends."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def resumed(captured, tmp_path_factory):
    """The original's command of section 2.3 with Optuna, killed in the middle and resumed."""
    root = tmp_path_factory.mktemp("search")
    folder = root / "results" / "search" / "test"
    words = [
        "run.py", "--root", root, "--checkpoint", captured(*TARGET), "--exact-bn", "--grad-sign",
        "--input-boxed", "--min-grads-loss", "--epochs", 30, "--metric",
        "--superparameters-search", "--lr-tune", "--TV-tune", "--BN-tune",
        "--simulation-checkpoint", captured(*SIMULATION), "--search-alg", "optuna",
        "--num-samples", 3, "--max-t", 250, "--min-t", 30, "--HP-epochs", 250,
        "--max-concurrent", 2, "--verbose", 0,
    ]  # fmt: skip
    with started(words) as process:
        wait_until(lambda: max(saved_iterations(folder).values(), default=0) > 30, process)
    saved = saved_iterations(folder)
    refused = call(*words, "--search-resume", "--max-t", "200")
    run = root / "results" / "exp" / "test"
    outcome = succeed(*words, "--resume", run)
    return SimpleNamespace(
        folder=folder, saved=saved, refused=refused, out=outcome.out,
        found=json.loads((folder / "search.json").read_text()),
        result=json.loads((run / "result.json").read_text()),
    )  # fmt: skip


def test_a_killed_search_goes_on(resumed):
    """All trials are accounted for, and none that was saved starts from 0."""
    trials = resumed.found["trials"]
    assert 1 <= len(resumed.saved) < 3
    assert len(trials) == 3
    assert {trial["status"] for trial in trials} == {"done"}
    went_on = [trial for trial in trials if trial["trial"] in resumed.saved]
    assert went_on
    reports = [0, *Budget(3, 30, 250).reports()]
    for trial in went_on:  # ended before the kill, or went on from its last report
        saved = resumed.saved[trial["trial"]]
        before = reports[reports.index(saved) - 1]  # Tune notes a report before its checkpoint
        assert trial["iterations"] == saved or trial["begun_at"] >= before
    assert any(trial["begun_at"] > 0 for trial in trials)


def test_a_search_is_resumed_with_its_own_flags_only(resumed):
    assert resumed.refused.code == 2
    assert "was begun with max_t 250, not 200" in resumed.refused.err


def test_the_search_finds_the_settings_of_least_error(resumed):
    found = resumed.found
    assert found["algorithm"] == "optuna"
    best = min(trial["mse"] for trial in found["trials"])
    (first,) = [trial for trial in found["trials"] if trial["mse"] == best]
    assert found["best"] == {name: first[name] for name in ("lr", "tv", "bn")}
    for name, value in found["best"].items():
        assert RANGES[name].low <= value <= RANGES[name].high
    assert {trial["iterations"] for trial in found["trials"]} <= set(Budget(3, 30, 250).reports())
    assert "best settings: --lr" in resumed.out


def test_the_attack_uses_the_settings_found(resumed):
    assert resumed.result["search"] == resumed.found
    for flag, name in (("lr", "lr"), ("TV", "tv"), ("BN", "bn")):
        assert resumed.result["settings"][flag] == resumed.found["best"][name]


def test_the_search_leaves_its_trials_as_a_table_and_a_picture(resumed):
    with open(resumed.folder / "trials.csv") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert (resumed.folder / "trials.png").stat().st_size > 5000


@pytest.mark.bohb
def test_bohb_models(captured, tmp_path):
    """At least one of 24 picks comes from its model, by the generator's own count."""
    outcome = succeed(
        "run.py", "--root", tmp_path, "--checkpoint", captured(*TARGET), "--grad-sign",
        "--superparameters-search", "--lr-tune", "--TV-tune", "--simulation-checkpoint",
        captured(*SIMULATION), "--search-alg", "bohb", "--num-samples", 24, "--max-t", 30,
        "--min-t", 10, "--HP-epochs", 30, "--max-concurrent", 2, "--verbose", 0, "--search-only",
    )  # fmt: skip
    found = json.loads((tmp_path / "results" / "search" / "test" / "search.json").read_text())
    assert len(found["trials"]) == 24
    assert found["model_based_picks"] >= 1
    assert f"picks from BOHB's model: {found['model_based_picks']}" in outcome.out
    assert any(trial["begun_at"] > 0 for trial in found["trials"])  # paused trials went on


def test_an_interrupted_search_is_no_finished_one(captured, tmp_path):
    words = [
        "run.py", "--root", tmp_path, "--checkpoint", captured(*TARGET),
        "--superparameters-search", "--lr-tune", "--simulation-checkpoint",
        captured(*SIMULATION), "--search-alg", "random", "--num-samples", 1, "--max-t", 3000,
        "--min-t", 20, "--HP-epochs", 3000, "--max-concurrent", 1, "--verbose", 0, "--epochs", 5,
    ]  # fmt: skip
    folder = tmp_path / "results" / "search" / "test"
    with started(words) as process:
        wait_until(lambda: saved_iterations(folder), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 130
    assert not (folder / "search.json").exists()
    (run,) = (tmp_path / "results" / "exp").iterdir()
    assert not (run / "result.json").exists()
    assert f"--resume {run}" in (run / "log.txt").read_text().splitlines()[-1]


def test_a_run_goes_on_with_its_search_and_does_not_repeat_it(captured, tmp_path, monkeypatch):
    """Ray is not asked: what the search is called with counts, and how often."""
    trial = {"trial": "a", "lr": 0.2, "mse": 0.1, "iterations": 5, "status": "done", "error": ""}
    calls, ends = [], [KeyboardInterrupt(), KeyboardInterrupt(), None]

    def search(*_, folder, resume, **__):
        calls.append((Path(folder).name, resume))
        if (end := ends.pop(0)) is not None:
            raise end
        return SearchResult("random", {"lr": 0.2}, [trial], None)

    def begin(*_):
        raise SystemExit(1)

    monkeypatch.setattr(audit_searching, "search", search)
    monkeypatch.setattr(audit_searching, "can_go_on", lambda folder: len(calls) > 1)
    words = [
        "run.py", "--root", tmp_path, "--checkpoint", captured(*TARGET), "--epochs", 2,
        "--superparameters-search", "--lr-tune", "--search-alg", "random",
        "--simulation-checkpoint", captured(*SIMULATION),
    ]  # fmt: skip
    run = tmp_path / "results" / "exp" / "test"
    first = call(*words)
    assert first.code == 130
    assert f"--resume {run}" in first.out.splitlines()[-1]
    searched = tmp_path / "results" / "search"
    searched.rename(tmp_path / "elsewhere")
    gone = call(*words, "--resume", run)
    assert (gone.code, "which is gone" in gone.err) == (2, True)
    (tmp_path / "elsewhere").rename(searched)
    assert call(*words, "--resume", run).code == 130  # its first trial had not been saved
    with monkeypatch.context() as patch:
        patch.setattr("run.attack_checkpoint", begin)
        with pytest.raises(SystemExit):
            call(*words, "--resume", run)
    assert calls == [("test", False), ("test", False), ("test", True)]
    assert (
        "the search was done before: best settings: --lr 0.2"
        in succeed(*words, "--resume", run).out
    )
    result = json.loads((run / "result.json").read_text())
    assert result["search"]["best"] == {"lr": 0.2}
    assert result["search"]["trials"] == [trial]
    assert result["settings"]["lr"] == 0.2
    ends.append(None)
    succeed(*words, "--search-resume", "--search-only")
    assert calls[3:] == [("test", True)]


def test_a_search_over_other_parameters_is_not_resumed():
    trials = [{"trial": "a", "lr": 0.1, "tv": None, "mse": 0.1, "status": "done", "error": ""}]
    with pytest.raises(SearchUnavailableError, match="this search was not over tv"):
        searching._summary("optuna", trials, ["lr", "tv"], None)
    failed = [{**trials[0], "status": "failed", "error": "why"}]
    with pytest.raises(SearchUnavailableError, match="no trial succeeded: why"):
        searching._summary("optuna", failed, ["lr"], None)
    assert searching._summary("optuna", trials, ["lr"], None).best == {"lr": 0.1}


def test_a_dry_run_searches_nothing(captured, tmp_path):
    outcome = succeed(
        "run.py", "--root", tmp_path, "--checkpoint", captured(*TARGET), "--dry-run",
        "--superparameters-search", "--lr-tune", "--simulation-checkpoint",
        captured(*SIMULATION), "--search-alg", "random", *BUDGET, "--epochs", 5,
    )  # fmt: skip
    assert "search: random (asked for), 4 trials of 20 to 60 iterations over lr" in outcome.out
    assert not list(Path(tmp_path).iterdir())


def test_the_target_is_no_simulation_unless_allowed(captured, tmp_path):
    path = captured(*TARGET)
    flags = (
        "--root", tmp_path, "--checkpoint", path, "--superparameters-search", "--lr-tune",
        "--simulation-checkpoint", path, "--dry-run", "--epochs", 5,
    )  # fmt: skip
    outcome = call("run.py", *flags)
    assert outcome.code == 2
    assert "is the target itself, or holds images of it" in outcome.err
    succeed("run.py", *flags, "--allow-target-as-simulation")
