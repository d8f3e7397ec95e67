"""A batch in chunks gives what it gives whole, and memory depends on the chunk alone."""

import json
import math

import pytest
import torch

from inversion.audit import memory
from inversion.audit.memory import memory_plan
from inversion.counting import chunk_bytes, evaluation_bytes, measured_bytes
from inversion.objective import Objective
from inversion.pixel_gradient import exact, pixel_gradient_of, prior_only
from inversion.settings import AUTO, PRIOR_ONLY, AttackSettings, Loop, Weights
from models.gradient import ClientLoss
from models.local import LocalSteps
from tests import shared_work, test_defences, test_local
from tests.support import call, capture_photos, succeed
from utils.errors import FaultError, InputError
from utils.live_bytes import peak_bytes
from utils.shard import ALONE

FORCED = {"bn_coupling": "forced"}
EVAL = {"train_mode": False}
SHAPE = (3, shared_work.SIZE, shared_work.SIZE)


def case(dtype=torch.float64, name="residual", size=5, **options):
    objective = shared_work.objective_of(ALONE, name, size, dtype, **options)
    objective = objective.with_consensus(shared_work.start(9, size, dtype))
    return objective, shared_work.start(1, size, dtype)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("options", [FORCED, EVAL], ids=["forced", "eval"])
@pytest.mark.parametrize("method", [exact, prior_only])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_chunks_are_exact(options, method, count):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        objective, x = case(dtype, **options)
        losses, slow = method(objective, x, 0.5)
        found, fast = method(objective.in_chunks(count), x, 0.5)
        assert difference(fast, slow) < tolerance
        assert losses.terms.keys() == found.terms.keys() == {"tv", "bn", "norm", "group"}
        for name in losses.terms:
            assert difference(found.terms[name], losses.terms[name]) < tolerance
        assert difference(found.total, losses.total) < tolerance
        assert (found.gradient is None) == (losses.gradient is None)


@pytest.mark.parametrize("distance", ["sim", "L2"])
def test_what_takes_no_derivative_is_exact_too(distance):
    objective, x = case(distance_name=distance, **FORCED)
    chunked = objective.in_chunks(2)
    slow, fast = objective.value(x, 0.5), chunked.value(x, 0.5)
    assert fast.terms.keys() == slow.terms.keys()
    for name in slow.terms:
        assert difference(fast.terms[name], slow.terms[name]) < 1e-12
    assert difference(fast.total, slow.total) < 1e-12
    for whole, parts in zip(objective.gradient(x), chunked.gradient(x), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-15)
    assert chunked.gradient_distance(x) == pytest.approx(objective.gradient_distance(x), rel=1e-12)


@pytest.mark.parametrize("mode", ["topk", "percentile"])
def test_what_a_defence_let_through_is_compared(mode):
    objective, x, _ = test_defences.small_case(mode, "sim")
    _, slow = exact(objective, x)
    _, fast = exact(objective.in_chunks(2), x)
    assert difference(fast, slow) < 1e-12


@pytest.mark.parametrize("name", ["sme", "mean"])
def test_several_local_steps(name):
    model, (x, y) = test_local.network(), test_local.batch()
    target = test_local.update_target(model, x, y, LocalSteps(3, 0.05, 3), ClientLoss(False))
    objective, other = (
        Objective(model, target, y, Weights(priors={"tv": 0.01}), update_model=name)
        for _ in range(2)
    )
    slow, whole = exact(objective, x + 0.1, 0.25)
    fast, parts = exact(other.in_chunks(1), x + 0.1, 0.25)
    assert difference(parts, whole) < 1e-12
    assert difference(fast.total, slow.total) < 1e-12
    if name == "sme":
        assert difference(other.alpha, objective.alpha) < 1e-12


