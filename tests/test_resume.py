"""A run that is killed goes on from its last save, to the same bits."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal

import pytest
import torch

from inversion.audit.attack import Recorder
from inversion.audit.beginning import STATE
from tests.faults import said, started
from tests.support import call, capture_photos, succeed
from utils.errors import FaultError
from utils.journal import FolderJournal, locked

#: Flags of a short run with two seeds: both strategies that save most, noise among them.
COMMON = ("--lr", "0.1", "--TV", "1e-4", "--grad-sign", "--input-boxed", "--min-grads-loss")
MLCO = (*COMMON, "--MinCombine", "--n-seed", "2", "--T-in", "3", "--epochs", "14", "--metric")
BEST = (*COMMON, "--n-seed", "2", "--epochs", "5", "--input-noise", "0.1")
#: Name → flags, and after which shares of all saves the run is killed. Those of MLCO lie in the
#: first stage, in a round, in the last stage and in a control.
CASES = {
    "mlco": (MLCO, (0.1, 0.35, 0.5, 0.8)),
    "best": (BEST, (0.5,)),
    "mean": ((*BEST, "--strategy", "mean"), (0.7,)),
    "L-BFGS": (("--optim", "LBFGS", "--lr", "1", "--epochs", "6"), (0.5,)),
}


class KilledError(BaseException):
    """Stands for the end of the process: nothing below handles it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    flags = ("--image-size", "8", "--arch", "lenet", "--batch-size", "2", "--with-control")
    return capture_photos(tmp_path_factory.mktemp("captured"), *flags)


def result_of(folder):
    found = {name: torch.load(folder / f"{name}.pth") for name in ("x_recon", "y_recon")}
    result = json.loads((folder / "result.json").read_text())
    for name in ("settings", "seconds", "iterations_per_second", "peak_memory_mib", "controls"):
        del result[name]
    return found, result, (folder / "losses.csv").read_text()


def assert_same(folder, whole):
    (images, result, rows), (true_images, true_result, true_rows) = map(result_of, (folder, whole))
    assert all(torch.equal(images[name], true_images[name]) for name in true_images)
    assert rows == true_rows
    assert result == true_result


def run_until_save(number, monkeypatch, *flags):
    """Run run.py and end it after `number` saves; return how many there were."""
    saves, save = itertools.count(1), FolderJournal.save
    done = 0

    def killed(journal):
        nonlocal done
        save(journal)
        done = next(saves)
        if done == number:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(FolderJournal, "save", killed)
        with contextlib.suppress(KilledError):
            succeed("run.py", *flags)
    return done


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_to_the_same_bits(case, checkpoint, tmp_path, monkeypatch):
    flags, parts = CASES[case]
    flags = ("--checkpoint", checkpoint, "--root", tmp_path, *flags)
    saved = ("--save-every", "0.000001")
    saves = run_until_save(None, monkeypatch, *flags, "--id", "whole", *saved)
    whole = tmp_path / "results" / "exp" / "whole"
    assert not (whole / STATE).exists()
    for part in parts:
        number = round(part * saves)
        words = (*flags, "--id", f"killed-{number}")
        assert run_until_save(number, monkeypatch, *words, *saved) == number
        folder = tmp_path / "results" / "exp" / f"killed-{number}"
        resumed = succeed("run.py", *words, *saved, "--resume", folder)
        assert "going on with what is saved" in resumed.out
        assert_same(folder, whole)
        assert not (folder / STATE).exists()


def test_saving_changes_nothing(checkpoint, tmp_path):
    flags = ("--checkpoint", checkpoint, "--root", tmp_path, *CASES["best"][0])
    succeed("run.py", *flags, "--id", "saved", "--save-every", "0.000001")
    succeed("run.py", *flags, "--id", "unsaved", "--save-every", "0")
    assert_same(*(tmp_path / "results" / "exp" / name for name in ("saved", "unsaved")))


@pytest.fixture
def killed(checkpoint, tmp_path, monkeypatch):
    """The flags of a run that was killed in its middle, and its folder."""
    flags = ("--checkpoint", checkpoint, "--root", tmp_path, *COMMON, "--epochs", "4")
    run_until_save(2, monkeypatch, *flags, "--save-every", "0.000001")
    return flags, tmp_path / "results" / "exp" / "test"


def test_a_changed_setting_is_refused_by_name(killed, tmp_path):
    flags, folder = killed
    refused = call("run.py", *flags, "--TV", "1e-3", "--resume", folder)
    assert refused.code == 2
    assert f"--TV 0.001: the run in {folder} began with 0.0001" in refused.err
    refused = call("run.py", *[f for f in flags if f != "--grad-sign"], "--resume", folder)
    assert f"--grad-sign: the run in {folder} began with it" in refused.err
    other = tmp_path / "other.pth.tar"
    other.write_bytes(flags[1].read_bytes() + b"\0")
    refused = call("run.py", *flags, "--checkpoint", other, "--resume", folder)
    assert refused.code == 2
    assert "is not the file that the run in" in refused.err
    moved = tmp_path / "moved.pth.tar"
    moved.write_bytes(flags[1].read_bytes())
    succeed("run.py", *flags, "--checkpoint", moved, "--print-freq", "1", "--resume", folder)


def test_a_run_that_ended_is_not_resumed(killed):
    flags, folder = killed
    succeed("run.py", *flags, "--resume", folder)
    refused = call("run.py", *flags, "--resume", folder)
    assert refused.code == 2
    assert "the run ended whole" in refused.err


