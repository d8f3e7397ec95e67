"""Local steps: the simulated client, the surrogate's derivative, unrolling, what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from inversion.audit.truth import check_truth_gradient
from inversion.audit.updates import update_model_of
from inversion.layerwise.attack import target_network
from inversion.objective import Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import exact, plain
from inversion.settings import AttackSettings, Loop, Weights
from inversion.surrogate import SurrogatePlace
from models.checkpoint import Task, make_checkpoint
from models.gradient import ClientLoss, batch_gradient, trainable_parameters
from models.local import LocalSteps, local_gradient, replaced_parameters
from models.reading import target_from_checkpoint
from tests.support import MEAN, STD, attack, call, capture_photos, smooth_network
from utils.errors import InputError
from utils.shard import Shard
from utils.tensor_files import load_plain

LOSS = ClientLoss(train_mode=True)


def batch(size=5, classes=4, side=12):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64)
    return x, torch.arange(size) % classes


def network():
    torch.manual_seed(1)
    return smooth_network()


def update_target(model, x, y, local, loss=LOSS):
    task = Task("own", len(x), tuple(x.shape[1:]), 4, MEAN, STD, loss)
    gradient = local_gradient(model, x, y, loss, local)
    return target_from_checkpoint(make_checkpoint(model, gradient, task, local=local))


def by_hand(model, x, y, local):
    """The weights after the steps, by the optimiser of torch on the model itself."""
    modules = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    optimiser = torch.optim.SGD(model.parameters(), lr=local.lr)
    size = local.batch or len(x)
    starts = list(range(0, len(x), size))
    for step in range(local.steps):
        start = starts[step % len(starts)]
        optimiser.zero_grad()
        model.train()
        for layer in modules:
            layer.track_running_stats = False
        F.cross_entropy(model(x[start : start + size]), y[start : start + size]).backward()
        optimiser.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("local", [LocalSteps(3, 0.05), LocalSteps(5, 0.02, 2), LocalSteps(1, 0.1)])
def test_the_mean_gradient_is_that_of_torchs_own_steps(local):
    model = network()
    x, y = batch()
    before = [p.detach().clone() for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = local_gradient(model, x, y, LOSS, local)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    after = by_hand(model, x, y, local)
    for g, w0, w1 in zip(found, before, after, strict=True):
        assert torch.allclose(g, (w0 - w1) / (local.lr * local.steps), atol=1e-12)


def test_one_step_is_the_ordinary_gradient_bit_by_bit():
    model, (x, y) = network(), batch()
    ordinary = batch_gradient(model, x, y, LOSS)
    found = local_gradient(model, x, y, LOSS, LocalSteps(1, 0.3))
    assert all(torch.equal(a, b) for a, b in zip(ordinary, found, strict=True))


def test_mini_batches_come_in_turn():
    assert [(p.start, p.stop) for p in LocalSteps(4, 1.0, 2).parts(5)] == [
        (0, 2), (2, 4), (4, 5), (0, 2)
    ]  # fmt: skip
    assert [(p.start, p.stop) for p in LocalSteps(2, 1.0).parts(5)] == [(0, 5), (0, 5)]


def test_replaced_parameters_are_put_back_after_an_error():
    model = network()
    name, own = next(iter(trainable_parameters(model).items()))
    value = torch.ones_like(own).requires_grad_()
    with pytest.raises(ValueError, match="a batch"), replaced_parameters(model, {name: value}):
        _fail_within(model, value)
    assert next(model.parameters()) is own


def _fail_within(model, value):
    assert next(model.parameters()) is value
    raise ValueError("a batch that the model cannot take")


# The attack --------------------------------------------------------------------------------


def objective_of(name, local, **options):
    model, (x, y) = network(), batch()
    target = update_target(model, x, y, local)
    weights = Weights(priors={"tv": 0.01})
    return Objective(model, target, y, weights, update_model=name, **options), x


@pytest.mark.parametrize("distance", ["sim", "L2"])
@pytest.mark.parametrize("name", ["sme", "mean", "unroll"])
def test_exact_and_plain_agree(name, distance):
    """Losses, the derivative by the pixels, and where the surrogate moves by its own."""
    found = []
    for pixel_gradient in (exact, plain):
        objective, x = objective_of(name, LocalSteps(3, 0.05, 3), distance_name=distance)
        losses, derivative = pixel_gradient(objective, x + 0.1, 0.25)
        found.append((losses.total, derivative, objective.alpha))
    (a, da, pa), (b, db, pb) = found
    assert torch.allclose(a, b, atol=1e-14)
    assert torch.allclose(da, db, rtol=1e-9, atol=1e-13)
    assert (pa is None) == (name != "sme")
    if name == "sme":
        assert torch.equal(pa, pb)
        assert abs(pa - 0.5) > 1e-3


@pytest.mark.parametrize("name", ["sme", "unroll"])
def test_the_derivative_is_that_of_finite_differences(name):
    objective, x = objective_of(name, LocalSteps(3, 0.05))
    start = x + 0.1
    _, derivative = exact(objective.afresh(), start)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    step = 1e-5
    up, down = (objective.value(start + s * step * direction).total for s in (1, -1))
    assert (up - down).item() / (2 * step) == pytest.approx(
        (derivative * direction).sum().item(), rel=1e-6
    )


def test_the_slope_by_alpha_is_that_of_finite_differences(monkeypatch):
    objective, x = objective_of("sme", LocalSteps(3, 0.05))
    seen = []
    monkeypatch.setattr(SurrogatePlace, "learn", lambda self, slope, progress: seen.append(slope))
    exact(objective.at_place(0.3), x + 0.1)
    up, down = (objective.at_place(0.3 + s).value(x + 0.1).gradient for s in (1e-5, -1e-5))
    assert seen[0].item() == pytest.approx((up - down).item() / 2e-5, rel=1e-5)


def test_the_ends_of_the_surrogate_are_the_two_states():
    local = LocalSteps(4, 0.05)
    objective, x = objective_of("sme", local)
    model, (_, y) = network(), batch()
    before = batch_gradient(model, x, y, LOSS)
    by_hand(model, x, y, local)  # which leaves the model after the steps
    after = batch_gradient(model, x, y, LOSS)
    for alpha, twin in ((0.0, before), (1.0, after)):
        for a, b in zip(objective.at_place(alpha).gradient(x), twin, strict=True):
            assert torch.allclose(a, b, atol=1e-11)


def test_unrolling_is_exact_at_the_truth_and_the_others_are_not():
    local = LocalSteps(4, 0.05)
    distance = {
        name: objective_of(name, local)[0].gradient_distance(batch()[0])
        for name in ("sme", "mean", "unroll")
    }
    assert distance["unroll"] < 1e-25
    assert distance["unroll"] < 1e-6 * distance["sme"]
    assert distance["sme"] < 0.5 * distance["mean"]


def test_alpha_stays_between_the_states_and_starts_anew():
    objective, x = objective_of("sme", LocalSteps(3, 0.05))
    place = objective.place
    for _ in range(80):
        place.learn(torch.tensor(1.0, dtype=torch.float64), 0.0)
    assert place.alpha.item() == 0.0
    place.alpha.grad = torch.tensor(torch.nan, dtype=torch.float64)  # as `backward` leaves it
    place.learn(place.alpha.grad, 0.0)
    assert place.alpha.item() == 0.0
    assert place.alpha.grad is None  # else the next one would be added to it
    assert objective.afresh().alpha.item() == 0.5
    assert objective.alpha.item() == 0.0


def test_the_result_holds_the_place_of_its_images():
    objective, x = objective_of("sme", LocalSteps(3, 0.05))
    run = reconstruct(partial(exact, objective), x + 0.3, Loop(6, 0.05, keep_best=True))
    again = objective.at_place(run.losses.alpha).value(run.x, 1.0).floats()
    assert again.gradient == pytest.approx(run.losses.gradient, rel=1e-9)
    assert again.alpha == run.losses.alpha


# What is refused ----------------------------------------------------------------------------


def test_what_a_model_of_updates_cannot_do_is_refused():
    model, (x, y) = network(), batch()
    target = update_target(model, x, y, LocalSteps(3, 0.05))
    one = replace(target, local=None)
    weights = Weights()
    with pytest.raises(InputError, match="one gradient was sent"):
        Objective(model, one, y, weights, update_model="sme")
    with pytest.raises(InputError, match="cannot share the images"):
        Objective(model, target, y, weights, update_model="unroll", batch_shard=Shard(0, 2))
    with pytest.raises(InputError, match="one forward pass"):
        Objective(model, target, y, Weights(priors={"bn": 1.0}), update_model="unroll")
    with pytest.raises(InputError, match="cannot be forced"):
        Objective(model, target, y, weights, bn_coupling="forced")
    with pytest.raises(ValueError, match="choose of sme"):
        Objective(model, target, y, weights, update_model="other")
    with pytest.raises(ValueError, match="3 local steps was sent"):
        target_network(model, target)


def test_the_model_is_chosen_by_what_was_sent():
    model, (x, y) = network(), batch()
    target = update_target(model, x, y, LocalSteps(3, 0.05))
    one = replace(target, local=None)
    settings = AttackSettings(Weights(), Loop(1, 0.1))
    assert update_model_of(settings, target) == "sme"
    assert update_model_of(settings, one) == "mean"
    assert update_model_of(replace(settings, update_model="mean"), one) == "mean"
    with pytest.raises(InputError, match="holds one gradient"):
        update_model_of(replace(settings, update_model="unroll"), one)
    with pytest.raises(InputError, match="--strategy mlco mixes"):
        update_model_of(replace(settings, strategy="mlco"), target)
    with pytest.raises(InputError, match="LBFGS"):
        update_model_of(replace(settings, loop=Loop(1, 0.1, "LBFGS")), target)


# The truth, and the scripts ------------------------------------------------------------------


@pytest.mark.parametrize(("order", "kind"), [((0, 1, 2, 3, 4), "same"), ((1, 2, 0, 4, 3), "order")])
def test_the_truth_of_an_update_is_known_by_its_own_steps(order, kind):
    model, (x, y) = network(), batch()
    target = update_target(model, x, y, LocalSteps(3, 1e-3, 2))
    found = check_truth_gradient(model, target, x[list(order)], y[list(order)])
    assert (found.kind, found.fits) == (kind, True)
    other = check_truth_gradient(model, target, x.flip(-1) + 1, y)
    assert not other.fits


FLAGS = ("-a", "lenet", "-b", "4", "--image-size", "12")
STEPS = ("--local-epochs", "2", "--local-batch", "3", "--local-lr", "0.01")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepped")
    return capture_photos(folder, *FLAGS, *STEPS, "--with-control", "--decoys", "2")


def test_a_captured_update_is_attacked_and_scored(stepped, tmp_path):
    checkpoint = load_plain(str(stepped))
    keys = ("local_steps", "local_lr", "local_batch", "local_epochs")
    assert [checkpoint[key] for key in keys] == [4, 0.01, 3, 2]
    flags = ("--metric", "--epochs", "3", "--update-model")
    for name in ("sme", "unroll"):
        result, folder = attack(tmp_path, stepped, *flags, name)
        assert result["update"]["model"] == name
        assert (result["update"]["alpha"] is None) == (name == "unroll")
        assert result["metrics"]["truth_gradient"]["kind"] == "same"
        assert set(result["controls"]) == {"mean image", "prior only", "other gradient"}
        assert "an update of 4 local steps of 3 images each" in (folder / "log.txt").read_text()


def test_labels_from_an_update_are_called_likely(stepped, tmp_path):
    result, _ = attack(tmp_path, stepped, "--pseudo-label-init", "from_grads")
    assert result["labels"]["certain"] is False
    assert "4 local steps is no gradient" in result["labels"]["reason"]


def test_one_local_step_is_stored_as_a_gradient(tmp_path):
    one = capture_photos(tmp_path / "a", *FLAGS, "--local-steps", "1", "--local-lr", "0.5")
    plainly = capture_photos(tmp_path / "b", *FLAGS)
    a, b = load_plain(str(one)), load_plain(str(plainly))
    assert a["local_steps"] is None
    assert all(map(torch.equal, a["target_gradient"], b["target_gradient"]))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--local-lr", "0.1"), "--local-lr 0.1: belongs to --local-steps"),
        (("--local-steps", "2", "--local-epochs", "2"), "--local-epochs 2: --local-steps says"),
        (("--local-steps", "1", "--local-batch", "2"), "--local-batch 2: 1 step(s) see 2 of the 4"),
        (("--local-steps", "2", "--local-batch", "5"), "--local-batch 5: more than the 4 images"),
        (("--local-steps", "2", "--local-optimiser", "adam"), "--local-optimiser adam: belongs to"),
        (
            ("--local-steps", "2", "--enable-dp", "--dp-mode", "per-sample", "-C", "1"),
            "--dp-mode per-sample: clips every sample's gradient at one state",
        ),
        (("--local-steps", "2", "--upload-bn"), "--upload-bn: each local step has"),
    ],
)
def test_local_steps_that_make_no_sense_are_refused(flags, says, tmp_path):
    outcome = call("training.py", "--data-name", "photos", "--results", tmp_path, *FLAGS, *flags)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {says}")
    assert outcome.err.count("\n") == 1