def test_what_couples_images_is_refused():
    objective, _ = case()
    with pytest.raises(InputError, match="6 BatchNorm layers normalise by the whole batch"):
        objective.in_chunks(2)
    objective, _ = case(name="untracked", **EVAL)
    with pytest.raises(InputError, match="2 BatchNorm layers"):
        objective.in_chunks(2)
    objective, _ = test_local.objective_of("unroll", LocalSteps(3, 0.05))
    with pytest.raises(InputError, match="local steps take images together"):
        objective.in_chunks(2)


def settings(**options):
    return AttackSettings(Weights(), Loop(2, 0.1), **options)


def test_anomalies_are_found_in_chunks():
    objective, x = case(**EVAL)
    checked = pixel_gradient_of(settings(detect_anomaly=True))
    objective = objective.in_chunks(2)
    assert torch.equal(checked(objective, x, 0.0)[1], exact(objective, x)[1])
    x[3] = torch.nan
    with pytest.raises(FaultError, match="the derivative has a NaN"):
        checked(objective, x, 0.0)


# Memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FORCED, EVAL], ids=["forced", "eval"])
def test_memory_depends_on_the_chunk_alone(options):
    peaks = {}
    for size in (8, 32):
        objective, x = case(torch.float32, size=size, **options)
        objective = objective.with_consensus(None)
        for chunk in (None, 4):
            chunked = objective.in_chunks(chunk)
            peaks[chunk, size] = peak_bytes(lambda o=chunked, x=x: exact(o, x))
    derivative = 4 * math.prod(SHAPE)  # of one image; it is the result
    assert peaks[4, 32] - peaks[4, 8] <= 1.01 * derivative * (32 - 8)
    assert peaks[None, 32] > 2 * peaks[None, 8]


@pytest.mark.parametrize("options", [{}, FORCED, EVAL], ids=["train", "forced", "eval"])
def test_the_count_on_shapes_is_what_is_held(options):
    objective, x = case(**options)
    objective = objective.with_consensus(None)
    held = peak_bytes(lambda: exact(objective, x))
    counted = evaluation_bytes(exact, objective, SHAPE, len(x))
    assert counted == pytest.approx(held, rel=0.01)
    assert measured_bytes(exact, objective, SHAPE, 4) == pytest.approx(
        evaluation_bytes(exact, objective, SHAPE, 4), rel=0.01
    )
    if options:
        chunked = objective.in_chunks(2)
        held = peak_bytes(lambda: exact(chunked, x))
        assert chunk_bytes(objective, SHAPE, 2) == pytest.approx(held, rel=0.05)


def plan(limit, chunk_size=None, *, options=EVAL, **changes):
    objective, _ = case(name="conv", size=9, **options)
    asked = settings(chunk_size=chunk_size, matching_memory=limit, **changes)
    return memory_plan(asked, objective.with_consensus(None), SHAPE, ALONE)


