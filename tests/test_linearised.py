"""Equations of coupled convolutions to first order: against autograd, dense ranks and the truth."""

from dataclasses import replace

import pytest
import torch

from inversion.layerwise.convolution import Geometry
from inversion.layerwise.fold import fold, folded, folded_near, folds, unfold
from inversion.layerwise.joint import MOST_OPEN, openness
from inversion.layerwise.linearised import coordinates_of, damped, linearised
from inversion.layerwise.refine import refine_coupled, start_coupled
from inversion.layerwise.solve import solve_tensor
from inversion.layerwise.system import improve
from tests.test_joint import dense_rank, entries_of, error, numbers
from tests.test_layerwise import EXACT, SAME, none_for_one, rectified, silenced, use_of

POINTWISE = Geometry((1, 1))


def system_at(uses, u, entries):
    signals = [use.signal(u) for use in uses]
    return linearised(uses, u, signals, entries, coordinates_of(uses, signals, entries))


def nothing(u):
    return torch.zeros_like(u), torch.zeros_like(u)


def test_the_equations_are_those_of_the_derivative_that_autograd_gives():
    """Up to first order the residuals of all equations at u + v are what the system says."""
    u, v = rectified(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=5)
    use, _ = use_of(u, 6, train=True)
    at = u + 0.1 * numbers(*u.shape, seed=8)
    entries = entries_of(u, 0.2)
    signals = [use.signal(at)]
    coordinates = coordinates_of([use], signals, entries)
    system = linearised([use], at, signals, entries, coordinates)
    of_outputs, bn = coordinates.outputs[0], use.batchnorm

    def squares(t):
        z = SAME.forward(t, use.weight)
        means = (bn.mean - z.mean((0, 2, 3))) * z[:, 0].numel() ** 0.5
        return (
            (use.left_over(t) / use.gradient.norm()).square().sum()
            + of_outputs**2 * (((use.output - z) * use.known).square().sum() + means.square().sum())
            + coordinates.entries**2 * ((entries[1] - t) * entries[0]).square().sum()
        )

    point = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(squares(point), point)
    torch.testing.assert_close(system.right, -coordinates.to_input(slope) / 2)
    moved = coordinates.to_input(v)
    twice = (2 * v * system.normal(v)).sum()
    here = linearised([use], u, [use.signal(u)], entries, coordinates)
    assert here.right.norm() < 1e-10  # the truth meets all equations
    of_truth = (2 * v * here.normal(v)).sum()
    second = (squares(u + 1e-4 * moved) - 2 * squares(u) + squares(u - 1e-4 * moved)) / 1e-8
    torch.testing.assert_close(second, of_truth, rtol=1e-4, atol=0)
    assert not torch.isclose(twice, of_truth)


