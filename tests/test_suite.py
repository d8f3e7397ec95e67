"""The whole audit: its time, its parts, its corrections, its positive control, its files."""

import argparse
import itertools
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from inversion.audit import positive, subject, suite, suite_report, suite_run, suite_settings
from inversion.audit.attack import Recorder
from inversion.audit.budget import Budget, Deadline, Pace
from inversion.audit.flags import parser
from inversion.audit.identification import identify
from inversion.audit.scoring import OTHER_GRADIENT
from inversion.audit.settings import settings_from
from inversion.audit.suite import Done, Part, Run
from inversion.audit.suite_verdict import audit_verdict, best_part, checkpoint_verdict, gaps
from inversion.audit.verdict import (
    IDENTIFIABLE,
    INCOMPLETE,
    NOT_SHOWN,
    RECONSTRUCTION,
    corrected,
    judge,
)
from models.target import Protection
from tests.support import call, capture_photos, photos, succeed, target_of, without
from utils.console import Silent
from utils.errors import InputError, StateError
from utils.files import null_if_nan
from utils.flags import duration_from
from utils.journal import FORGETFUL, FolderJournal, consolidate, read_manifest
from utils.metrics import label_accuracy
from utils.script import Interrupts


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# Time --------------------------------------------------------------------------------------


def test_durations():
    budget, save_every = duration_from(1.0), duration_from(0.0, or_zero=True)
    assert [budget(text) for text in ("90s", "5m", "1.5h")] == [90, 300, 5400]
    assert [save_every(text) for text in ("0", "0.5", "20s", "5m")] == [0, 0.5, 20, 300]
    for text in ("5", "5 m", "m", "-5m", "1d", "0.5s", "0m"):
        with pytest.raises(argparse.ArgumentTypeError):
            budget(text)


def test_the_time_is_shared_by_weight_and_what_is_left_goes_to_later_parts():
    clock = Clock()
    budget = Budget(100.0, clock)
    budget.add(5 + 1 + 4)
    assert budget.forecast(4) == 40
    assert budget.share(5) == 50
    clock.now += 10  # of 50
    assert budget.share(1) == pytest.approx(90 / 5)
    clock.now += 50  # of 18: later parts have less
    assert budget.share(4) == pytest.approx(40)
    clock.now += 1000
    assert budget.left == 0
    assert budget.spent == 1060


def test_a_deadline_counts_only_where_the_work_asked():
    clock = Clock()
    with Interrupts() as interrupts:
        early, late = (Deadline(5, interrupts, clock) for _ in range(2))
        assert not early.should_stop
        clock.now += 6
        assert not early.stopped  # it ended by itself meanwhile
        assert late.should_stop
        assert late.stopped
        assert late.is_late
        interrupted = Deadline(5, interrupts, clock)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.should_stop
        assert interrupted.stopped
        assert not interrupted.is_late


def test_iterations_that_fit_with_their_controls():
    pace = Pace(attack=0.2, prior=0.1)
    assert pace.iterations(10, 10_000) == 14  # 70 % of 10 s at 0.5 s
    assert pace.iterations(10, 7) == 7
    assert pace.iterations(0.1, 7) == 0


# Verdicts ----------------------------------------------------------------------------------


def test_the_longest_matching_has_no_fewer_iterations_than_the_positive_control(monkeypatch):
    """Also on a machine that has become slower since they were planned."""
    planned = []
    monkeypatch.setattr(suite, "pace_of", lambda case: Pace(0.1, 0.1))
    monkeypatch.setattr(suite, "run_part", lambda part, how, *_: planned.append(how.loop.steps))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    case = argparse.Namespace(target=target_of(model, *photos(2, 16)))
    for fewest in (0, 5, 500, 10**6):
        run = Run(None, None, Silent(), 1)
        suite.run_matching(suite.SUITE[-1], case, None, 10, 0, run, fewest)
    fitting = Pace(0.1, 0.1).iterations(10, 10**6)
    assert planned[0] == pytest.approx(fitting, abs=1)  # less what measuring took
    assert planned == [planned[0], planned[0], 500, suite.SUITE[-1].most]


