"""Signals, full disks, closed outputs, odd environments: a run ends in one line or goes on."""

import ast
import itertools
import multiprocessing
import os
import signal
import textwrap
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from tests import endings
from tests.faults import (
    appears,
    damaged,
    finished,
    later,
    random_moment,
    read_only,
    said,
    small_disk,
    small_files,
    started,
    without_privileges,
)
from tests.support import HANG, ROOT, attack, call, no_hang, succeed
from utils import files
from utils.console import Reporter
from utils.files import claimed_stem, whole_file
from utils.launch import Group, free_address, launch

LONG = ("--lr", "0.1", "--epochs", "1000000", "-p", "20")
SHORT = ("--lr", "0.1", "--epochs", "3", "--metric")


# A disk that fills --------------------------------------------------------------------------


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def whole_attack(captured, tmp_path_factory):
    """Checkpoint, folder of an attack that nothing disturbed, and how many bytes it wrote."""
    path = captured("-a", "lenet", "-b", "3")
    _, folder = attack(tmp_path_factory.mktemp("whole"), path, *SHORT)
    return path, folder, bytes_in(folder)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8, 0.99])
def test_an_attack_on_a_disk_that_fills_leaves_whole_files(whole_attack, tmp_path, share):
    path, whole, size = whole_attack
    with small_disk(int(share * size)):
        outcome = call("run.py", "--root", tmp_path, "--checkpoint", path, *SHORT)
    assert outcome.code == 1
    folder = tmp_path / "results" / "exp" / "test"
    assert outcome.err.startswith(f"fault: {folder}")
    assert outcome.err.endswith("could not be written: No space left on device\n")
    assert outcome.err.count("\n") == 1
    assert damaged(tmp_path) == []
    left = {p.relative_to(folder) for p in folder.rglob("*") if "state" not in p.parts}
    assert left < {p.relative_to(whole) for p in whole.rglob("*")}
    assert share < 0.4 or (folder / "result.json").exists()


def test_a_capture_on_a_disk_that_fills_leaves_nothing(tmp_path):
    flags = ("--data-name", "photos", "-a", "lenet", "-b", 2, "--seal", "--results")
    succeed("training.py", *flags, tmp_path / "whole")
    size = bytes_in(tmp_path / "whole")
    for share in (0.02, 0.3, 0.9):
        with small_disk(int(share * size)):
            outcome = call("training.py", *flags, tmp_path / "small")
        assert outcome.code == 1
        assert outcome.err.endswith("could not be written: No space left on device\n")
        assert list((tmp_path / "small").iterdir()) == []


def test_a_log_takes_whole_lines_or_waits(tmp_path):
    reporter = Reporter()
    with small_disk(10) as disk:
        reporter.log_to(tmp_path / "log.txt")
        for line in ("12345", "too long", "again"):
            reporter.say(line)
        assert (tmp_path / "log.txt").read_text() == "12345\n"
        disk.left = 100
        reporter.say("more")
    assert (tmp_path / "log.txt").read_text() == "12345\ntoo long\nagain\nmore\n"


