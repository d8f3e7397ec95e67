"""Combination of seeds, the three stages around it, and the strategies beside it."""

import itertools
import statistics
from functools import partial

import pytest
import torch

from inversion.combine import combination_method, combine
from inversion.objective import Objective
from inversion.optimise import OPTIMISERS, reconstruct
from inversion.pixel_gradient import exact
from inversion.restarts import Restarts, initial_images
from inversion.settings import Loop, MLCOSchedule, Weights
from inversion.strategies import STRATEGIES
from models.build import build_model
from tests.support import smooth_network, target_of

SMALL = 1  # bytes of memory with which only the greedy search is possible


def case(
    seed, batch_size=3, num_seeds=3, *, train_mode=False, distance="sim", model=None, **options
):
    """An objective on random images and seeds that are each right in some images, in float64."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = (model or smooth_network)()
    model = model.double()
    shape = (batch_size, 3, 8, 8)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    y = torch.randint(4, (batch_size,), generator=generator)
    noise = torch.randn(num_seeds, *shape, dtype=torch.float64, generator=generator)
    amount = torch.rand(num_seeds, batch_size, 1, 1, 1, dtype=torch.float64, generator=generator)
    target = target_of(model, x, y, train_mode=train_mode, num_classes=4)
    return (
        Objective(model, target, y, Weights(), distance_name=distance, **options),
        x,
        list(x + amount * noise),
    )


def brute_force(objective, x_seeds):
    batch_size = len(x_seeds[0])
    return min(
        objective.gradient_distance(torch.stack([x_seeds[s][i] for i, s in enumerate(choice)]))
        for choice in itertools.product(range(len(x_seeds)), repeat=batch_size)
    )


@pytest.mark.parametrize("distance", ["sim", "L2"])
def test_eval_mode_equals_brute_force(distance):
    for seed in range(10):
        objective, _, x_seeds = case(seed, distance=distance)
        found = combine(objective, x_seeds)
        assert found.loss == pytest.approx(brute_force(objective, x_seeds), rel=1e-6)
        assert found.image_gradients <= 9 + 6


@pytest.mark.parametrize("distance", ["sim", "L2"])
def test_forced_statistics_allow_the_gram_search_in_train_mode(distance):
    for seed in range(5):
        objective, x, x_seeds = case(seed, train_mode=True, distance=distance, bn_coupling="forced")
        assert combination_method(objective, 3, 2**30)[0] == "gram"
        found = combine(objective, x_seeds)
        assert found.loss == pytest.approx(brute_force(objective, x_seeds), rel=1e-6)
        assert found.loss == pytest.approx(objective.gradient_distance(found.x), rel=1e-6)
        assert found.image_gradients <= 9 + 6
        assert combine(objective, [x_seeds[0], x]).loss < 1e-12


def test_batch_statistics_in_eval_mode_are_searched_greedily():
    def untracked():
        model = smooth_network()
        model[1] = torch.nn.BatchNorm2d(4, track_running_stats=False)
        return model

    objective, _, x_seeds = case(0, model=untracked)
    assert combination_method(objective, 3, 2**30)[0] == "greedy"
    found = combine(objective, x_seeds)
    assert found.loss == pytest.approx(objective.gradient_distance(found.x), rel=1e-6)


def test_train_mode_is_near_brute_force():
    ratios = []
    for seed in range(20):
        objective, _, x_seeds = case(seed, train_mode=True)
        assert combination_method(objective, 3, 2**30)[0] == "greedy"
        ratios.append(combine(objective, x_seeds).loss / brute_force(objective, x_seeds))
    assert min(ratios) >= 1 - 1e-9
    assert statistics.median(ratios) <= 1.05


@pytest.mark.parametrize("memory", [SMALL, 2**30])
@pytest.mark.parametrize("train_mode", [True, False])
def test_never_above_the_best_seed(train_mode, memory):
    for seed in range(5):
        objective, _, x_seeds = case(seed, 6, 4, train_mode=train_mode)
        found = combine(objective, x_seeds, memory=memory)
        losses = [objective.gradient_distance(x) for x in x_seeds]
        assert found.seed_losses == pytest.approx(losses, rel=1e-6)
        assert found.loss <= min(losses)
        assert found.loss == pytest.approx(objective.gradient_distance(found.x), rel=1e-9)
        for i, s in enumerate(found.choice):
            assert torch.equal(found.x[i], x_seeds[s][i])


@pytest.mark.parametrize("train_mode", [True, False])
def test_repairs_the_one_image_that_another_seed_has(train_mode):
    objective, x, _ = case(0, 5, train_mode=train_mode)
    wrong = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))
    first, second = x.clone(), wrong.clone()
    first[0], second[0] = wrong[0], x[0]
    found = combine(objective, [first, second])
    assert found.choice == (1, 0, 0, 0, 0)
    assert torch.equal(found.x, x)
    assert found.loss < 1e-12


@pytest.mark.parametrize("train_mode", [True, False])
def test_the_order_of_seeds_changes_nothing(train_mode):
    for seed in range(3):
        objective, _, x_seeds = case(seed, 5, 4, train_mode=train_mode)
        found = combine(objective, x_seeds)
        for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
            again = combine(objective, [x_seeds[s] for s in order])
            assert torch.equal(again.x, found.x)
            assert [order[s] for s in again.choice] == list(found.choice)


def test_one_seed_returns_itself():
    objective, _, x_seeds = case(0, num_seeds=1)
    found = combine(objective, x_seeds)
    assert found.x is x_seeds[0]
    assert found.choice == (0, 0, 0)


def test_the_gram_search_beats_greedy_at_a_tenth_of_the_work():
    """B 12, S 6: too many combinations to try all, so descent is at work."""
    for seed in range(3):
        objective, _, x_seeds = case(seed, 12, 6)
        gram, greedy = combine(objective, x_seeds), combine(objective, x_seeds, memory=SMALL)
        assert gram.loss <= greedy.loss * (1 + 1e-9)
        assert gram.image_gradients <= 0.15 * greedy.image_gradients


def test_greedy_scores_no_candidate_twice(monkeypatch):
    objective, _, x_seeds = case(1, 5, 3, train_mode=True)
    seen = []
    real = objective.gradient_distance
    monkeypatch.setattr(
        objective, "gradient_distance", lambda x: (seen.append(x.numpy().tobytes()), real(x))[1]
    )
    found = combine(objective, x_seeds)
    assert len(seen) == len(set(seen))
    assert found.image_gradients == 5 * len(seen)


def test_batch_statistics_or_memory_decide_the_method():
    network = partial(build_model, "lenet", 4, (3, 8, 8))
    assert combination_method(case(0)[0], 3, 2**30)[0] == "gram"
    assert combination_method(case(0, train_mode=True)[0], 3, 2**30)[0] == "greedy"
    plain, _, x_seeds = case(0, train_mode=True, model=network)
    assert combination_method(plain, 3, 2**30)[0] == "gram"
    assert combine(plain, x_seeds).loss == pytest.approx(brute_force(plain, x_seeds), rel=1e-6)
    method, why = combination_method(case(0)[0], 3, 1000)
    assert method == "greedy"
    assert "of combine_memory" in why


def test_stages_add_up():
    initial, rounds, final = MLCOSchedule().spans(24000)
    assert initial == range(7200)
    assert [len(r) for r in rounds] == [1000] * 7 + [200]
    assert final == range(14400, 24000)
    assert MLCOSchedule().iterations(24000, 8) == 124_800
    for steps in (1, 2, 7, 1001):
        initial, rounds, final = MLCOSchedule(0.2, 0.5, 3, 0.3).spans(steps)
        every = [*initial, *itertools.chain(*rounds), *final]
        assert every == list(range(steps))
        assert all(1 <= len(r) <= 3 for r in rounds)
    assert MLCOSchedule(0.6, 0.0, 1000, 0.4).spans(100) == (range(60), [], range(60, 100))
    for bad in ((0.3, 0.3, 10, 0.3), (-0.1, 0.7, 10, 0.4), (0.3, 0.3, 0, 0.4)):
        with pytest.raises(ValueError, match=r"sum to 1, not 0\.9|at least 0|positive"):
            MLCOSchedule(*bad)


def attack_case(train_mode=False, num_seeds=3):
    objective, _, _ = case(2, 4, train_mode=train_mode)
    objective.weights = Weights(1.0, {"tv": 1e-3, "group": 0.1})
    starts = [initial_images(s, 4, (3, 8, 8), torch.float64) for s in range(num_seeds)]
    generators = [torch.Generator().manual_seed(s) for s in range(num_seeds)]
    return objective, starts, generators


def run_strategy(name, objective, starts, generators, loop, on_step=None, **options):
    options |= {} if on_step is None else {"on_step": on_step}
    return STRATEGIES[name](objective, exact, Restarts(starts, generators, loop, **options))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_parts_in_a_row_are_one_run(optimiser):
    objective, starts, _ = attack_case()
    loop = Loop(20, 0.5, optimiser, noise=0.0 if optimiser == "LBFGS" else 0.1)
    whole = reconstruct(
        partial(exact, objective), starts[0], loop, generator=torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(0)
    part = reconstruct(
        partial(exact, objective), starts[0], loop, generator=generator, span=range(12)
    )
    rest = reconstruct(
        partial(exact, objective), part.x, loop, generator=generator, span=range(12, 20),
        optimiser_state=part.optimiser_state,
    )  # fmt: skip
    torch.testing.assert_close(rest.x, whole.x)
    assert (part.steps, rest.steps) == (12, 8)


@pytest.mark.parametrize("train_mode", [True, False])
def test_mlco_runs_its_stages(train_mode):
    objective, starts, generators = attack_case(train_mode)
    schedule = MLCOSchedule(0.3, 0.3, 4, 0.4)
    seen, rounds = [], []
    loop = Loop(30, 0.1, signed=True, keep_best=True, noise=0.2)

    def on_step(index, step, losses, rate):
        seen.append((index, step, rate, "group" in losses.terms))

    outcome = run_strategy(
        "mlco", objective, starts, generators, loop, on_step, schedule=schedule,
        on_round=lambda done, found: rounds.append((done, found)),
    )  # fmt: skip
    assert outcome.iterations == len(seen) == schedule.iterations(30, 3)
    assert [done for done, _ in rounds] == [9, 13, 17, 18]
    assert all(rate == loop.rate(step) for _, step, rate, _ in seen)
    by_seed = [[step for i, step, _, _ in seen if i == index] for index in (0, 1, 2, None)]
    assert by_seed == [list(range(18))] * 3 + [list(range(18, 30))]
    assert all(group == (index is not None and step >= 9) for index, step, _, group in seen)
    assert [run.steps for run in outcome.runs] == [18] * 3
    assert outcome.final.losses.gradient <= rounds[-1][1].loss * (1 + 1e-6)
    assert "group" not in outcome.final.losses.terms


def test_mlco_without_rounds_refines_the_first_consensus():
    objective, starts, generators = attack_case()
    rounds = []
    outcome = run_strategy(
        "mlco", objective, starts, generators, Loop(10, 0.1), schedule=MLCOSchedule(0.6, 0, 5, 0.4),
        on_round=lambda done, found: rounds.append(done),
    )  # fmt: skip
    assert rounds == [6]
    assert outcome.iterations == 3 * 6 + 4


def test_mlco_without_a_final_stage_returns_the_consensus():
    objective, starts, generators = attack_case()
    rounds = []
    outcome = run_strategy(
        "mlco", objective, starts, generators, Loop(10, 0.1), schedule=MLCOSchedule(0.5, 0.5, 5, 0),
        on_round=lambda done, found: rounds.append(found),
    )  # fmt: skip
    assert torch.equal(outcome.final.x, rounds[-1].x)
    assert outcome.final.losses.gradient == pytest.approx(rounds[-1].loss, rel=1e-6)


@pytest.mark.parametrize("stop", [(1, 3), (1, 12), (None, 25)])
def test_mlco_stopped_anywhere_returns_the_best_there_is(stop):
    objective, starts, generators = attack_case()
    loop = Loop(30, 0.1, signed=True, keep_best=True)
    outcome = run_strategy(
        "mlco", objective, starts, generators, loop, lambda i, step, *_: (i, step) == stop,
        schedule=MLCOSchedule(0.3, 0.3, 100, 0.4),
    )  # fmt: skip
    assert outcome.final.stopped == "interrupted"
    assert outcome.iterations == {(1, 3): 9 + 4, (1, 12): 27 + 9 + 4, (None, 25): 54 + 8}[stop]
    loss = objective.gradient_distance(outcome.final.x)
    assert outcome.final.losses.gradient == pytest.approx(loss, rel=1e-6)
    assert loss <= min(run.losses.gradient for run in outcome.runs) * (1 + 1e-6)


@pytest.mark.parametrize("train_mode", [True, False])
def test_a_combination_can_be_interrupted(train_mode):
    """After three questions whether to stop; the best seed is returned, nothing is lost."""
    objective, starts, generators = attack_case(train_mode)
    asked, schedule = [], MLCOSchedule(0.3, 0.3, 2, 0.4)
    outcome = run_strategy(
        "mlco", objective, starts, generators, Loop(10, 0.1), schedule=schedule,
        should_stop=lambda: bool(asked.append(1)) or len(asked) > 2,
    )  # fmt: skip
    assert len(asked) == 3
    assert outcome.final.stopped == "interrupted"
    assert outcome.iterations == 9
    losses = [run.losses.gradient for run in outcome.runs]
    assert outcome.chosen == losses.index(min(losses))


def test_a_seed_that_breaks_is_left_behind():
    objective, starts, generators = attack_case()
    starts[1] = starts[1] * torch.nan
    schedule = MLCOSchedule(0.3, 0.3, 2, 0.4)
    outcome = run_strategy("mlco", objective, starts, generators, Loop(10, 0.1), schedule=schedule)
    assert outcome.runs[1].stopped == "not finite"
    assert outcome.final.stopped is None
    assert outcome.final.x.isfinite().all()


def test_mean_averages_after_pairing_within_labels():
    objective, starts, generators = attack_case()
    objective.y = torch.tensor([1, 1, 2, 3])
    twin = starts[0].clone()
    twin[[0, 1]] = starts[0][[1, 0]]  # the same images, two of one label swapped
    still = Loop(1, 1e-9, keep_best=True)
    outcome = run_strategy("mean", objective, [starts[0], twin], generators[:2], still)
    torch.testing.assert_close(
        outcome.final.x.sort(0).values, starts[0].sort(0).values, atol=1e-6, rtol=0
    )
    loss = objective.gradient_distance(outcome.final.x)
    assert outcome.final.losses.gradient == pytest.approx(loss, rel=1e-6)
    plain = run_strategy("mean", objective, [starts[0], starts[1]], generators[:2], still)
    middle = (starts[0] + starts[1]) / 2
    torch.testing.assert_close(plain.final.x[2:], middle[2:], atol=1e-6, rtol=0)