def test_a_verdict_over_several_attacks_is_corrected():
    """One image of rank 1 among 50: p = 0.02, which three attacks make 0.06."""
    scores = np.linspace(1, 0, 50)[None]
    above = {"ssim": {"mean": 0.5, "low": float("nan"), "high": float("nan"), "images": [0.5]}}
    test = identify(scores)
    alone = judge(above, test, None, metric="ssim")
    of_two = judge(above, test, None, metric="ssim", tests=2)
    of_three = judge(above, test, None, metric="ssim", tests=3)
    assert alone.p == of_two.p == of_three.p == pytest.approx(0.02)
    assert (alone.verdict, of_two.verdict) == (RECONSTRUCTION, RECONSTRUCTION)
    assert of_three.verdict == INCOMPLETE  # with 50 candidates it could not have shown anything
    assert "corrected for 2 attacks" in of_two.sentence
    assert "corrected" not in alone.sentence
    assert corrected(0.5, 3) == 1
    assert corrected(None, 3) is None


def test_single_images_are_corrected_for_the_attacks_too():
    scores = np.random.default_rng(0).normal(size=(6, 60))
    scores[0, 0], scores[1, 0] = 60.0, 3.3
    test = identify(scores)
    above = {"ssim": {"mean": 0.5, "low": 0.2, "high": 0.8, "images": [0.5] * 6}}
    assert 0.04 / 3 < test.image_p[0] < 0.04 / 2  # one of 60 candidates at best
    found = [judge(above, test, None, metric="ssim", tests=n).identified for n in (1, 2, 3)]
    assert found[0] == [i for i, p in enumerate(test.image_p) if p <= 0.04]
    assert found[1:] == [[0], []]


def entry(name, verdict, status="done", *, method="matching", limited=False, mean=0.1, **more):
    scored = status == "done"
    return {
        "name": name, "method": method, "status": status, "reason": "" if scored else "why",
        "limited": limited, "verdict": verdict if scored else None, "sentence": f"{verdict}: words",
        "p_corrected": 0.5 if scored else None, "arrived": True, "metric": "ssim",
        "leakage": {"ssim": {"mean": mean}} if scored else None, **more,
    }  # fmt: skip


CLEAR = [
    entry("layerwise", None, "refused", method="layerwise"),
    entry("matching, short", NOT_SHOWN),
    entry("matching, long", NOT_SHOWN),
]


def test_no_leakage_needs_every_part_and_the_positive_control():
    def verdict(parts, positive_passed=True):
        return checkpoint_verdict(parts, positive_passed=positive_passed, tests=3)[0]

    assert verdict(CLEAR) == NOT_SHOWN
    assert verdict(CLEAR, positive_passed=False) == INCOMPLETE
    short_of_time = entry("matching, short", INCOMPLETE, limited=True)
    assert verdict([CLEAR[0], short_of_time, CLEAR[2]]) == NOT_SHOWN  # the long one says it
    whole = checkpoint_verdict([CLEAR[0], short_of_time, CLEAR[2]], positive_passed=True, tests=3)[
        1
    ]
    assert whole.startswith("no leakage shown: matching, long found nothing (p = 0.5, corrected")
    assert "layerwise cannot be run on this network" in whole
    long_too = entry("matching, long", INCOMPLETE, limited=True)
    assert verdict([CLEAR[0], CLEAR[1], long_too]) == INCOMPLETE  # the short one does not
    assert verdict([CLEAR[0], short_of_time, long_too]) == INCOMPLETE
    cut = entry("layerwise", INCOMPLETE, method="layerwise", limited=True)
    assert verdict([cut, *CLEAR[1:]]) == INCOMPLETE
    for status in ("skipped", "interrupted"):
        assert verdict([*CLEAR[:2], entry("matching, long", None, status)]) == INCOMPLETE
    no_control = entry("matching, long", INCOMPLETE)
    assert verdict([*CLEAR[:2], no_control]) == INCOMPLETE
    assert verdict([CLEAR[0]]) == INCOMPLETE  # nothing ran at all
    assert gaps(CLEAR) == []


def test_leakage_stays_found_whatever_else_fails():
    found = entry("matching, short", IDENTIFIABLE)
    missing = entry("matching, long", None, "skipped")
    verdict, sentence = checkpoint_verdict(
        [CLEAR[0], found, missing], positive_passed=False, tests=3
    )
    assert verdict == IDENTIFIABLE
    assert sentence == "leakage: identifiable: by matching, short: words"
    more = entry("matching, long", RECONSTRUCTION)
    assert best_part([found, more]) is more
    higher = entry("matching, long", IDENTIFIABLE, mean=0.3)
    assert best_part([found, higher]) is higher


