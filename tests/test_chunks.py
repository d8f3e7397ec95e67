"""A batch in chunks gives what it gives whole, and memory depends on the chunk alone."""

import pytest
import torch

from inversion.pixel_gradient import exact, prior_only
from tests import shared_work
from utils.shard import ALONE

FORCED = {"bn_coupling": "forced"}
EVAL = {"train_mode": False}


def case(dtype=torch.float64, name="residual", size=5, **options):
    objective = shared_work.objective_of(ALONE, name, size, dtype, **options)
    objective = objective.with_consensus(shared_work.start(9, size, dtype))
    return objective, shared_work.start(1, size, dtype)


def in_chunks(objective, count):
    other = objective.with_consensus(objective.consensus)
    other.chunk_size = count
    return other


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("options", [FORCED, EVAL], ids=["forced", "eval"])
@pytest.mark.parametrize("method", [exact, prior_only])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_chunks_are_exact(options, method, count):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        objective, x = case(dtype, **options)
        losses, slow = method(objective, x, 0.5)
        found, fast = method(in_chunks(objective, count), x, 0.5)
        assert difference(fast, slow) < tolerance
        assert losses.terms.keys() == found.terms.keys() == {"tv", "bn", "norm", "group"}
        for name in losses.terms:
            assert difference(found.terms[name], losses.terms[name]) < tolerance
        assert difference(found.total, losses.total) < tolerance
        assert (found.gradient is None) == (losses.gradient is None)
