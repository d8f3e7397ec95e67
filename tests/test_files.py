"""Files are whole or not there, and two runs at once never write over each other's."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot

from tests.support import call, capture_photos
from utils import files, pictures
from utils.errors import FaultError
from utils.files import claimed_stem, whole_file, write_csv, write_json
from utils.tensor_files import save

TRIALS = [{"mse": 0.1 * i, "iterations": i, "lr": float(i)} for i in (1, 2)]
ROUNDS = [{"iteration": 1, "seeds": [0, 1]}]
LOSSES = (["seed", "iteration", "total", "gradient"], [[0, 0, 1.0, 1.0], [0, 1, 0.5, 0.5]], [])
#: Everything that writes a file: name → function(path, which of two contents).
WRITERS = {
    "save": lambda path, n: save({"n": n}, path),
    "write_json": lambda path, n: write_json({"n": n}, path),
    "write_csv": lambda path, n: write_csv(["n"], [[n]], path),
    "save_png": lambda path, n: pictures.save_png(torch.full((3, 4, 4), n / 2), path),
    "save_panels": lambda path, n: pictures.save_panels([(f"{n}", torch.rand(2, 3, 4, 4))], path),
    "save_choices": lambda path, n: pictures.save_choices(n * ROUNDS, path),
    "save_trials": lambda path, n: pictures.save_trials(n * TRIALS, ["lr"], path),
    "save_losses": lambda path, n: pictures.save_losses(LOSSES[0], n * LOSSES[1], [], path),
}


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


def test_a_write_that_fails_at_its_end_leaves_the_first_file_whole(writer, tmp_path, monkeypatch):
    path = tmp_path / "file"
    writer(path, 1)
    before = path.read_bytes()

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FaultError, match=f"^{path} could not be written: Operation not permitted$"):
        writer(path, 2)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.undo()
    writer(path, 2)
    assert path.read_bytes() != before
    assert not pyplot.get_fignums()


def test_a_full_disk_is_said_with_the_name_of_the_file(writer, tmp_path, monkeypatch):
    """The device that is always full stands for the temporary file."""
    path = tmp_path / "file"
    writer(path, 1)
    before = path.read_bytes()
    opened = open
    monkeypatch.setattr(files, "open", lambda *_: opened("/dev/full", "wb"), raising=False)
    with pytest.raises(FaultError, match=f"^{path} could not be written: .*") as caught:
        writer(path, 2)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]
    assert not pyplot.get_fignums()


def test_a_folder_in_the_place_of_a_file_is_said(writer, tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(FaultError, match=f"^{tmp_path / 'file'} could not be written: Is a dir"):
        writer(tmp_path / "file", 1)
    assert list(tmp_path.rglob("*")) == [tmp_path / "file"]


def test_a_file_in_the_place_of_the_folder_is_said(writer, tmp_path):
    (tmp_path / "folder").write_text("a file")
    path = tmp_path / "folder" / "file"
    with pytest.raises(FaultError, match=f"^{path} could not be written: "):
        writer(path, 1)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, ValueError])
def test_what_ends_a_write_in_its_middle_reaches_the_temporary_file_alone(tmp_path, ends):
    path = tmp_path / "file"
    path.write_bytes(b"first")

    def write_half():
        with whole_file(path) as file:
            file.write(b"half of the second")
            file.flush()
            assert len(os.listdir(tmp_path)) == 2
            raise ends

    with pytest.raises(ends):
        write_half()
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_the_result_of_the_attack_outlives_a_full_disk_after_the_controls(
    captured, tmp_path, monkeypatch
):
    """The same file is written twice: before the controls, and with them."""
    written, real = [], os.replace

    def replace(temporary, path):
        if os.path.basename(path) == "result.json":
            written.append(Path(temporary).read_bytes())
            if len(written) == 2:
                raise OSError(28, "No space left on device")
        real(temporary, path)

    monkeypatch.setattr(os, "replace", replace)
    path = captured("-a", "lenet", "-b", "3")
    outcome = call(
        "run.py", "--root", tmp_path, "--checkpoint", path, "--lr", 0.1, "--epochs", 1, "--metric"
    )  # fmt: skip
    folder = tmp_path / "results" / "exp" / "test"
    assert outcome.code == 1
    says = f"fault: {folder / 'result.json'} could not be written: No space left on device\n"
    assert outcome.err == says
    assert (folder / "result.json").read_bytes() == written[0] != written[1]
    assert (folder / "pairs.png").exists()
    assert not list(tmp_path.rglob(".writing-*"))


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with whole_file(tmp_path / "new" / "whole", text=True) as file:
        file.write("é\n")
    whole = tmp_path / "new" / "whole"
    assert whole.read_bytes() == "é\n".encode()
    assert whole.stat().st_mode == (tmp_path / "plain").stat().st_mode


# Runs at once -------------------------------------------------------------------------------

ENDINGS = ("-checkpoint", ".log")


def test_eight_runs_at_once_get_eight_stems(tmp_path, monkeypatch):
    """All of them find the same stem free before any of them takes it."""
    together, of_this_thread, real = threading.Barrier(8), threading.local(), files.free_stem

    def free_stem(stem, endings):
        found = real(stem, endings)
        if not hasattr(of_this_thread, "has_met"):
            of_this_thread.has_met = True
            together.wait(300)
        return found

    monkeypatch.setattr(files, "free_stem", free_stem)

    def run(number):
        with claimed_stem(str(tmp_path / "new" / "run"), ENDINGS) as stem:
            for ending in ENDINGS:
                with whole_file(stem + ending, text=True) as file:
                    file.write(str(number))
        return stem

    with ThreadPoolExecutor(8) as pool:
        stems = list(pool.map(run, range(8)))
    base = tmp_path / "new" / "run"
    assert set(stems) == {str(base), *(f"{base}-{n}" for n in range(2, 9))}
    for number, stem in enumerate(stems):
        assert [Path(stem + ending).read_text() for ending in ENDINGS] == [str(number)] * 2
    assert len(os.listdir(tmp_path / "new")) == 16


def test_a_run_that_was_done_in_between_keeps_its_stem(tmp_path, monkeypatch):
    stem, real = str(tmp_path / "run"), files.free_stem

    def free_stem(stem, endings):
        found = real(stem, endings)
        theirs = Path(stem + ".log")
        if not theirs.exists():
            theirs.write_text("theirs")
        return found

    monkeypatch.setattr(files, "free_stem", free_stem)
    with claimed_stem(stem, ENDINGS) as ours:
        Path(ours + ".log").write_text("ours")
    assert ours == f"{stem}-2"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "run.log": "theirs", "run-2.log": "ours"
    }  # fmt: skip


def test_a_capture_that_fails_in_its_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    """The picture comes after the checkpoint; an older capture beside it stays."""
    flags = ("-a", "lenet", "-b", "2", "--seal")
    capture_photos(tmp_path, *flags)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 5

    def full(figure, path):
        raise FaultError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr(pictures, "save_figure", full)
    outcome = call("training.py", "--data-name", "photos", "--results", tmp_path, *flags)
    assert outcome.code == 1
    assert outcome.err.endswith("_i0-2-target.png could not be written: No space left on device\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
