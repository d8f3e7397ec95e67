"""Fast ways of the layerwise attack, each against a slow, obvious twin."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import layerwise_time
from inversion.layerwise import convolution, outputs, system
from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.convolution import Geometry, polished, solve_gradients
from inversion.layerwise.least_squares import WELL, add_gram, least_norm, solve_well
from inversion.layerwise.linearised import coordinates_of, damped, linearised
from inversion.layerwise.refine import solve_by_refining
from inversion.layerwise.system import improve
from inversion.layerwise.trace import network_of
from tests.test_joint import entries_of, error, numbers
from tests.test_layerwise import SAME, rectified, term_of, use_of

POINTWISE = Geometry((1, 1), (2, 2))


def alike(found, twin, tolerance=1e-10):
    assert found.shape == twin.shape
    assert (found - twin).norm() <= tolerance * twin.norm()


# float32 -------------------------------------------------------------------------------------


def coupled_system(share=0.0):
    u = rectified(2, 4, 6, 6)
    uses = [use_of(u, 12, train=True)[0], use_of(u, 8, train=True, geometry=POINTWISE, seed=3)[0]]
    at, entries = u + 0.05 * numbers(*u.shape, seed=8), entries_of(u, 0.2)
    signals = [use.signal(at) for use in uses]
    coordinates = coordinates_of(uses, signals, entries)
    found = linearised(uses, at, signals, entries, coordinates)
    return damped(found, coordinates, share), u


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_float32_map_is_the_float64_one(share):
    found, u = coupled_system(share)
    assert found.rough is not None
    y = numbers(*u.shape, seed=9)
    assert found.rough(y.float()).dtype == torch.float32
    alike(found.rough(y.float()).double(), found.normal(y), 1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-40])
def test_steps_in_float32_arrive_where_those_in_float64_do(scale):
    """Down to residuals far below float32's own, and for numbers that float32 cannot hold."""
    found, u = coupled_system(0.01)
    free = (numbers(*u.shape, seed=4) > -1).double()
    right, start = scale * found.right, scale * free * numbers(*u.shape, seed=5)
    enough = 1e-10 * right.norm().item()
    fast = improve(found, right, start, free, 2000, enough)
    slow = improve(replace(found, rough=None), right, start, free, 2000, enough)
    left = free * (right - found.normal(fast))
    assert left.norm() <= enough
    alike(fast, slow, 1e-7)
    assert torch.equal(fast * (1 - free), start * (1 - free))


def test_the_steps_are_counted_over_all_that_float32_takes():
    found, u = coupled_system()
    calls = []
    counted = replace(found, rough=lambda y: calls.append(1) or found.rough(y))
    improve(counted, found.right, torch.zeros_like(u), torch.ones_like(u), 30, 0.0)
    assert len(calls) == 30
    assert torch.equal(
        improve(found, found.right, u, torch.ones_like(u), 0, 0.0), u
    )  # without steps


def test_steps_that_no_longer_help_end(monkeypatch):
    """Where float32 cannot lessen what is left, it is not asked again."""
    found, u = coupled_system()
    calls = []
    useless = replace(found, rough=lambda y: calls.append(1) or y)
    monkeypatch.setattr(system, "ONCE", 0.5)
    improve(useless, found.right, torch.zeros_like(u), torch.ones_like(u), 500, 0.0)
    assert len(calls) < 10


def test_a_certificate_by_float32_is_that_by_float64(monkeypatch):
    u = rectified(3, 4, 5, 5)
    uses, entries = [use_of(u, 12, train=True)[0]], (torch.zeros_like(u), torch.zeros_like(u))

    def solved():
        return solve_by_refining(uses, list(u.shape), entries, {}, rectified=True)

    fast = solved()
    monkeypatch.setattr("inversion.layerwise.linearised.fast_in_single", lambda like: False)
    slow = solved()
    assert fast.solution.rank == slow.solution.rank == u.numel()
    alike(fast.u, slow.u, 1e-8)
    assert error(fast.u, u) < 1e-7
    assert fast.expected_error == pytest.approx(slow.expected_error, rel=1e-2)
    assert fast.solution.condition == pytest.approx(slow.solution.condition, rel=0.1)


def test_last_digits_in_float32_are_those_in_float64(monkeypatch):
    u = numbers(2, 3, 4, 4)
    terms = [term_of(u, 4, share=0.5), term_of(u, 5, POINTWISE, seed=5, share=0.5)]
    terms = [replace(t, gradient=1e-25 * t.gradient, signal=1e-25 * t.signal) for t in terms]
    known, value = entries_of(u, 0.3)
    start = u + 1e-5 * numbers(*u.shape, seed=3)
    fast = polished(terms, known, value, start, 400, 1e-6)
    monkeypatch.setattr(convolution, "fast_in_single", lambda like: False)
    slow = polished(terms, known, value, start, 400, 1e-6)
    assert error(start, u) > 1e-6
    assert error(slow, u) < 1e-9
    alike(fast, slow, 1e-9)


