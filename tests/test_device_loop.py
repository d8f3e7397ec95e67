"""The loop on a device that is read rarely: same bits; and its step as a graph, by a stand-in."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from inversion import optimise, step_graph
from inversion.first_order import finite_differences
from inversion.objective import Losses, Objective
from inversion.optimise import Saving, reconstruct
from inversion.pixel_gradient import exact, plain
from inversion.restarts import Restarts, initial_images
from inversion.settings import Loop, MLCOSchedule, Weights
from inversion.step_graph import GraphError
from inversion.strategies import mlco
from models.build import build_model
from tests.recorded import Recording, recorded
from tests.support import photos, target_of
from utils.shard import ALONE

GOAL = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)
BOX = (torch.full((3, 1, 1), -0.8), torch.full((3, 1, 1), 0.8))


def bowl(x, progress):
    """‖x − GOAL‖² and a prior whose weight changes, without a number from or to the host."""
    value = (x - GOAL).square().sum()
    weight = (x.new_ones(()) * progress).to(x.dtype)
    return Losses(value, value, {"norm": weight}), 2 * (x - GOAL)


class Breaking:
    """The bowl, with one number that is not finite at evaluation number `at`."""

    def __init__(self, at, what):
        self.at, self.what, self.calls = at, what, 0

    def __call__(self, x, progress):
        losses, derivative = bowl(x, progress)
        self.calls += 1
        if self.calls - 1 == self.at:
            if self.what == "prior":
                losses = replace(losses, terms={"norm": losses.total / 0})
            elif self.what == "total":
                losses = replace(losses, total=losses.total * math.nan)
            else:
                derivative = derivative.clone()
                derivative[0, 1] = math.nan
        return losses, derivative


def run(pixel_gradient, loop, **options):
    """The result of a loop and all that `on_step` was told."""
    told = []
    start = initial_images(3, 2, (3, 2, 2), torch.float32)
    found = reconstruct(
        pixel_gradient, start, loop, generator=torch.Generator().manual_seed(5),
        on_step=lambda *step: told.append(step), **options,
    )  # fmt: skip
    return found, told


def assert_same(one, other):
    (found, told), (true, truly_told) = one, other
    assert torch.equal(found.x, true.x)
    assert (found.steps, found.stopped, found.reason) == (true.steps, true.stopped, true.reason)
    assert str(found.losses) == str(true.losses)  # where NaN equals NaN
    assert told == truly_told
    assert str(found.optimiser_state) == str(true.optimiser_state)


LOOPS = {
    "last": Loop(30, 0.1),
    "best": Loop(30, 0.4, keep_best=True),
    "signs, box": Loop(30, 0.4, signed=True, keep_best=True, box=BOX),
    "noise": Loop(30, 0.1, noise=0.3, box=BOX, keep_best=True),
    "L-BFGS": Loop(8, 1.0, "LBFGS", keep_best=True),
}


@pytest.mark.parametrize("name", LOOPS)
def test_losses_read_rarely_are_the_same_losses(name):
    loop = LOOPS[name]
    assert_same(run(bowl, replace(loop, read_every=7)), run(bowl, loop))


@pytest.mark.parametrize("what", ["prior", "total", "derivative"])
@pytest.mark.parametrize("at", [0, 5, 12, 29, 30])
@pytest.mark.parametrize("keep_best", [True, False])
def test_what_follows_a_number_that_is_not_finite_does_not_count(what, at, keep_best):
    loop = Loop(30, 0.1, noise=0.1, keep_best=keep_best)
    rarely = run(Breaking(at, what), replace(loop, read_every=7))
    assert rarely[0].stopped == "not finite"
    assert rarely[0].steps == min(at, 30)
    assert_same(rarely, run(Breaking(at, what), loop))


def test_losses_are_read_about_once_a_second(monkeypatch):
    """By a clock on which an iteration takes no time at first, and later half a second."""
    now, reads, read = [0.0], [], optimise.Run._read
    monkeypatch.setattr(optimise.time, "perf_counter", lambda: now[0])

    def timed(x, progress):
        now[0] += 0.0078125 if progress < 0.2 else 0.5
        return bowl(x, progress)

    def noted(of, rows):
        reads.append(len(rows))
        return read(of, rows)

    monkeypatch.setattr(optimise.Run, "_read", noted)
    run(timed, Loop(50, 0.1, read_every=20))
    assert reads == [1, 2, 4, 8, 3, *[2] * 16, 1]


def moments_of(loop, number):
    """The moments of a run that is saved at every `number`-th chance."""
    moments, chances = [], iter(range(1, 1000))
    saving = Saving(lambda: next(chances) % number == 0, moments.append)
    return run(bowl, loop, saving=saving), moments


@pytest.mark.parametrize("name", ["last", "noise"])
@pytest.mark.parametrize("graph", [False, True])
def test_a_run_goes_on_from_wherever_it_was_saved(name, graph, monkeypatch):
    in_recording(monkeypatch)
    loop = replace(LOOPS[name], read_every=7)
    whole = run(bowl, LOOPS[name])
    saved, moments = moments_of(replace(loop, cuda_graph=graph), 2)
    assert_same(saved, whole)
    assert [moment.step for moment in moments] == [3, 14, 28]
    for moment in moments:
        rest, told = run(bowl, loop, since=moment)
        assert_same((rest, whole[1][: moment.step] + told), whole)


def test_a_wish_to_stop_ends_the_loop_where_it_is_read():
    told = []

    def on_step(step, losses, rate):
        told.append(step)
        return step == 4

    found = reconstruct(bowl, GOAL + 1, Loop(30, 0.1, read_every=4), on_step=on_step)
    assert told == list(range(7))  # read after 1, 3, 7
    assert (found.steps, found.stopped) == (7, "interrupted")
    assert torch.equal(found.x, reconstruct(bowl, GOAL + 1, Loop(30, 0.1, until=7)).x)


def in_recording(monkeypatch):
    """Let the stand-in record steps on the CPU."""
    monkeypatch.setattr(step_graph, "recorded", recorded)
    monkeypatch.setattr(step_graph, "beside", lambda function, device: function())


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "L-BFGS"])
@pytest.mark.parametrize("read_every", [1, 7])
def test_a_replayed_step_is_the_step(name, read_every, monkeypatch):
    in_recording(monkeypatch)
    graph = replace(LOOPS[name], cuda_graph=True, read_every=read_every)
    assert_same(run(bowl, graph), run(bowl, LOOPS[name]))


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_replayed_step_that_is_not_finite_ends_the_loop(keep_best, monkeypatch):
    """Where the number that breaks is one that only the device knows."""
    in_recording(monkeypatch)

    def root(x, progress):
        value = x.sum() / (x[0, 0, 0, 0] > 0.5)  # infinite, once a pixel has come down to 0.5
        return Losses(value, value, {}), torch.ones_like(x)

    loop = Loop(30, 0.1, keep_best=keep_best)
    graph = replace(loop, cuda_graph=True, read_every=7)
    start = torch.ones(2, 3, 2, 2)
    found, true = (reconstruct(root, start, how) for how in (graph, loop))
    assert true.reason == "at iteration 6 the gradient distance is inf"
    assert_same((found, []), (true, []))


def objective_of(arch, weights):
    torch.manual_seed(0)
    arch, *chunks = arch.split(" in ")
    model, (x, y) = build_model(arch, 8, (3, 16, 16)), photos(2, 16, 11)
    target = target_of(model, x, y, arch=arch)
    chunk = 1 if chunks else None
    return Objective(model, target, y, weights, bn_source="batch", chunk_size=chunk)


@pytest.mark.parametrize(
    ("arch", "pixel_gradient", "priors"),
    [
        ("lenet", exact, {"tv": 1e-2}),
        ("convnet", exact, {"tv": 1e-2, "bn": 1e-3, "norm": 1e-4}),
        ("convnet", plain, {"tv": 1e-2, "bn": 1e-3}),
        ("convnet", finite_differences, {"tv": 1e-2, "bn": 1e-3}),
        ("lenet in chunks", exact, {"tv": 1e-2}),
    ],
)
def test_a_network_is_attacked_by_replays(arch, pixel_gradient, priors, monkeypatch):
    """With weights that fall during the run; to the same bits."""
    in_recording(monkeypatch)
    weights = Weights(priors=priors, priors_end={"tv": 1e-4})
    step = partial(pixel_gradient, objective_of(arch, weights))
    start = initial_images(0, 2, (3, 16, 16), torch.float32)
    loop = Loop(12, 0.1, signed=True, keep_best=True)
    whole = reconstruct(step, start, loop)
    found = reconstruct(step, start, replace(loop, cuda_graph=True, read_every=5))
    assert_same((found, []), (whole, []))


def test_stages_of_mlco_are_replayed(monkeypatch):
    in_recording(monkeypatch)
    objective = objective_of("lenet", Weights(priors={"group": 0.1}))
    found = []
    for graph in (True, False):
        starts = [initial_images(seed, 2, (3, 16, 16), torch.float32) for seed in range(2)]
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        loop = Loop(20, 0.1, signed=True, noise=0.1, keep_best=True, cuda_graph=graph, read_every=4)
        restarts = Restarts(starts, generators, loop, schedule=MLCOSchedule(inner_steps=4))
        found.append(mlco(objective, exact, restarts).final)
    assert_same(*((run, []) for run in found))


@pytest.mark.parametrize("pixel_gradient", [exact, plain])
def test_a_step_asks_the_device_for_no_number(pixel_gradient):
    """Between two readings; ResNet-18 in train mode, with every prior."""
    weights = Weights(priors={"tv": 1e-2, "bn": 1e-3, "norm": 1e-4}, priors_end={"tv": 1e-4})
    objective = objective_of("resnet18_cifar", weights)
    start = initial_images(0, 2, (3, 16, 16), torch.float32)
    loop = Loop(3, 0.1, signed=True, noise=0.1, keep_best=True)
    run = optimise.Run(partial(pixel_gradient, objective), start, loop, ALONE, None)
    run._evaluate(0.0)  # the first one makes the rows
    with Recording():
        run._evaluate(0.5)
        run._project(0.1, torch.Generator().manual_seed(0))


def test_a_step_that_waits_for_the_device_is_no_graph(monkeypatch):
    in_recording(monkeypatch)
    with pytest.raises(RuntimeError, match="not permitted"):
        reconstruct(lambda x, p: bowl(x, float(p)), GOAL + 1, Loop(9, 0.1, cuda_graph=True))
    monkeypatch.undo()
    with pytest.raises(GraphError, match="on the cpu"):
        reconstruct(bowl, GOAL + 1, Loop(9, 0.1, cuda_graph=True))
    with pytest.raises(ValueError, match="no cuda_graph"):
        Loop(9, 1.0, "LBFGS", cuda_graph=True)
    with pytest.raises(ValueError, match="read_every"):
        Loop(9, 1.0, read_every=0)