def test_the_strongest_checkpoint_decides():
    def audit(*verdicts):
        return audit_verdict([{"verdict": v, "sentence": f"{v}: x", "file": "f"} for v in verdicts])

    assert audit(NOT_SHOWN, RECONSTRUCTION, INCOMPLETE)[0] == RECONSTRUCTION
    assert audit(NOT_SHOWN, INCOMPLETE)[0] == INCOMPLETE
    assert audit(NOT_SHOWN, NOT_SHOWN)[1] == (
        "no leakage shown: 2 of 2 checkpoints, each tested by itself; f: x"
    )
    assert audit(NOT_SHOWN)[1] == "no leakage shown: x"


# Settings and the positive control's images -----------------------------------------------


def test_a_stronger_prior_where_the_client_reports_noise():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    x, y = photos(2, 16)
    target = target_of(model, x, y)
    count = sum(g.numel() for g in target.gradient)
    norm = sum(float(g.square().sum()) for g in target.gradient) ** 0.5

    def noisy(share):
        return replace(target, protection=Protection("batch", share * norm / count**0.5, None))

    def tv(of, part):
        return suite.part_settings(part, of, 9, 0, 2**30).weights.priors["tv"]

    _, short, long = suite.SUITE
    assert [suite.noise_share(noisy(share)) for share in (0, 0.02, 7)] == pytest.approx(
        [0, 0.02, 1]
    )
    assert tv(target, short) == tv(target, long) == tv(noisy(1e-6), long) == tv(noisy(0.5), short)
    assert tv(noisy(1e-3), long) == tv(noisy(0.5), long) > tv(target, long)


def test_images_of_the_positive_control_are_exchangeable_with_their_decoys():
    batch, decoys, others = positive.crops((3, 16, 16))
    assert decoys.shape == (positive.IMAGES, positive.DECOYS, 3, 16, 16)
    every = torch.cat([(batch * 255).round()[:, None], (others * 255).round()[:, None], decoys], 1)
    for images in every.flatten(2):
        assert len(images.unique(dim=0)) == positive.DECOYS + 2  # no crop comes twice
    colours = every.flatten(3).mean(3)  # of one photograph each: nearer to their own mean
    centres = colours.mean(1)
    nearest = torch.cdist(colours.flatten(0, 1), centres).argmin(1).view(colours.shape[:2])
    own = torch.arange(positive.IMAGES)[:, None]
    assert (nearest == own).double().mean() > 0.6


def test_chance_of_labels():
    """Against all K^B draws."""
    y, classes = torch.tensor([0, 0, 2, 3]), 4
    draws = itertools.product(range(classes), repeat=len(y))
    mean = np.mean([label_accuracy(torch.tensor(draw), y) for draw in draws])
    assert subject.chance_of_labels(y, classes) == pytest.approx(mean)


# Files -------------------------------------------------------------------------------------


def test_truths_find_their_checkpoints(tmp_path):
    paths, truths = [], []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        paths.append(str(capture_photos(folder, "-a", "lenet", "-b", 2, "--seal", "--seed", seed)))
        truths.append(str(next(folder.glob("*-truth.pth.tar"))))
    own = str(capture_photos(tmp_path / "own", "-a", "lenet", "-b", 2))
    found = subject.sources([*paths, own], truths[::-1])
    assert [source.truth for source in found] == [*truths, None]
    assert [source.flags["seed"] for source in found] == [0, 1, 0]
    assert found[0].chosen == "batch 0 of the order that seed 0 draws"
    assert len({source.sha256 for source in found}) == 3
    content = torch.load(own)
    content["args"] |= {"data_name": torch.zeros(2), "seed": [0]}
    del content["checksums"]
    torch.save(content, odd := str(tmp_path / "odd.pth.tar"))
    (odd_flags,) = (source.flags for source in subject.sources([odd], []))
    assert not {"data_name", "seed"} & odd_flags.keys()  # what no file can write is left out
    with pytest.raises(InputError, match="holds no truth, without which nothing can be judged"):
        subject.sources(paths, truths[:1])
    with pytest.raises(InputError, match="belongs to none of the checkpoints"):
        subject.sources([own, paths[0]], truths)


