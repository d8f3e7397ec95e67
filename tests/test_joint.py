"""All equations about a tensor together: against dense least squares, dense ranks and the truth."""

from dataclasses import replace

import pytest
import torch

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.convolution import Geometry
from inversion.layerwise.joint import (
    MOST_OPEN,
    openness,
    solvable,
    solve_all_equations,
    solve_jointly,
    too_large,
)
from inversion.layerwise.solve import solve_tensor
from inversion.layerwise.system import improve, joint_system
from inversion.layerwise.use import Use
from inversion.layerwise.zeros import find_zeros, positive_probability, scatter

SAME = Geometry((3, 3), (1, 1), (1, 1))
NOTHING_NEAR: dict[str, tuple[torch.Tensor, float]] = {}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def use_of(u, outputs, seed=0, accuracy=1e-10):
    """Return a convolution of u whose ReLU is on for about half of its outputs."""
    weight = numbers(outputs, u.shape[1], 3, 3, seed=seed + 1) / (9 * u.shape[1]) ** 0.5
    z = SAME.forward(u, weight)
    arriving, mask = numbers(*z.shape, seed=seed + 2), (z > 0).to(z)
    return Use(
        name=f"conv{seed}", geometry=SAME, weight=weight,
        gradient=SAME.weight_gradient(u, arriving * mask), arriving=arriving, mask=mask,
        batchnorm=None, accuracy=Accuracy(accuracy), known=mask, output=z * mask,
        trusted=torch.ones(outputs, dtype=torch.float64), relu=f"relu{seed}",
    )  # fmt: skip


def error(found, true):
    return ((found - true).norm() / true.norm()).item()


def entries_of(u, share, seed=9):
    known = (torch.rand(u.shape, generator=torch.Generator().manual_seed(seed)) < share).to(u)
    return known, u * known


def dense_rank(system, free):
    """Return the rank of the normal equations of the entries that are sought."""
    places = free.flatten().nonzero()[:, 0]
    columns = []
    for place in places:
        unit = torch.zeros(free.numel(), dtype=torch.float64)
        unit[place] = 1
        columns.append(system.normal(unit.reshape(free.shape)).flatten()[places])
    return int(torch.linalg.matrix_rank(torch.stack(columns), hermitian=True, rtol=1e-11))


def test_the_normal_equations_are_symmetric_and_met_by_the_truth():
    u, v = numbers(2, 3, 6, 6).relu(), numbers(2, 3, 6, 6, seed=5)
    uses = [use_of(u, 5), use_of(u, 4, seed=20)]
    system = joint_system([use.term(use.signal()) for use in uses], u.shape)
    torch.testing.assert_close(system.normal(u), system.right)
    torch.testing.assert_close((v * system.normal(u)).sum(), (u * system.normal(v)).sum())


@pytest.mark.parametrize("outputs", [5, 2])
def test_open_directions_are_counted_as_a_dense_rank_counts_them(outputs):
    """Five channels are enough with the known entries, two are not."""
    u = numbers(2, 3, 6, 6).relu()
    known, _ = entries_of(u, 0.2)
    use = use_of(u, outputs)
    system = joint_system([use.term(use.signal())], u.shape)
    free = 1 - known
    open_directions = int(free.sum()) - dense_rank(system, free)
    seen = openness(system, free, torch.Generator().manual_seed(0), 30, 2000)
    assert (open_directions == 0) == (outputs == 5)
    if open_directions:
        assert seen.directions == pytest.approx(open_directions, rel=0.3)
    else:
        assert seen.directions < MOST_OPEN
        assert seen.condition < 1e3


def test_a_slow_direction_counts_as_open():
    """After a few steps nothing counts as determined that has not converged."""
    u = numbers(2, 3, 6, 6).relu()
    use = use_of(u, 5)
    system = joint_system([use.term(use.signal())], u.shape)
    free = torch.ones_like(u)
    few = openness(system, free, torch.Generator().manual_seed(0), 2, 3)
    assert few.directions > MOST_OPEN


def test_conjugate_gradients_meet_the_normal_equations_where_free():
    u = numbers(1, 2, 5, 5)
    use = use_of(u, 6)
    system = joint_system([use.term(use.signal())], u.shape)
    known, value = entries_of(u, 0.3)
    found = improve(system, system.right, value, 1 - known, 500, 1e-12)
    left = (system.right - system.normal(found)) * (1 - known)
    assert left.norm() < 1e-11
    assert torch.equal(found * known, value)


def test_known_entries_complete_what_the_gradient_leaves_open():
    u = numbers(2, 4, 8, 8)
    use = use_of(u, 3)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    lone = solve_tensor([use], u.shape, nothing, rectified=False, near=NOTHING_NEAR)
    entries = entries_of(u, 0.6)
    found = solve_tensor([use], u.shape, entries, rectified=False, near=NOTHING_NEAR)
    assert not lone.certified
    assert lone.rank < lone.unknowns
    assert found.certified
    assert error(found.value, u) < 1e-6


