"""Numbers that are not finite are named; memory that runs out is said; memory does not grow."""

import gc
import itertools
import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from inversion.mlco import mlco
from inversion.objective import Losses, Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import exact, pixel_gradient_of
from inversion.readings import Columns, row_of
from inversion.restarts import Restarts
from inversion.settings import AttackSettings, Loop, MLCOSchedule, Weights
from inversion.strategies import best, mean
from tests.support import attack, call, photos, target_of
from utils.errors import FaultError
from utils.journal import FolderJournal
from utils.shard import ALONE

FINE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("losses", "derivative", "says"),
    [
        (Losses(1.0, 0.5, {"tv": 2.0}), FINE, None),
        (Losses(1.0, None, {}), FINE, None),
        (Losses(math.nan, math.nan, {"tv": math.inf}), FINE, "the gradient distance is nan"),
        (Losses(math.inf, 0.5, {"tv": 1.0, "bn": math.inf}), FINE, "the prior bn is inf"),
        (Losses(math.inf, 0.5, {"tv": 1.0}), FINE, "the weighted sum of the losses is inf"),
        (Losses(1.0, 0.5, {}), FINE * torch.tensor([1, 1, math.nan]),
         "the derivative is not finite in 2 of 6 entries"),
        (Losses(1.0, 0.5, {}), FINE * 3e38, "the sum of the derivative overflows"),
    ],
)  # fmt: skip
def test_the_first_number_that_is_not_finite_is_named(losses, derivative, says):
    tensors = Losses(
        torch.tensor(losses.total),
        None if losses.gradient is None else torch.tensor(losses.gradient),
        {name: torch.tensor(value) for name, value in losses.terms.items()},
    )
    columns, row = Columns.of(tensors), row_of(tensors, derivative, ALONE).tolist()
    evaluation = columns.evaluation(row)
    assert evaluation.not_finite(derivative.numel()) == says
    assert str(evaluation.losses) == str(losses)
    if says is None:
        assert columns.row(losses)[:-3] == row[:-3]


def test_what_is_not_finite_elsewhere_counts_here():
    row = row_of(Losses(FINE.sum(), FINE.sum(), {}), FINE, ALONE).tolist()
    evaluation = Columns((), True, False).evaluation([*row[:-1], 1.0])
    assert evaluation.not_finite(6) == "the derivative of other images is not finite"


class Root(nn.Module):
    """A network whose derivative at images of zeros is 0 times infinity, NaN."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head((x * x).sum((2, 3)).sqrt())


def objective_of_root():
    torch.manual_seed(0)
    model, (x, y) = Root(), photos(2, 4)
    return Objective(model, target_of(model, x, y % 4, num_classes=4), y % 4, Weights())


def test_the_iteration_is_named_with_the_number():
    """A box leaves only zeros at the start; and the last of four iterations breaks."""
    objective = objective_of_root()
    box = (torch.zeros(3, 1, 1), torch.zeros(3, 1, 1))
    whole = reconstruct(
        lambda x, p: exact(objective, x, p), torch.ones(2, 3, 4, 4), Loop(5, 0.1, box=box)
    )
    assert (whole.stopped, whole.steps) == ("not finite", 0)
    assert whole.reason == "at iteration 0 the derivative is not finite in 96 of 96 entries"

    def late(x, progress):
        losses, derivative = exact(objective, x + 1, progress)
        return losses, derivative if progress < 1 else derivative / 0

    run = reconstruct(late, torch.ones(2, 3, 4, 4), Loop(4, 0.1))
    assert run.reason.startswith("at iteration 3 the derivative is not finite in ")


@pytest.mark.parametrize("method", ["exact", "plain"])
def test_detect_anomaly_names_the_operation(method):
    objective = objective_of_root()
    settings = AttackSettings(
        Weights(), Loop(9, 0.1), pixel_gradient=method, detect_anomaly=True
    )  # fmt: skip
    checked, near = pixel_gradient_of(settings), torch.full((2, 3, 4, 4), 0.5)
    losses, derivative = checked(objective, near, 0.0)
    same, equal = exact(objective, near, 0.0)
    assert losses.total == pytest.approx(same.total.item())
    torch.testing.assert_close(derivative, equal)
    with pytest.raises(FaultError) as fault:
        checked(objective, torch.zeros(2, 3, 4, 4), 0.25)
    assert str(fault.value) == (
        "the derivative has a NaN, 25% of the way through the iterations: MulBackward0 made it, "
        f"called in forward, test_numbers.py, line {Root.forward.__code__.co_firstlineno + 1}"
    )
    assert not torch.is_anomaly_enabled()


def resident():
    """Bytes of this process that are in memory, once nothing is left to collect."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
