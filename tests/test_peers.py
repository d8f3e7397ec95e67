"""benchmarks/peers.py: the other projects' loops compute the plain derivative, and rows say so."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.peers_breaching import breaching_method
from benchmarks.peers_loops import Attack, inversefed, original, own
from benchmarks.peers_memory import allocated_above_start
from benchmarks.setting import photo_objective
from inversion.pixel_gradient import plain
from inversion.restarts import initial_images
from inversion.settings import Weights
from train.datasets import DATASETS
from utils.errors import FaultError

SIZE, BATCH_SIZE, STEPS = 16, 2, 3
METHODS = {
    "inversefed": inversefed,
    "original": original,
    "original-truncated": partial(original, truncated=True),
    "exact": partial(own, name="exact"),
    "exact+forced": partial(own, name="exact+forced"),
    "breaching": breaching_method,
    "breaching-tv": partial(breaching_method, equal_tv=True),
}
#: Those that compute what `exact` does.
SAME = [name for name in METHODS if name not in ("exact+forced", "original-truncated")]


def parameters(names):
    """The names as parameters; breaching's is marked."""
    marks = pytest.mark.breaching
    return [pytest.param(n, marks=marks) if n.startswith("breaching") else n for n in names]


def attack(train_mode=True, boxed=False, tv=0.01):
    """An attack on a network with BatchNorm, in float64."""
    objective = partial(
        photo_objective, "convnet", SIZE, BATCH_SIZE, weights=Weights(priors={"tv": tv}),
        train_mode=train_mode, dtype=torch.float64,
    )  # fmt: skip
    shape, normalisation = (3, SIZE, SIZE), DATASETS["photos"].normalisation
    return Attack(objective, shape, normalisation, tv, 0.1, boxed, torch.float64)


def start():
    return initial_images(0, BATCH_SIZE, (3, SIZE, SIZE), torch.float64)


def read(path):
    with Path(path).open(newline="") as file:
        return [*csv.DictReader(file)]


@pytest.mark.parametrize("name", parameters(METHODS))
def test_derivatives_are_the_plain_one_to_rounding(name):
    for train_mode in (True, False) if name in SAME else (True,):
        for tv in (0.0, 0.01):  # the distance alone, whose derivative is the smaller one
            found = peers.agreement(METHODS[name](attack(train_mode, tv=tv)), start())
            assert found.difference < 1e-12
            assert abs(found.loss) < 1e-7
            assert found.cosine > (0.9 if tv else 1 - 1e-12)


def test_the_truncated_derivative_is_another_one():
    exact = plain(attack().objective(), start())[1]
    truncated = original(attack(), truncated=True).derivative(start())[1]
    assert peers.agreement(original(attack()), start()).difference < 1e-12
    assert torch.nn.functional.cosine_similarity(exact.flatten(), truncated.flatten(), 0) < 0.999


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("name", parameters(SAME))
def test_loops_take_the_same_steps(name, boxed):
    """Clamping, step sizes and signs included; without TV, which breaching has another one of."""
    marks = []
    task = attack(boxed=boxed, tv=0.0 if name == "breaching" else 0.01)
    found = METHODS[name](task).run(start(), STEPS, lambda: marks.append(None))
    expected = METHODS["exact"](task).run(start(), STEPS, lambda: None)
    assert len(marks) == STEPS
    assert not torch.equal(expected, start())
    tolerance = (
        1e-6 if name.startswith("breaching") else 1e-9
    )  # it rounds the box to float32 otherwise
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_derivative_that_differs_ends_the_benchmark(monkeypatch):
    setting = peers.Setting("lenet", SIZE, BATCH_SIZE, STEPS)
    options = peers.Options(["inversefed"], 0.01, 0.1, True, False, 1, 2, 1, False)

    def wrong(of):
        method = inversefed(of)
        return peers.Method(
            method.model, method.objective, method.run,
            lambda x: (method.derivative(x)[0], 1.001 * method.derivative(x)[1]),
        )  # fmt: skip

    monkeypatch.setitem(peers.METHODS, "inversefed", wrong)
    with pytest.raises(FaultError, match="derivative of inversefed by the distance differs"):
        peers.checked(setting, options, ["inversefed"])
    monkeypatch.setitem(peers.METHODS, "inversefed", lambda of: peers.Method(
        None, of.objective(), None, lambda x: (x.sum(), torch.zeros_like(x))))  # fmt: skip
    with pytest.raises(FaultError, match="nothing to compare"):
        peers.checked(setting, options, ["inversefed"])


def test_a_tiny_run_writes_its_rows_and_says_what_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(peers.SETTINGS, "lenet", peers.Setting("lenet", SIZE, BATCH_SIZE, STEPS))
    monkeypatch.setattr(peers, "missing", lambda: "breaching is not installed")
    path = tmp_path / "rows.csv"
    peers.main(["--settings", "lenet", "--rounds", "2", "--turn", "2", "--no-memory",
                "--methods", "breaching", "inversefed", "exact", "exact+forced",
                "--csv", str(path)])  # fmt: skip
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in read(path)}
    for name in ("breaching", "exact+forced"):
        assert f"lenet: {name} is left out" in printed
        assert rows[name]["note"].startswith("left out: ")
        assert rows[name]["ms per step"] == ""
    assert (rows["inversefed"]["evaluations"], rows["inversefed"]["iterations"]) == ("3", "3")
    for name in ("inversefed", "exact"):
        assert float(rows[name]["ms per step"]) > 0
        assert 0 < float(rows[name]["its relative difference"]) < 1e-12
    raw = read(tmp_path / "rows_rounds.csv")
    assert [row["method"] for row in raw] == ["inversefed"] * 2 + ["exact"] * 2
    images = read(tmp_path / "rows_images.csv")
    assert [(row["method"], row["equal"]) for row in images] == [
        (name, equal) for name in ("inversefed", "exact") for equal in ("iterations", "time")
    ]
    assert images[0]["psnr"] != ""


def test_allocations_are_counted_at_their_peak():
    def step():
        a = torch.ones(2**18)  # one MiB each
        b = a + 1
        del a
        return b + 1

    assert allocated_above_start(step) == pytest.approx(2, abs=0.1)
