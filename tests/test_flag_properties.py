"""Any command line runs, or is refused with exit code 2 and one line; never a traceback.

The command lines are drawn from the parsers (tests/command_lines.py). FLAG_EXAMPLES=500 draws so
many for each script, anew every time, and runs some searches, audits and sweeps to their end.
"""

import os
import re
import shlex
from functools import partial

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import inversion.audit.flags
import train.flags
from tests.command_lines import flags_of, make_files
from tests.pair import Pair
from tests.support import call
from utils import launch

MANY = int(os.environ.get("FLAG_EXAMPLES", 0))
PARSERS = {"run.py": inversion.audit.flags.parser, "training.py": train.flags.parser}
#: Flags whose runs start processes of their own or take a budget: seconds each.
LONG = {"--superparameters-search", "--audit", "--sweep"}
#: What a fault of a run may be: numbers that overflow are no refusal, since only the run shows it.
FAULT = re.compile(r"fault: .*(finite|nan|NaN|inf).*\n")


def drawn(script, count, always=()):
    """A decorator: call the test with many command lines of a script."""

    def decorate(test):
        every = settings(
            max_examples=MANY or count,
            derandomize=not MANY,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        whole = st.sampled_from([False, False, False, True]) if MANY else st.just(False)
        return every(given(flags=flags_of(PARSERS[script](), script, always), whole=whole)(test))

    return decorate


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with all files that the command lines name; the current folder."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_files(folder)
        yield folder


@pytest.fixture(scope="module")
def processes(files):
    """Leave the work of two processes to a pair of them, and that of more undone."""
    pair = Pair()

    def start(work, argv, group):
        if group.size == 1 or (group.size, group.local, group.joined) == (2, 2, False):
            return pair.launch(partial(within, str(files), work), argv, group)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch", start)
        yield
    pair.close()


def within(folder, work, argv, shard, local_rank):
    """Work in a folder: the processes of the pair are used for one test after the other."""
    os.chdir(folder)
    return work(argv, shard, local_rank)


def everything_in(folder):
    """Every path below the folder, with the time of the last change where it is a file."""
    return {path: path.is_dir() or path.lstat().st_mtime_ns for path in folder.rglob("*")}


def check(script, flags, files, whole):
    """Call a script with these flags in the folder, and leave the folder as it was.

    whole: not only until a dry run ends, where that would be long.
    """
    if "--epochs-tune" in flags or (LONG & set(flags) and not whole):
        flags = [*flags, "--dry-run"]
    note(f"{script} {shlex.join(flags)}")
    before = everything_in(files)
    outcome = call(script, *flags)
    note(f"exit code {outcome.code}: {outcome.err}")
    after = everything_in(files)
    for path in sorted(after.keys() - before.keys(), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert "Traceback" not in outcome.out + outcome.err
    assert all(after.get(path) == time for path, time in before.items()), "a file was changed"
    if outcome.code == 2:
        assert re.fullmatch(r"error: [^\n]+\n", outcome.err)
        assert after.keys() == before.keys(), "a refusal left files behind"
    elif outcome.code != 0:
        assert outcome.code == 1
        assert FAULT.fullmatch(outcome.err)


@drawn("run.py", 120)
def test_any_attack_runs_or_is_refused(processes, files, flags, whole):
    check("run.py", flags, files, whole)


@drawn("training.py", 120)
def test_any_client_runs_or_is_refused(processes, files, flags, whole):
    check("training.py", flags, files, whole)


@drawn("run.py", 8, always=("--nproc", "2"))
def test_any_attack_of_two_processes_runs_or_is_refused(processes, files, flags, whole):
    check("run.py", flags, files, whole)


@drawn("training.py", 8, always=("--nproc", "2"))
def test_any_client_of_two_processes_runs_or_is_refused(processes, files, flags, whole):
    check("training.py", flags, files, whole)