@pytest.mark.parametrize(
    ("strategy", "optimiser", "steps"),
    [(best, "Adam", 2000), (mean, "Adam", 2000), (mlco, "Adam", 2000), (best, "LBFGS", 600)],
)
def test_memory_does_not_grow(strategy, optimiser, steps, tmp_path):
    """The same after a quarter of the iterations and at the end; every seed is saved on its way.

    The images take 24 KiB: if one copy in ten stayed, this would see it.
    """
    torch.manual_seed(0)
    x, y = photos(2, 32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 8))
    weights = Weights(1.0, {"norm": 1e-3, "group": 0.1})
    objective = Objective(model, target_of(model, x, y), y, weights)
    found, done = {}, itertools.count(1)

    def on_step(index, step, losses, rate):
        count = next(done)
        if count in (steps // 4, steps):
            found[count] = resident()

    schedule = MLCOSchedule(inner_steps=100)
    seeds = 1 + schedule.initial + schedule.inner if strategy is mlco else 2
    journal = FolderJournal.opened(tmp_path, 0.2, pytest.fail, 0)
    strategy(objective, exact, Restarts(
        [torch.randn_like(x) for _ in range(2)],
        [torch.Generator().manual_seed(seed) for seed in range(2)],
        Loop(int(steps / seeds), 0.01, optimiser=optimiser), on_step, schedule, journal=journal,
    ))  # fmt: skip
    assert list(tmp_path.iterdir())
    assert found[steps] <= 1.01 * found[steps // 4]


def out_of_memory(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_memory_that_runs_out_says_what_would_fit(captured, tmp_path, monkeypatch):
    """At a step, in a combination's matrix, in a layer's equations, and elsewhere."""
    monkeypatch.setattr("inversion.combine._inner_products", out_of_memory)
    flags = ("--root", tmp_path, "--checkpoint", captured("-a", "lenet", "-b", "4"))
    matching = (*flags, "--epochs", 2, "--lr", 0.1)
    outcome = call("run.py", *matching, "--n-seed", 2, "--MinCombine")
    assert outcome.code == 1
    assert re.fullmatch(
        r"fault: out of memory: 8 per-sample gradients of \d+ MiB in all; a --combine-memory below "
        r"that makes do without\n", outcome.err)  # fmt: skip
    monkeypatch.setattr("inversion.layerwise.certify.solve_tensor", out_of_memory)
    layers, _ = attack(tmp_path, flags[-1], "--attack", "layerwise", "--id", "layers")
    assert re.search(
        r"out of memory, its equations take about [\d,]+ MiB; give a smaller --max-memory",
        layers["layerwise"]["stopped"],
    )
    monkeypatch.setattr("inversion.audit.attack.pixel_gradient_of", lambda _: out_of_memory)
    outcome = call("run.py", *matching)
    assert outcome.code == 1
    assert re.fullmatch(
        r"fault: out of memory: an iteration with 4 images \(3, 32, 32\) per process takes more "
        r"than 0\.\d MiB; at most 2 may fit: [^\n]+\n", outcome.err)  # fmt: skip
    monkeypatch.setattr("training.parser", out_of_memory)
    assert call("training.py").err.startswith("fault: out of memory, 9 bytes more were asked for;")