def test_attack_flags_are_refused_and_the_rest_is_kept():
    def settings(*words):
        flags = ["--audit", "--checkpoint", "a", *words]
        return suite_settings.suite_settings_from(parser().parse_args(flags), flags)

    for words in (["--epochs", "9"], ["--attack", "layerwise"], ["--TV", "1"], ["--no-controls"],
                  ["--nproc", "2"], ["--lr-tune"], ["--GInfoR"]):  # fmt: skip
        with pytest.raises(InputError, match="the suite of --audit sets this itself"):
            settings(*words)
    kept = settings("b", "--truth", "c", "--seed", "3", "--max-memory", "64", "--metric")
    assert (kept.checkpoints, kept.truths, kept.budget) == (("a", "b"), ("c",), 300)
    assert kept.reading("b", "c").attack.max_memory == 64 * 2**20
    assert kept.reading("b", None).scoring.metric
    assert settings("--labels", "0,1").reading("a", None).inputs.labels == "0,1"


# The whole ---------------------------------------------------------------------------------

ITERATIONS = 80
LENET = (
    "-a",
    "lenet",
    "-b",
    4,
    "--image-size",
    16,
    "--outlayer-state",
    "keep",
    "--with-control",
    "--decoys",
    30,
)


def shorten(monkeypatch, iterations):
    """Let every matching have so many iterations, however much time there is."""
    short = tuple(
        replace(part, most=iterations) if part.method == "matching" else part
        for part in suite.SUITE
        if part.name != "matching, short"
    )
    for module in (subject, suite_report, suite_run):
        monkeypatch.setattr(module, "SUITE", short)


def audit(folder, *flags):
    outcome = call("run.py", "--audit", "--budget", "1h", "--root", folder, *flags)
    (path,) = folder.glob("results/exp/*/audit.json")
    return outcome, json.loads(path.read_text()), path.parent


@pytest.fixture(scope="module")
def both(captured, tmp_path_factory):
    """One audit of an undefended client and one whose noise buries its gradient."""
    noisy = ("--enable-dp", "-C", 1, "--sigma", 10, "--id", "noisy")
    files = captured(*LENET), captured(*LENET, *noisy)
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, ITERATIONS)
        return audit(tmp_path_factory.mktemp("both"), "--checkpoint", *files)


def test_a_whole_audit(both):
    outcome, found, folder = both
    assert outcome.code == 0, outcome.err
    assert found["positive_control"]["passed"]
    assert found["positive_control"]["verdict"] == RECONSTRUCTION
    assert f"{ITERATIONS:,} iterations" in found["positive_control"]["what"]
    open_, noisy = found["checkpoints"]
    assert found["verdict"] == open_["verdict"]
    assert open_["verdict"] == RECONSTRUCTION
    assert noisy["verdict"] in (NOT_SHOWN, INCOMPLETE)
    assert noisy["identified"] == []
    assert noisy["protection"]["mode"] == "batch"
    assert open_["labels"] | {"accuracy": 1.0} == open_["labels"]
    assert open_["labels"]["known"]
    assert 0 < open_["labels"]["chance"] < 1
    layerwise, left_out = open_["parts"]
    assert layerwise["certified"] == 4
    assert layerwise["deepest_layer"] is not None
    assert (left_out["status"], left_out["reason"]) == ("skipped", "already shown by layerwise")
    layerwise, matching = noisy["parts"]
    assert layerwise["certified"] == 0
    assert matching["iterations"] == ITERATIONS
    assert matching["p_corrected"] == pytest.approx(min(1, 3 * matching["p"]))
    assert set(matching["controls"]) == {"mean image", "prior only", "other gradient"}
    codes = {warning["code"] for warning in found["warnings"]}
    assert {"few-images", "labels-given", "decoys-are-crops"} <= codes
    assert open_["sha256"] != noisy["sha256"]
    assert found["command"].startswith("python run.py --audit --budget 1h")
    for entry, number in ((open_, 0), (noisy, 1)):
        assert entry["pictures"]["worst"] == f"worst-{number}.png"
        assert all((folder / name).exists() for name in entry["pictures"].values())


def test_the_worst_image_is_printed_first(both):
    outcome, found, _ = both
    part = found["checkpoints"][0]["parts"][0]
    text = outcome.out.split("checkpoint idtest")[1].split("layerwise: leakage")[0]
    rows = [line for line in text.splitlines() if line.startswith("|") and " of 31 |" in line]
    printed = [int(row.split("|")[1]) for row in rows[-4:]]
    assert printed[0] == part["worst_image"]
    assert [part["ranks"][i] for i in printed] == sorted(part["ranks"])
    assert outcome.out.index("plan: ") < outcome.out.index("positive control passed")