def test_random_errors_of_the_equations_are_those_of_its_right_side():
    u = rectified(2, 3, 4, 4)
    uses = [use_of(u, 6, train=True)[0], use_of(u, 5, train=False, geometry=POINTWISE, seed=3)[0]]
    signals = [use.signal(u) for use in uses]
    coordinates = coordinates_of(uses, signals, nothing(u))
    noise = [1e-3 * numbers(*use.gradient.shape, seed=6) for use in uses]
    shifts = [1e-3 * numbers(*use.output.shape, seed=7) * use.known for use in uses]
    spoilt = [
        replace(use, gradient=use.gradient + n, output=use.output + s)
        for use, n, s in zip(uses, noise, shifts, strict=True)
    ]
    system = linearised(uses, u, signals, nothing(u), coordinates)
    other = linearised(spoilt, u, signals, nothing(u), coordinates)
    rows = torch.cat(
        [
            (n / use.gradient.norm()).permute(0, 2, 3, 1).reshape(-1, 3)
            for use, n in zip(uses, noise, strict=True)
        ]
    )
    torch.testing.assert_close(system.error(rows, shifts), other.right, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("outputs", [3, 12])
def test_open_directions_are_those_of_all_equations_together(outputs):
    """The gradient leaves numbers open that the known outputs complete, or do not."""
    u = rectified(2, 4, 5, 5)
    use, _ = use_of(u, outputs, train=True)
    system = system_at([use], u, nothing(u))
    free = torch.ones_like(u)
    seen = openness(system, free, torch.Generator().manual_seed(0), 20, 400)
    left_open = u.numel() - dense_rank(system, free)
    assert (left_open == 0) == (outputs == 12)
    assert seen.directions == pytest.approx(left_open, rel=0.3, abs=MOST_OPEN)


def test_the_coordinates_make_the_equations_fast_to_solve():
    u = rectified(3, 4, 6, 6)
    use, _ = use_of(u, 16, train=True)
    entries = nothing(u)
    system = system_at([use], u, entries)
    start = numbers(*u.shape, seed=3)
    left = improve(system, torch.zeros_like(u), start, torch.ones_like(u), 60, 0.0)
    assert left.norm() < 1e-4 * start.norm()
    coordinates = coordinates_of([use], [use.signal(u)], entries)
    y, other = start, numbers(*u.shape, seed=4)
    torch.testing.assert_close(
        (other * coordinates.to_input(y)).sum(), (y * coordinates.to_input(other)).sum()
    )


def test_damping_is_a_weight_of_the_squares():
    u = rectified(2, 3, 4, 4)
    use, _ = use_of(u, 6, train=True)
    signals = [use.signal(u)]
    coordinates = coordinates_of([use], signals, nothing(u))
    system = linearised([use], u, signals, nothing(u), coordinates)
    y, square = numbers(*u.shape, seed=2), (0.3 * coordinates.largest) ** 2
    added = (y * (damped(system, coordinates, 0.3).normal(y) - system.normal(y))).sum()
    torch.testing.assert_close(added, square * coordinates.to_input(y).square().sum())


def test_a_start_far_away_is_brought_near_by_what_is_not_negative():
    """Hardly more equations than numbers, none of the outputs known."""
    u = rectified(3, 8, 4, 4)
    use, _ = use_of(u, 8, train=True)
    use = replace(use, known=0 * use.known)
    assert 48 < use.gradient[:, 0].numel() < 1.6 * 48
    start, coordinates = start_coupled([use], nothing(u), rectified=True)
    assert use.residual(start) > 0.05
    found = refine_coupled([use], start, nothing(u), coordinates, rectified=True)
    assert error(found, u) < 1e-6


@pytest.mark.parametrize("with_entries", [False, True])
def test_gauss_newton_arrives_from_its_own_start(with_entries):
    u = rectified(3, 4, 6, 6)
    use, _ = use_of(u, 16, train=True)
    entries = entries_of(u, 0.4) if with_entries else nothing(u)
    start, coordinates = start_coupled([use], entries, rectified=True)
    assert (start >= 0).all()
    assert use.arriving[:, 0].numel() > 16
    assert 1e-3 < error(start, u) < 0.7
    found = refine_coupled([use], start, entries, coordinates, rectified=True)
    assert use.residual(found) < 1e-6 < use.residual(start)
    assert error(found, u) < 1e-6


def test_what_the_outputs_complete_is_certified():
    """One image without a signal: its gradient says nothing of it, the forward pass does."""
    u = rectified(3, 4, 3, 3)
    use = silenced(u, 12, SAME, none_for_one)
    z = SAME.forward(u, use.weight)
    for known, certified in ((torch.ones_like(z), True), (torch.zeros_like(z), False)):
        given = replace(use, known=known, output=z * known)
        found = solve_tensor([given], u.shape, nothing(u), rectified=True, near={})
        assert found.certified == certified
        assert (found.rank == found.unknowns) == certified
        assert (error(found.value, u) < 1e-6) == certified


def test_fewer_equations_than_numbers_are_not_solved():
    u = rectified(3, 4, 6, 6)
    use, _ = use_of(u, 8, train=True)
    found = solve_tensor(
        [replace(use, known=0 * use.known)], u.shape, nothing(u), rectified=True, near={}
    )
    assert not found.certified
    assert found.rank == found.equations == use.gradient.numel() + 8 < u.numel()


def test_an_expected_error_is_what_noise_makes_of_a_coupled_tensor():
    u = rectified(2, 3, 5, 5)
    use, _ = use_of(u, 9, train=True)
    errors, expected = [], []
    for seed in range(12):
        noise = numbers(*use.gradient.shape, seed=100 + seed)
        disturbed = use.gradient + 1e-6 * use.gradient.norm() / noise.norm() * noise
        accuracy = replace(EXACT, noise=1e-6)
        given = replace(use, gradient=disturbed, known=0 * use.known, accuracy=accuracy)
        found = solve_tensor([given], u.shape, nothing(u), rectified=False, near={})
        errors.append(error(found.raw, u))
        expected.append(found.expected_error)
    ratio = torch.tensor(errors).square().mean() / torch.tensor(expected).square().mean()
    assert 0.4 < ratio.sqrt() < 2.5


# Positions as images of their own --------------------------------------------------------------


def test_positions_are_folded_and_unfolded():
    t = numbers(2, 3, 4, 5)
    flat = fold(t)
    assert flat.shape == (40, 3, 1, 1)
    assert torch.equal(flat[1 * 20 + 2 * 5 + 3, :, 0, 0], t[1, :, 2, 3])
    assert torch.equal(unfold(flat, t.shape), t)
    near = folded_near({"relu": (t.flatten(1), 0.5)}, (2, 9, 4, 5))
    assert torch.equal(near["relu"][0], flat)
    assert near["relu"][1] == 0.5


def test_a_folded_use_has_the_same_equations():
    u = rectified(2, 3, 4, 4)
    use, _ = use_of(u, 6, train=True, geometry=POINTWISE)
    same = folded(use)
    moved = u + 0.1 * numbers(*u.shape, seed=4)
    torch.testing.assert_close(same.left_over(fold(moved)), use.left_over(moved))
    torch.testing.assert_close(same.signal(fold(moved)), fold(use.signal(moved)))
    assert folds([use], u.shape)
    assert not folds([same], (32, 3, 1, 1))
    assert not folds([use, use_of(u, 6, train=True)[0]], u.shape)


@pytest.mark.parametrize(("channels", "few"), [(30, True), (5, False)])
def test_the_input_of_a_1x1_convolution_is_solved_for(channels, few):
    """The same number added to all positions of a channel changes no gradient.

    The gradient of five channels has too small a rank for the signals' space.
    """
    u = rectified(3, channels, 3, 3)
    use, _ = use_of(u, 60, train=True, geometry=POINTWISE)
    assert (torch.linalg.matrix_rank(use.gradient.flatten(1)) == 26) == few
    found = solve_tensor([use], u.shape, nothing(u), rectified=True, near={})
    assert found.certified
    assert error(found.value, u) < 1e-6
    assert torch.equal(found.masks["relu"], use.mask)