def test_few_files_write_to_a_disk_themselves():
    """All else goes through whole_file, and is whole or not there."""
    writers = set()
    for folder in ("inversion", "models", "train", "utils"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and writes(node):
                    writers.add(str(path.relative_to(ROOT)))
    assert writers == {
        "utils/files.py",  # whole_file itself
        "utils/console.py",  # the log, which grows
        "utils/interruption.py",  # /dev/null
        "utils/journal.py",  # the lock of a run's state
        "inversion/search/tune.py",  # a trial's state, in a folder that Ray then copies
        "utils/tensor_files.py",  # torch.save into what whole_file opened
    }


def writes(call):
    name = ast.unparse(call.func)
    values = [*call.args[1:], *(word.value for word in call.keywords if word.arg == "mode")]
    modes = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    if name == "open":
        return any(set(mode) & set("wax+") for mode in modes)
    if name.endswith(".savefig"):
        return ast.unparse(call.args[0]) not in ("file", "stream")
    return name == "torch.save" or name.endswith((".write_text", ".write_bytes"))


# Processes that are killed while they write ---------------------------------------------------

#: Writes one content after the other to argv[1], for ever; it imports no torch.
WRITE = """
import itertools, sys
from utils import interruption
if __name__ == "__main__":
    interruption.begin()
    from utils.files import whole_file
    from utils.script import run_script
    def write(argv):
        for number in itertools.count():
            with whole_file(argv[0], text=True) as file:
                for part in range(20):
                    file.write(f"{number}\\n" * 500)
            print(number, flush=True)
    sys.exit(run_script(write))
"""
#: Holds a file of argv[1] open in the midst of whole_file, or a claim of argv[1], for ever.
HOLD = """
import sys, time
from utils.files import claimed_stem, whole_file
if sys.argv[2] == "file":
    with whole_file(sys.argv[1]) as file:
        time.sleep(1000)
with claimed_stem(sys.argv[1], ("-a", "-b")) as stem:
    if sys.argv[2] == "claim and file":
        open(stem + "-a", "w").close()
    open(stem + ".ready", "w").close()
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_save_leaves_the_file_whole(tmp_path, number):
    place = tmp_path / "place"
    for seed in range(4):
        with started(tmp_path, "-c", WRITE, place / "file") as process:
            process.end_by(number, random_moment(seed, 0.1, said("\n")))
            outcome = process.outcome()
        content = (place / "file").read_text().splitlines()
        assert len(content) == 20 * 500
        assert len(set(content)) == 1
        if number == signal.SIGKILL:
            assert outcome.code == -number
        else:
            assert (outcome.code, outcome.err) == (128 + number, "interrupted\n")
            assert os.listdir(place) == ["file"]
    files._tidied.clear()
    with whole_file(place / "file") as file:
        file.write(b"by the next process")
    assert os.listdir(place) == ["file"]


def test_a_file_that_grows_too_large_leaves_the_former_one(tmp_path):
    path = tmp_path / "place" / "file"
    outcome = finished(tmp_path, "-c", WRITE, path, prepare=small_files(25_000))
    assert outcome.code == 1
    assert outcome.err == f"fault: {path} could not be written: File too large\n"
    assert path.read_text() == 10_000 * "9\n"  # that of "10" is longer
    assert os.listdir(path.parent) == ["file"]


def test_what_a_living_process_writes_is_not_taken_for_abandoned(tmp_path):
    place = tmp_path / "place"
    with started(tmp_path, "-c", HOLD, place / "dead", "file") as dead:
        dead.end_by(signal.SIGKILL, appears(place, ".writing-*"))
    (left,) = place.iterdir()
    with started(tmp_path, "-c", HOLD, place / "alive", "file") as alive:
        alive.wait(lambda _: not left.exists() and any(place.iterdir()))
        (theirs,) = place.iterdir()
        files._tidied.clear()
        with whole_file(place / "ours") as file:
            file.write(b"ours")
        assert sorted(place.iterdir()) == sorted([theirs, place / "ours"])


@pytest.mark.parametrize(
    ("held", "ours"), [("claim", "run"), ("claim and file", "run-2"), ("living claim", "run-2")]
)
def test_the_claim_of_a_killed_process_stands_in_nobodys_way(tmp_path, held, ours):
    stem = tmp_path / "place" / "run"
    with started(tmp_path, "-c", HOLD, stem, held) as process:
        process.wait(appears(tmp_path / "place", "run.ready"))
        claim = (tmp_path / "place" / "run.claim").read_text()
        assert claim == f"process {process.pid} on {files._host()}\n"
        if held != "living claim":
            process.end_by(signal.SIGKILL, lambda _: True)
            process.outcome()
        with claimed_stem(str(stem), ("-a", "-b")) as free:
            assert free == str(stem.parent / ours)
        assert (stem.parent / "run.claim").exists() == (ours == "run-2")
        assert (stem.parent / "run-a").exists() == (held == "claim and file")


def test_a_claim_of_another_machine_is_respected(tmp_path):
    (tmp_path / "run.claim").write_text("process 1 on elsewhere\n")
    with claimed_stem(str(tmp_path / "run"), ("-a",)) as free:
        assert free == str(tmp_path / "run-2")


def take_stems(stem, number, together):
    """Write ten runs of two files under the same stem, as one of several processes."""
    together.wait(HANG)
    for turn in range(10):
        with claimed_stem(stem, ("-a", "-b")) as free:
            for ending in ("-a", "-b"):
                with whole_file(free + ending, text=True) as file:
                    file.write(f"{number} {turn}")


def test_four_processes_of_one_name_overwrite_nothing(tmp_path):
    context = multiprocessing.get_context("fork")  # they import nothing
    together = context.Barrier(4)
    stem = str(tmp_path / "run")
    processes = [
        context.Process(target=take_stems, args=(stem, number, together)) for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG)
    assert [process.exitcode for process in processes] == [0] * 4
    found = {ending: [p.read_text() for p in tmp_path.glob(f"*-{ending}")] for ending in "ab"}
    expected = sorted(f"{n} {turn}" for n, turn in itertools.product(range(4), range(10)))
    assert sorted(found["a"]) == sorted(found["b"]) == expected
    assert len(os.listdir(tmp_path)) == 80
    for path in tmp_path.glob("*-a"):
        assert path.read_text() == Path(str(path)[:-1] + "b").read_text()


# Signals at any moment ------------------------------------------------------------------------


#: Where an exception would be lost, or show its place in the code: name → code after `begin`.
LOSING = {
    "an import that goes on after any error": """
        import importlib.abc, importlib.machinery, os
        class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, name, *_):
                return importlib.machinery.ModuleSpec(name, self) if name == "slow" else None
            def exec_module(self, module):
                try: wait()
                except BaseException: os._exit(7)
        sys.meta_path.insert(0, Finder())
        import slow
    """,
    "the end of an object": """
        class Thing:
            def __del__(self): wait()
        Thing()
    """,
    "outside of run_script": "wait()",
    "an error that follows": """
        from utils.script import run_script
        def work(argv):
            try: wait()
            except BaseException: raise OSError("a consequence")
        sys.exit(run_script(work))
    """,
}


@pytest.mark.parametrize("where", LOSING)
def test_an_interruption_is_not_lost(tmp_path, where):
    code = textwrap.dedent("""
        import sys, time
        from utils.interruption import begin
        begin()
        def wait():
            print("here", flush=True)
            while True: time.sleep(0.01)  # one long sleep may begin just after the signal
    """) + textwrap.dedent(LOSING[where])  # fmt: skip
    with started(tmp_path, "-c", code) as process:
        process.end_by(signal.SIGTERM, said("here"))
        outcome = process.outcome()
    assert (outcome.code, outcome.err) == (143, "interrupted\n")


def test_a_second_signal_ends_what_does_not_end(tmp_path):
    """And leaves no half of a file."""
    code = """if True:
        import os, time
        from utils.interruption import begin
        begin()
        from utils.files import claimed_stem, whole_file
        with claimed_stem("run", ("-a",)), whole_file("run-a"):
            try:
                print("here", flush=True)
                while True: time.sleep(0.01)
            finally:
                print("and here", flush=True)
                try:
                    while True: time.sleep(0.01)
                finally:
                    os._exit(7)
    """
    place = tmp_path / "place"
    place.mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with started(tmp_path, "-c", code, cwd=place, env=env) as process:
        process.end_by(signal.SIGINT, said("here"))
        process.end_by(signal.SIGINT, said("and here"))
        outcome = process.outcome()
    assert (outcome.code, outcome.err) == (130, "interrupted\n")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 0.4), (signal.SIGHUP, 0.8), (signal.SIGINT, 1.2)],
)
def test_a_signal_while_a_script_begins_is_one_line(captured, tmp_path, number, seconds):
    """Most of these moments lie within the import of torch, which may abort on an exception."""
    path = captured("-a", "lenet", "-b", "3")
    flags = ("--root", tmp_path / "new", "--checkpoint", path, *LONG)
    with started(tmp_path, "run.py", *flags) as process:
        process.end_by(number, later(seconds))
        outcome = process.outcome()
    assert outcome.code == 128 + number
    assert outcome.err == "interrupted\n" or "interrupted after" in outcome.out


@pytest.mark.parametrize("seconds", [0.5, 2.5])
def test_ctrl_c_on_a_terminal_ends_several_processes_in_one_line(captured, tmp_path, seconds):
    path = captured("-a", "lenet", "-b", "3")
    flags = ("--root", tmp_path / "new", "--checkpoint", path, *LONG, "--nproc", 2)
    with started(tmp_path, "run.py", *flags) as process:
        process.end_by(signal.SIGINT, later(seconds), group=True)
        outcome = process.outcome()
    assert outcome.code == 130
    assert outcome.err == "interrupted\n" or "interrupted after" in outcome.out


def test_signals_that_are_to_be_ignored_are(captured, tmp_path):
    """As nohup has it for a terminal that is gone."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started(tmp_path, "-c", WRITE, tmp_path / "file", prepare=ignore) as process:
        process.end_by(signal.SIGHUP, later(0, appears(tmp_path, "file")))
        seen = len(process.out.split())
        process.wait(lambda p: len(p.out.split()) > seen + 2)
        process.end_by(signal.SIGTERM, lambda _: True)
        assert process.outcome().code == 143