def test_an_expected_error_is_what_noise_makes_of_a_tensor():
    u = numbers(2, 4, 8, 8)
    use = use_of(u, 6)
    noise = 1e-4
    sent = use.gradient + noise * use.gradient.norm() / use.gradient.numel() ** 0.5 * numbers(
        *use.gradient.shape, seed=50
    )
    use = replace(use, gradient=sent, accuracy=Accuracy(1e-10, noise=noise))
    found = solve_all_equations([use], u.shape, entries_of(u, 0.4), NOTHING_NEAR, rectified=False)
    assert found.certified
    true = error(found.u, u)
    assert 0.4 * true < found.expected_error < 2.5 * true


def test_zeros_complete_what_the_equations_leave_open():
    """Without its zeros the tensor is not determined; with them it is, and they are plenty."""
    u = (numbers(2, 16, 14, 14) - 0.3).relu()
    use = use_of(u, 16, accuracy=1e-7)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    plain = solve_all_equations([use], u.shape, nothing, NOTHING_NEAR, rectified=False)
    found = solve_all_equations([use], u.shape, nothing, NOTHING_NEAR, rectified=True)
    assert not plain.certified
    assert plain.solution.rank < u.numel()
    assert found.certified
    assert not found.rests_on_zeros
    assert error(found.u, u) < 1e-5


def test_a_wrong_mask_entry_is_repaired_on_the_way():
    u = (numbers(2, 16, 14, 14) - 0.3).relu()
    right = use_of(u, 30, accuracy=1e-7)
    faint = torch.where(right.output > 0, right.output, torch.inf).flatten().argsort()[:1]
    mask = right.mask.clone()
    mask.view(-1)[faint] = 0
    wrong = replace(right, mask=mask, known=right.known * mask, output=right.output * mask)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    found = solve_all_equations([wrong], u.shape, nothing, NOTHING_NEAR, rectified=True)
    assert found.flips == 1
    assert torch.equal(found.uses[0].mask, right.mask)
    assert found.certified
    assert error(found.u, u) < 1e-4


def test_far_too_few_equations_are_not_certified():
    u = (numbers(2, 8, 12, 12) - 0.3).relu()
    use = use_of(u, 6)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    found = solve_all_equations([use], u.shape, nothing, NOTHING_NEAR, rectified=True)
    assert error(found.u, u) > 0.1
    assert not found.certified
    assert not solvable([use], u.shape, nothing, 9 * 6 * 8, rectified=True)


def test_a_large_null_space_is_told_by_its_size():
    u = torch.zeros(1, 4, 40, 26, dtype=torch.float64)
    assert too_large([use_of(u, 2)], u.shape)  # 4 · (1040 − 18) numbers stay open
    assert not too_large([use_of(u, 6)], u.shape)


def test_the_scatter_of_negatives_is_the_errors_variance():
    truth = numbers(2, 8, 10, 10).relu()
    size = torch.linspace(0.01, 0.1, 10, dtype=torch.float64).view(1, 1, 1, 10)
    u = truth + size * numbers(*truth.shape, seed=3)
    found = scatter(u, torch.ones_like(u)).sqrt().mean((0, 1, 2))
    ratio = found[1:-1] / size.flatten()[1:-1]
    assert bool(((ratio > 0.7) & (ratio < 1.4)).all())


def test_the_probability_of_being_positive_is_bayes_rule():
    """Against densities that are integrated numerically."""
    m = torch.tensor([-0.3, 0.0, 0.2, 1.5], dtype=torch.float64)
    variance, square = torch.tensor(0.04).double(), torch.tensor(0.8).double()
    share = torch.tensor(0.6).double()
    grid = torch.linspace(0, 8, 80001, dtype=torch.float64)
    prior = 2 * torch.exp(-0.5 * grid**2 / square) / (2 * torch.pi * square).sqrt()
    likelihood = torch.exp(-0.5 * (m[:, None] - grid) ** 2 / variance)
    positive = torch.trapezoid(prior * likelihood, grid)
    zero = torch.exp(-0.5 * m**2 / variance)
    expected = share * positive / (share * positive + (1 - share) * zero)
    found = positive_probability(m, variance, share, square)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


def test_zeros_are_pinned_and_freed_where_the_equations_pull():
    truth = (numbers(2, 8, 10, 10) - 0.2).relu()
    u = truth + 0.01 * numbers(*truth.shape, seed=3)
    free = torch.ones_like(u)
    zero = find_zeros(u, free, torch.zeros_like(u))
    assert bool((truth[zero > 0] < 0.05).all())
    assert zero.sum() > 0.7 * (truth == 0).sum()
    push = 0.01 * numbers(*truth.shape, seed=4)
    push[0, 0, 0, 0] = 1.0
    held = find_zeros(torch.zeros_like(u), torch.zeros_like(u), push)
    assert held[0, 0, 0, 0] == 0
    assert held.mean() > 0.99


def test_without_rectifying_nothing_is_pinned():
    u = numbers(2, 3, 6, 6)
    use = use_of(u, 12)
    system = joint_system([use.term(use.signal())], u.shape)
    nothing = (torch.zeros_like(u), torch.zeros_like(u))
    found, settled = solve_jointly(system, nothing, rectified=False)
    assert settled
    assert error(found, u) < 1e-5