def test_every_entry_of_an_audit_is_described(both):
    """In docs/files.md, and none that is not there."""
    from tests.test_readme import first_column, section

    _, found, folder = both
    of_checkpoint = found["checkpoints"][0]
    text = section("docs/files.md", "audit.json")
    whole, checkpoints = text.split("The entries of `checkpoints`:")
    checkpoints, parts = checkpoints.split("The entries of `parts`:")
    assert sorted(first_column(whole)) == sorted(found)
    assert sorted(first_column(checkpoints)) == sorted(of_checkpoint)
    assert sorted(first_column(parts)) == sorted(of_checkpoint["parts"][0])


def test_too_short_a_budget_fails_the_positive_control(captured, tmp_path, monkeypatch):
    """And without images there is no picture."""
    shorten(monkeypatch, 2)
    noisy = captured(*LENET, "--enable-dp", "-C", 1, "--sigma", 10, "--id", "noisy")
    outcome, found, folder = audit(tmp_path, "--checkpoint", noisy, "--no-images")
    assert outcome.code == 0
    assert not found["positive_control"]["passed"]
    assert found["verdict"] == INCOMPLETE
    assert "the positive control failed" in found["sentence"]
    assert "positive-control-failed" in {warning["code"] for warning in found["warnings"]}
    assert found["checkpoints"][0]["pictures"] == {}
    assert {path.name for path in folder.iterdir()} == {"audit.json", "report.html", "log.txt"}
    assert "base64" not in (folder / "report.html").read_text()


def test_an_interruption_ends_the_part_and_writes_what_there_is(captured, tmp_path, monkeypatch):
    shorten(monkeypatch, ITERATIONS)
    monkeypatch.setattr(
        suite_run, "control", lambda audit: positive.Positive(True, "it was assumed", None)
    )
    whole = suite.attack

    def interrupted(settings, *rest, **options):
        if settings.method == "matching":
            os.kill(os.getpid(), signal.SIGINT)
        return whole(settings, *rest, **options)

    monkeypatch.setattr(suite, "attack", interrupted)
    noisy = captured(*LENET, "--enable-dp", "-C", 1, "--sigma", 10, "--id", "noisy")
    outcome, found, _ = audit(tmp_path, "--checkpoint", noisy, captured(*LENET))
    assert outcome.code == 130
    first, second = found["checkpoints"]
    assert [part["status"] for part in first["parts"]] == ["done", "interrupted"]
    assert first["parts"][1]["iterations"] == 1
    assert [part["status"] for part in second["parts"]] == ["skipped", "skipped"]
    assert second["verdict"] == INCOMPLETE
    assert second["parts"][0]["reason"] == "the audit was interrupted"


# Going on ----------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing catches it to save or to write."""


#: Entries of an audit that depend on the clock.
CLOCKED = {"created", "seconds", "control_seconds", "budget_seconds"}