# Normal equations ----------------------------------------------------------------------------


def nearly_alike(part, count=2):
    """A term of images whose signals differ by so much of themselves: about its condition."""
    u = numbers(count, 3, 4, 4)
    term = term_of(u, 6, share=0.9)
    other = numbers(*term.signal.shape, seed=9)
    signal = term.signal[:1] + part * other
    return u, replace(term, signal=signal, gradient=SAME.weight_gradient(u, signal))


@pytest.mark.parametrize(
    ("part", "way"),
    [(1.0, "cholesky"), (3e-2, "cholesky"), (1e-4, "svd"), (1e-12, "eigh"), (0.0, "eigh")],
)
def test_normal_equations_solve_what_a_singular_value_decomposition_does(monkeypatch, part, way):
    """The condition, known beforehand, says which way is taken."""
    u, term = nearly_alike(part)
    taken = []
    for name, function in (("svd", "_decomposed"), ("eigh", "_from_gram")):
        original = getattr(convolution, function)
        monkeypatch.setattr(
            convolution, function, lambda *a, n=name, f=original: taken.append(n) or f(*a)
        )
    found = solve_gradients([term], u.shape, 1e-5)
    assert (taken or ["cholesky"]) == [way]
    monkeypatch.setattr(convolution, "_clear_gram", lambda matrix, cut: None)
    twin = solve_gradients([term], u.shape, 1e-5)
    assert (found.rank, found.unknowns, found.equations) == (
        twin.rank, twin.unknowns, twin.equations,
    )  # fmt: skip
    alike(found.u, twin.u, 1e-9)
    estimated = twin.outputs is not None  # from a start in the basis of the open directions
    assert found.condition == pytest.approx(twin.condition, rel=0.1 if estimated else 1e-8)
    assert found.gradients.trace == pytest.approx(twin.gradients.trace, rel=1e-8)
    assert (found.outputs is None) == (twin.outputs is None)


def test_normal_equations_keep_nine_digits_up_to_their_limit():
    """Just within the limit, on random matrices of that condition."""
    for seed in range(5):
        left, right = (torch.linalg.qr(numbers(n, 40, seed=seed + n))[0] for n in (90, 40))
        matrix = (left * torch.logspace(0, torch.tensor(1.1 * WELL).log10().item(), 40)) @ right
        x = numbers(40, 1, seed=seed)
        gram = convolution._clear_gram(matrix, 1e-4)
        assert gram is not None
        assert gram.least == pytest.approx(1.1 * WELL, rel=1e-6)
        found = torch.cholesky_solve(matrix.T @ (matrix @ x), torch.linalg.cholesky(gram.gram))
        alike(found, x, 1e-9)


def test_many_normal_equations_are_solved_at_once_and_bad_ones_named():
    roots = numbers(5, 9, 4)
    roots[1, :, 2] = roots[1, :, 0]  # singular
    roots[3, :, 1] = roots[3, :, 0] + 1e-5 * roots[3, :, 3]  # nearly
    roots[4] = 0
    x = numbers(5, 4, seed=1)
    normal = roots.mT @ roots
    found, well = solve_well(normal, (normal @ x[..., None])[..., 0])
    assert well.tolist() == [True, False, True, False, False]
    alike(found[well], x[well], 1e-9)


@pytest.mark.parametrize("deficient", [False, True])
def test_all_positions_are_solved_as_each_by_itself(deficient):
    """Positions that known outputs alone determine are solved in turn where they have too few."""
    outside, basis = numbers(12, 5), numbers(12, 5, seed=1)
    if deficient:
        outside[:, 4] = 0
    target, centred = numbers(12, 7, seed=2), numbers(12, 7, seed=3)
    known = (numbers(12, 7, seed=4) > 0).double()
    known[:, 2] = 0
    found, residual = outputs._one_by_one(outside, target, basis, known, centred)
    residuals = []
    for n in range(7):
        on = known[:, n] > 0
        matrix = torch.cat([outside, basis[on]])
        right = torch.cat([target[:, n], centred[on, n]])
        twin = least_norm(matrix, right[:, None])[:, 0]
        alike(found[:, n], twin)
        residuals.append(((matrix @ twin - right).norm() / right.norm()).item())
    assert residual == pytest.approx(sum(residuals) / 7, rel=1e-10)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_positions_that_equations_join_are_solved_as_by_all_rows(share):
    outside, basis, target = numbers(9, 3), numbers(9, 3, seed=1), numbers(9, 4, seed=2)
    known = (torch.rand(9, 4, generator=torch.Generator().manual_seed(3)) < share).double()
    moment, span = numbers(9, 12, seed=4), torch.tensor(0.7, dtype=torch.float64)
    whole = outputs._Together(outside, target, basis, span, known, numbers(9, 4, seed=5))
    found, residual = whole.solve(moment, numbers(9, seed=6))
    size = moment.square().mean().sqrt()
    joining = torch.cat([outputs._zero_sum(3, 4, moment), moment / size])
    joined = torch.cat([torch.zeros(3, dtype=torch.float64), numbers(9, seed=6) / size])
    twin, left = whole.solve_by_rank(joining, joined)
    alike(found, twin)
    assert residual == pytest.approx(left, rel=1e-10)


