"""Damaged files, made from a seed: each is refused with one line, soon and cheaply, or read."""

import time

import pytest

from tests.damaged_files import (
    cases,
    command,
    companions,
    digest_of,
    fault_of,
    forget_peak,
    peak_memory,
    sound_files,
    sound_paths,
    written,
)
from tests.support import call

COUNT = 150


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return sound_files(tmp_path_factory.mktemp("sound"))


def met(kind, path, files, root):
    script, *flags = command(kind, path, files, root)
    return call(script, *flags)


def test_sound_files_are_read(files, tmp_path):
    """So that what is refused below is refused for its damage."""
    for kind, path in sound_paths(files).items():
        outcome = met(kind, path, files, tmp_path)
        assert (outcome.code, outcome.err) == (0, ""), kind


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the odd tensors, as they are made
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_damaged_files_are_refused_with_one_line_or_read_and_cost_little(files, tmp_path):
    faults, count = [], 0
    for number, case in enumerate(cases(files, 0, COUNT)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = written(case, folder)
        companions(case, path, files)
        before = {p: digest_of(p) for p in folder.rglob("*") if p.is_file()}
        forget_peak()
        memory, start = peak_memory(), time.process_time()
        name = f"{case.kind}, {case.what}"
        try:
            outcome = met(case.kind, path, files, folder / "results")
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        fault = fault_of(
            case, path, files, outcome, time.process_time() - start, peak_memory() - memory
        )
        if {p: digest_of(p) for p in folder.rglob("*") if p.is_file()} != before:
            fault = "a file was changed or written"
        if fault:
            faults.append(f"{name}: {fault}")
        path.unlink()
        count += 1
    assert count == COUNT
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults)
    assert not files.canary.exists()
