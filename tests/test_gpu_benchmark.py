"""The benchmark of a GPU, tiny and on the CPU: it must not arrive broken."""

import csv
import os
import subprocess

import pytest

from benchmarks import gpu
from benchmarks.gpu_steps import WAYS, Way, measured, operations
from benchmarks.setting import photo_objective
from inversion import step_graph
from inversion.restarts import initial_images
from tests.recorded import recorded
from tests.support import ROOT, succeed


@pytest.mark.parametrize("section", gpu.SECTIONS)
def test_every_section_writes_rows(section, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "script", lambda name, *flags, gpu=True: succeed(name, *flags))
    gpu.main(["--section", section, "--out", str(tmp_path), "--smoke"])
    with (tmp_path / f"gpu_{section}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert not any(None in row or row.get("note") for row in rows)


def test_a_section_ends_when_its_time_is_over(tmp_path):
    gpu.main(["--section", "step", "--out", str(tmp_path), "--smoke", "--seconds", "0"])
    assert len((tmp_path / "gpu_step.csv").read_text().splitlines()) == 2


def test_a_graph_is_measured_as_any_other_way(monkeypatch):
    monkeypatch.setattr(step_graph, "recorded", recorded)
    monkeypatch.setattr(step_graph, "beside", lambda function, device: function())
    objective = photo_objective("lenet", 16, 2)
    x = initial_images(0, 2, (3, 16, 16), objective.y.new_zeros(()).float().dtype)
    for way in (way for way in WAYS if way.precision != "tf32"):
        assert measured(objective, x, way, 2, 2).ms[1] > 0
    assert operations(objective, x) > 0
    assert operations(objective, x) == operations(objective, x[:1].expand(2, -1, -1, -1))


def test_what_fails_is_a_row(monkeypatch):
    ways = (Way("exact"), Way("graph", graph=True))
    rows = list(gpu.step_rows("lenet", 16, 2, ways, {"float32": 1e9}, gpu.choose_device(None),
                              train_mode=True, rounds=1, steps=1, repeats=1))  # fmt: skip
    assert [row.get("note") for row in rows] == [None, "the images are on the cpu, not on a GPU"]


def test_a_part_that_fails_is_told_and_the_rest_goes_on(tmp_path):
    """By an interpreter that stands for python, and fails in one part."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *loop*) exit 3;; esac\necho "ran $*"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", tmp_path / "out"], capture_output=True, text=True,
        env={**os.environ, "PYTHON": str(fake)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("failed: loop\n")
    assert done.stdout.count("ran ") == len(gpu.SECTIONS)  # the tests among them, without loop