def test_an_audit_killed_after_every_part_ends_as_one_that_was_not(both, tmp_path, monkeypatch):
    """Each process does one part: what is done is not done again, and its time counts."""
    _, whole, pictures = both
    shorten(monkeypatch, ITERATIONS)
    flags = whole["command"].split()[3:]
    flags[flags.index("--root") + 1] = str(tmp_path)
    keep, spent = suite_run.keep, []

    def keep_and_die(fact, journal):
        keep(fact, journal)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(suite_run, "keep", keep_and_die)
        for _ in range(4):  # the positive control, and three parts that are not left out
            with pytest.raises(Killed):
                call("run.py", "--audit", *flags)
            (folder,) = tmp_path.glob("results/exp/*")
            flags = flags if "--resume" in flags else [*flags, "--resume", folder]
            journal = FolderJournal.opened(folder / "state", 1.0, print, 0)
            spent.append(journal.recall("spent"))
    assert spent == sorted(spent)
    monkeypatch.setattr(suite, "attack", None)  # none is left
    assert call("run.py", "--audit", *flags).code == 0
    found = json.loads((folder / "audit.json").read_text())
    assert found["seconds"] > spent[-1]
    found["command"] = whole["command"]
    assert without(CLOCKED, found) == without(CLOCKED, whole)
    assert not (folder / "state").exists()
    for path in pictures.glob("*.png"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_part_that_is_killed_on_its_way_goes_on_there(tmp_path, monkeypatch):
    """Its attack had to end for its time: the clock decides that once, whatever it says later."""
    like = argparse.Namespace(lpips_score=None)
    case, sealed = positive.positive_case((3, 16, 16), 0, torch.device("cpu"), like)
    settings = suite.matching_settings(case.target, 30, 0)
    flags = parser().parse_args(["--checkpoint", "none", "--metric", "--epochs", "1", "--lr", "1"])
    scoring = settings_from(flags).scoring
    on_step, steps = Recorder.on_step, []

    class Late(Deadline):
        """Is over after 12 iterations of the attack."""

        @property
        def should_stop(self):
            self.is_late = steps[-1] == ("positive control: ", 11)
            return self.is_late

    monkeypatch.setattr(suite, "Deadline", Late)

    def part(folder, deaths, then=lambda folder: None):
        """Go on with the part after each death, which comes after so many iterations in all."""

        def followed(recorder, index, step, losses, rate):
            steps.append((recorder.title, step))
            if len(steps) in deaths:
                raise Killed
            return on_step(recorder, index, step, losses, rate)

        monkeypatch.setattr(Recorder, "on_step", followed)
        steps.clear()
        folder.mkdir()
        while True:
            journal = FolderJournal.opened(folder, 0.0, print, 0)
            try:
                with Interrupts() as interrupts:
                    run = Run(scoring, interrupts, Silent(), 100, journal)
                    return suite.run_part(positive.PART, settings, case, sealed, 3600.0, run)
            except Killed:
                consolidate(folder)
                then(folder)

    one = part(tmp_path / "whole", ())
    other = part(tmp_path / "killed", (5, 17, 30))
    assert len(steps) == 3 * 12 + 3  # one iteration is lost per death
    assert one.iterations == other.iterations == 12
    assert one.is_limited
    assert other.is_limited
    assert torch.equal(one.images, other.images)
    assert set(one.controls) == set(other.controls) == {"mean image", "prior only", OTHER_GRADIENT}
    for name, images in one.controls.items():
        assert torch.equal(images, other.controls[name])
    assert null_if_nan(one.scores) == null_if_nan(other.scores)

    def alter(folder):
        path = folder / read_manifest(folder / "manifest-0.json")["attack/seed-0"].file
        path.write_bytes(path.read_bytes() + b"0")

    with pytest.raises(StateError, match="altered since it was saved"):  # no part that is refused
        part(tmp_path / "altered", (5,), alter)


def test_the_plan_alone(captured, tmp_path):
    outcome = succeed(
        "run.py", "--audit", "--dry-run", "--root", tmp_path, "--checkpoint", captured(*LENET)
    )
    for text in ("plan: 5:00 in all", "positive control", "matching, short", "layerwise"):
        assert text in outcome.out
    assert not list(tmp_path.iterdir())


def test_layerwise_ends_at_its_deadline(captured):
    """And is then no evidence of safety, though it reports what it has."""
    path = str(captured("-a", "convnet", "-b", 2, "--upload-bn", "--with-control", "--decoys", 30))
    flags = ["--audit", "--checkpoint", path]
    settings = suite_settings.suite_settings_from(parser().parse_args(flags), flags)
    (loaded,) = subject.load_subjects(settings, Silent())
    assert loaded.parts == list(suite.SUITE)
    part = suite.SUITE[0]
    with Interrupts() as interrupts:
        run = Run(loaded.settings.scoring, interrupts, Silent(), 100)
        how = suite.part_settings(part, loaded.case.target, 2, 0, 2**33)
        done = suite.run_part(part, how, loaded.case, loaded.sealed, 0.0, run)
    assert done.status == "done"
    assert done.is_limited
    assert done.verdict["verdict"] == INCOMPLETE
    assert "the controls were not run, since its time was over" in done.verdict["sentence"]
    assert done.images.shape == (2, 3, 32, 32)


def test_nothing_is_matched_once_layerwise_has_shown_a_reconstruction():
    """The rest of its time goes to the checkpoints after it."""
    part = Part("layerwise", "layerwise", 5.0)
    shown = Done(part, "done", scores={"verdict": {"verdict": RECONSTRUCTION}})
    clock = Clock()
    budget = Budget(100.0, clock)
    budget.add(4)

    class Loaded:
        refused = {}

    with Interrupts() as interrupts:
        audit = suite_run.Audit(None, [], budget, Silent(), interrupts, None, FORGETFUL, {})
        found = suite_run.run_one(audit, Loaded(), suite.SUITE[1], [shown])
    assert (found.status, found.reason) == ("skipped", "already shown by layerwise")
    assert budget.forecast(3) == 100
    assert suite_report.part_entry(found)["verdict"] is None