def test_pointwise_outputs_add_what_rows_add():
    u = numbers(2, 5, 6, 6)
    term = term_of(u, 7, POINTWISE, share=0.6)
    null, left = numbers(3, 1, 6, 6, seed=2), numbers(7, 3, 3, seed=3) * term.known[0]
    scale = torch.tensor(0.3, dtype=torch.float64)
    found = []
    for add in (convolution._add_outputs, convolution._add_pointwise):
        normal, right = numbers(15, 15, seed=4), numbers(15, seed=5)
        add(normal, right, term, null, term.known[0], left, scale)
        found.append((normal.tril(), right))
    alike(found[1][0], found[0][0])
    alike(found[1][1], found[0][1])


def test_half_a_gram_matrix_is_its_lower_triangle():
    rows, start = numbers(6, 9), numbers(6, 6, seed=1)
    found = start.clone()
    add_gram(found, rows, 0.7)
    alike(found.tril(), (start + 0.7 * rows @ rows.T).tril())
    assert torch.equal(found.triu(1), start.triu(1))
    add_gram(found, rows[:, :0], 0.7)


# The network ---------------------------------------------------------------------------------


class Doubling(nn.Module):
    """Has 2^40 paths from its convolution to its end."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        for _ in range(40):
            x = x + x.relu()
        return self.head(x.flatten(1))


def test_a_tensor_is_asked_for_once_however_many_paths_lead_to_it():
    model = Doubling()
    names = dict(model.named_parameters())
    network = network_of(
        model, 1, (1, 4, 4), {n: torch.ones_like(p).double() for n, p in names.items()},
        train_mode=False, statistics=None, accuracy=dict.fromkeys(names, Accuracy(1e-7)),
    )  # fmt: skip
    last = network.inputs(network.nodes[-1])[0]
    assert network.value(last) is None
    x = numbers(1, 1, 4, 4)
    network.values[network.nodes[0]] = x
    with torch.no_grad():
        alike(network.value(last), network.following()[last], 0.0)


# The benchmark -------------------------------------------------------------------------------


def test_a_stopwatch_counts_a_step_without_the_steps_inside(monkeypatch):
    now = iter(range(0, 100, 10))
    monkeypatch.setattr(layerwise_time.time, "process_time", lambda: float(next(now)))
    watch = layerwise_time.Stopwatch()  # at 0
    inner = watch.of("inner", lambda: None)
    watch.of("outer", lambda: inner())()  # from 10 to 40, inner from 20 to 30
    assert watch.seconds == {layerwise_time.REST: 10.0, "outer": 20.0, "inner": 10.0}


def test_every_step_of_the_benchmark_exists():
    old = {
        "conjugate_gradients",
        "preconditioner",
        "_with_certificate",
    }  # of earlier versions of the code
    for functions in layerwise_time.STEPS.values():
        for module, name in functions:
            found = __import__(f"inversion.layerwise.{module}", fromlist=[name])
            assert hasattr(found, name) or name in old, (module, name)


def test_rows_have_tables():
    header = ["case", "round", "before", "after", "images_apart"]
    rows = [["a", n, 10.0, 5.0 + n, 1e-9] for n in range(3)]
    text = layerwise_time.markdown(header, rows)
    assert text.splitlines()[2] == "| a | 10.0 | 6.0 | 0.60 (0.50–0.70) | 1e-09 |"
    rows = [["a", "step", "x", "3"], ["a", "step", "y", "0.1"], ["a", "whole", "", "4"]]
    text = layerwise_time.markdown(["case", "what", "name", "cpu_seconds"], rows)
    assert text.splitlines()[2] == "| a | 4.0 | x 75% |"


def test_results_that_differ_are_said_to():
    row = ["flatten", True, 8, 0, 1e-7, 1e-6, 2.0]
    before = {"images": torch.zeros(1, 3, 2, 2), "certificates": [row]}
    after = {"images": torch.ones(1, 3, 2, 2), "certificates": [[*row[:6], 2.2]]}
    apart = layerwise_time.difference(before, after)
    assert apart["condition"] == pytest.approx(0.1)
    assert apart["residual"] == apart["expected_error"] == 0
    assert 0.1 < apart["images"] < 0.5
    after["certificates"][0][3] = 1
    assert layerwise_time.difference(before, after)["residual"] == float("inf")