def test_the_same_command_begins_anew_and_says_that_a_run_was_killed(killed):
    flags, folder = killed
    anew = succeed("run.py", *flags)
    assert f"--resume {folder} goes on with it" in anew.out
    assert (folder.parent / "test-2" / "x_recon.pth").exists()
    assert (folder / STATE).exists()


def test_a_run_at_work_is_locked(killed, monkeypatch):
    flags, folder = killed
    monkeypatch.setattr("utils.journal.PATIENCE", 0.1)
    with locked(folder / STATE):
        refused = call("run.py", *flags, "--resume", folder)
    assert refused.code == 2
    assert re.search(rf"process {os.getpid()} on \S+ is at work on it", refused.err)
    succeed("run.py", *flags, "--resume", folder)


def test_an_altered_state_is_refused(killed):
    flags, folder = killed
    (fact, *_) = sorted((folder / STATE).glob("fact-*.pt"))
    content = fact.read_bytes()
    fact.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = call("run.py", *flags, "--resume", folder)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert "altered since it was saved" in refused.err
    fact.write_bytes(content)
    (folder / STATE / "manifest-0.json").write_text('{"format": 1, "facts": {"a": {"file": "../x"')
    refused = call("run.py", *flags, "--resume", folder)
    assert refused.code == 2
    assert "damaged" in refused.err


def test_a_state_of_other_shapes_is_refused(killed):
    """Its SHA-256 is right, as of a state that somebody made."""
    flags, folder = killed
    journal = FolderJournal.opened(folder / STATE, 1.0, print, 0)
    right = journal.recall("attack/seed-0")
    wrong_size = {"optimiser": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}}
    lacking = {"optimiser": {"state": {}, "param_groups": []}, "scale": 1.0}
    for fact in (
        {"span": [0, 4]},
        right | {"moment": right["moment"] | {"x": torch.zeros(3)}},
        right | {"moment": right["moment"] | {"optimiser_state": wrong_size}},
        right | {"moment": right["moment"] | {"optimiser_state": lacking}},
        7,
    ):
        journal.note("attack/seed-0", lambda fact=fact: fact)
        journal.save()
        refused = call("run.py", *flags, "--resume", folder)
        assert refused.code == 2
        assert re.search("(seed-0|the optimiser's state) is damaged", refused.err)


def test_other_labels_are_refused(killed):
    """They come from files, such as labelled images of the attacker's own, that may change."""
    flags, folder = killed
    journal = FolderJournal.opened(folder / STATE, 1.0, print, 0)
    journal.note("labels", lambda: 1 - journal.recall("labels"))
    journal.save()
    refused = call("run.py", *flags, "--resume", folder)
    assert refused.code == 2
    assert "the labels are other ones than the run began with" in refused.err


def test_a_failed_save_is_told_and_the_run_goes_on(checkpoint, tmp_path, monkeypatch):
    def full(content, path):
        raise FaultError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr("utils.tensor_files.save", full)
    flags = ("--checkpoint", checkpoint, "--root", tmp_path, *COMMON, "--epochs", "4")
    done = succeed("run.py", *flags, "--save-every", "0.000001")
    assert "warning: the state could not be saved" in done.out
    assert (tmp_path / "results" / "exp" / "test" / "x_recon.pth").exists()


@pytest.mark.parametrize("shard", ["batch", "seeds"])
def test_two_killed_processes_go_on_as_one_or_two(
    shard, checkpoint, tmp_path, in_two_processes
):  # fmt: skip
    flags = ("--checkpoint", checkpoint, "--root", tmp_path, *COMMON, "--MinCombine")
    flags += ("--n-seed", "2", "--T-in", "10", "--epochs", "50", "--shard", shard)
    succeed("run.py", *flags, "--id", "whole", "--save-every", "0")
    two = ("--nproc", "2", "--dist-backend", "gloo")
    with started(tmp_path, "run.py", *flags, *two, "--save-every", "0.01") as process:
        process.end_by(signal.SIGKILL, said("consensus after 25 iterations"))
    results = tmp_path / "results" / "exp"
    shutil.copytree(results / "test", results / "copy")
    for folder, processes in (("test", ()), ("copy", two)):
        words = (*flags, *processes, "--save-every", "0.01")
        going_on = succeed("run.py", *words, "--resume", results / folder)
        assert "consensus after 15 iterations" not in going_on.out
        found, true = (torch.load(results / name / "x_recon.pth") for name in (folder, "whole"))
        assert (found - true).abs().max() < 1e-6


def test_a_run_that_failed_between_two_saves_repeats_no_row(checkpoint, tmp_path, monkeypatch):
    flags = ("--checkpoint", checkpoint, "--root", tmp_path, *COMMON, "--epochs", "6")
    succeed("run.py", *flags, "--id", "whole")
    step = Recorder.on_step

    def fails(recorder, index, number, losses, rate):
        stop = step(recorder, index, number, losses, rate)
        if number == 3:
            raise MemoryError
        return stop

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step", fails)
        call("run.py", *flags, "--id", "failed")
    folder = tmp_path / "results" / "exp" / "failed"
    succeed("run.py", *flags, "--id", "failed", "--resume", folder)
    assert_same(folder, tmp_path / "results" / "exp" / "whole")