def test_the_plan_takes_as_many_images_as_fit():
    assert plan(None) is None
    needs = {count: plan(None, count).expected for count in range(1, 9)}
    whole = plan(2**40)
    assert whole.chunk_size is None
    assert plan(whole.expected).chunk_size is None
    for limit in (needs[1], needs[3], needs[5], whole.expected - 1):
        found = plan(limit)
        fitting = max(count for count in needs if needs[count] <= limit)
        assert -(-9 // found.chunk_size) == -(-9 // fitting)
        assert found.expected <= limit
        assert found.chunk_size <= fitting
    assert plan(2**40, 20).chunk_size is None


def test_the_plan_refuses_with_the_smallest(monkeypatch):
    with pytest.raises(InputError, match=r"--max-memory 0.00954MiB: needs at least \d MiB for"):
        plan(10_000)
    with pytest.raises(InputError, match=r"--chunk-size 8: takes .* needs at least"):
        plan(10_000, 8)
    with pytest.raises(InputError, match="cannot be taken in chunks: 3 BatchNorm layers"):
        plan(10_000, options={})
    with pytest.raises(InputError, match="--pixel-gradient plain keeps the graph of all"):
        plan(10_000, pixel_gradient="plain")
    assert plan(2**40, options={}).chunk_size is None
    control = plan(None, 2, options={}, pixel_gradient=PRIOR_ONLY)
    assert control.chunk_size is None
    with pytest.raises(InputError, match="3 BatchNorm layers"):
        plan(10_000, 2, options={}, pixel_gradient=PRIOR_ONLY)
    without_bn = {"weights": Weights(1.0, {"tv": 0.1})}
    assert plan(None, 2, options=without_bn, pixel_gradient=PRIOR_ONLY).chunk_size == 2
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    with pytest.raises(InputError, match="--chunk-size auto: this system does not say"):
        plan(None, AUTO)


def test_where_shapes_do_not_suffice_a_few_images_are_evaluated(monkeypatch):
    counted = plan(None, 6).expected
    monkeypatch.setattr(memory, "chunk_bytes", lambda *_: 1 / 0)
    assert plan(None, 6).expected == pytest.approx(counted, rel=0.1)


# The scripts -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    flags = ("--image-size", "16", "--arch", "convnet", "--batch-size", "5", "--upload-bn")
    return capture_photos(tmp_path_factory.mktemp("captured"), *flags, "--with-control")


def attack_with(checkpoint, root, *flags):
    flags = ("--checkpoint", checkpoint, "--root", root, "--lr", "0.1", "--TV", "1e-4", *flags)
    return ("--BN", "1e-3", "--exact-bn", "--bn-coupling", "forced", "--epochs", "3", *flags)


def test_an_attack_in_chunks_is_the_attack(checkpoint, tmp_path):
    images = {}
    for name, flags in {"whole": (), "chunks": ("--chunk-size", "2")}.items():
        words = attack_with(checkpoint, tmp_path, "--id", name, "--metric", *flags)
        said = succeed("run.py", *words)
        folder = tmp_path / "results" / "exp" / name
        images[name] = torch.load(folder / "x_recon.pth")
    assert "memory: 5 images in 3 chunks of at most 2; expected to take" in said.out
    entry = json.loads((folder / "result.json").read_text())["memory"]
    assert (entry["images"], entry["chunk_size"], entry["limit_bytes"]) == (5, 2, None)
    assert difference(images["chunks"], images["whole"]) < 1e-3
    assert "control, prior only: 3 iterations" in said.out


def test_a_run_goes_on_with_the_chunks_that_it_began_with(checkpoint, tmp_path, monkeypatch):
    """Whatever is free by then: other chunks are rounded otherwise."""
    from tests.test_resume import run_until_save

    words = attack_with(checkpoint, tmp_path, "--chunk-size", "auto", "--save-every", "0.000001")
    monkeypatch.setattr(memory, "_largest", lambda *_: 2)
    monkeypatch.setattr(memory, "_free", lambda *_: 10_000)
    monkeypatch.setattr(memory._Need, "of", lambda _, chunk: 20_000 if chunk is None else 5_000)
    run_until_save(3, monkeypatch, *words)
    monkeypatch.setattr(memory, "_largest", lambda *_: 3)
    folder = tmp_path / "results" / "exp" / "test"
    said = succeed("run.py", *words, "--resume", folder)
    assert "memory: 2 images at a time, as the run began" in said.out
    assert json.loads((folder / "result.json").read_text())["memory"]["chunk_size"] == 2


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        (("--max-memory", "1MiB"), "--max-memory 1MiB: needs at least"),
        (("--chunk-size", "2", "--pixel-gradient", "plain"), "--chunk-size 2: --pixel-gradient"),
        (("--chunk-size", "0"), "argument --chunk-size: 0 is below 1"),
        (("--max-memory", "20 GB"), "argument --max-memory: '20 GB' is no size of memory"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, tmp_path, flags, refusal):
    outcome = call("run.py", *attack_with(checkpoint, tmp_path, *flags))
    assert outcome.code == 2
    assert refusal in outcome.err