# Several processes ----------------------------------------------------------------------------


def descriptors():
    return sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                  if os.path.lexists(f"/proc/self/fd/{n}"))  # fmt: skip


def test_a_launch_that_fails_leaves_no_process_and_no_open_file(monkeypatch):
    """The system refuses a second process: the first one would wait for it."""
    resource_tracker.ensure_running()
    context = multiprocessing.get_context("spawn")
    begun, start = [], context.Process.start

    def refuse(self):
        if begun:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(self)
        begun.append(self.pid)

    monkeypatch.setattr(context.Process, "start", refuse)
    before = len(descriptors())
    with no_hang(), pytest.raises(BlockingIOError):
        launch(endings.one_fails, [], Group(2, 2, 0, free_address(), "gloo"))
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], 0)
    assert len(descriptors()) == before


# Outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code"), [(("--help",), 0), (("--version",), 0), (("--nonsense",), 2)]
)
@pytest.mark.parametrize("script", ["run.py", "training.py"])
def test_outputs_that_are_closed_or_full_keep_the_exit_code(tmp_path, script, flags, code):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for streams in ({"closed": (1,)}, {"closed": (0, 1, 2)}, {"full": (1, 2)}, {"closed": (2,)}):
        outcome = finished(tmp_path, script, *flags, env=env, **streams)
        assert outcome.code == code
        assert "Traceback" not in outcome.out + outcome.err


# Surroundings ---------------------------------------------------------------------------------


def test_an_attack_in_odd_surroundings(captured, tmp_path):
    """No HOME, TERM or PATH, the C locale, odd names, no output, a working directory to read.

    Nor does a file that the attack opens take the place of an output that is closed.
    """
    path = captured("-a", "lenet", "-b", "3")
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    here = tmp_path / "read only"
    here.mkdir()
    root = tmp_path / "two words\nünd 画"
    with read_only(here):
        outcome = finished(
            tmp_path, "run.py", "--root", root, "--checkpoint", path, *SHORT,
            env=bare, cwd=here, closed=(0, 1, 2), prepare=without_privileges,
        )  # fmt: skip
    log = (root / "results" / "exp" / "test" / "log.txt").read_text()
    assert outcome.code == 0, log
    assert "written to" in log
    assert damaged(root / "results" / "exp" / "test") == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_knows_few_letters_shows_the_help(tmp_path, encoding):
    outcome = finished(tmp_path, "run.py", "--help", env={"PYTHONIOENCODING": encoding})
    assert outcome.code == 0
    assert "checkpoint \\u2192 labels" in outcome.out


def test_a_name_that_is_no_utf8_reaches_the_log_as_an_escape(tmp_path):
    reporter = Reporter()
    reporter.log_to(tmp_path / "log.txt")
    reporter.say("a\udcffb")
    assert (tmp_path / "log.txt").read_text() == "a\\udcffb\n"


@pytest.mark.parametrize(("script", "flag"), [("run.py", "--root"), ("training.py", "--results")])
def test_a_folder_without_the_right_to_write_is_refused(tmp_path, script, flag):
    place = tmp_path / "place"
    place.mkdir()
    flags = ("--checkpoint", "c", "--lr", 1, "--epochs", 1)
    if script == "training.py":
        flags = ("--data-name", "photos", "-a", "lenet")
    with read_only(place):
        outcome = finished(
            tmp_path, script, flag, place / "new", *flags, prepare=without_privileges
        )
    assert outcome.code == 2
    assert f"no permission to write in {place}; name another folder" in outcome.err
    assert list(place.iterdir()) == []


def test_a_working_directory_that_is_gone_is_refused(tmp_path):
    """torch would end the process on the spot."""
    gone = tmp_path / "gone"
    gone.mkdir()
    outcome = finished(tmp_path, "run.py", "--lr", 1, cwd=gone, prepare=lambda: os.rmdir(gone))
    assert outcome.code == 2
    says = "the working directory is gone; change to a folder that exists"
    assert outcome.err == f"error: {says}\n"


def test_a_clock_that_goes_backwards_changes_no_duration(captured, tmp_path, monkeypatch):
    path, now = captured("-a", "lenet", "-b", "3"), itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    result, _ = attack(tmp_path, path, *SHORT)
    assert result["seconds"] > 0
    assert all(control["seconds"] >= 0 for control in result["controls"].values())
