"""The names in inversion/settings.py are those of the registries, which need torch."""

import subprocess
import sys

from inversion import settings
from inversion.audit.verdict import LEAKAGE_DIGITS
from inversion.distances import GRADIENT_DISTANCES
from inversion.labels.reconstruct import LABEL_FUNCTIONS
from inversion.optimise import OPTIMISERS
from inversion.pixel_gradient import PIXEL_GRADIENTS
from inversion.priors import PRIOR_FUNCTIONS
from inversion.search.tune import ALGORITHMS
from inversion.strategies import STRATEGIES
from tests.support import ROOT
from utils.metrics import SSIMS


def test_every_name_has_a_function_and_every_function_a_name():
    assert tuple(GRADIENT_DISTANCES) == settings.GRADIENT_DISTANCES
    assert tuple(PIXEL_GRADIENTS) == (*settings.PIXEL_GRADIENTS, settings.PRIOR_ONLY)
    assert tuple(OPTIMISERS) == settings.OPTIMISERS
    assert tuple(ALGORITHMS) == settings.SEARCH_ALGORITHMS
    assert tuple(LEAKAGE_DIGITS) == settings.VERDICT_METRICS
    assert tuple(SSIMS) == settings.SSIMS
    assert list(PRIOR_FUNCTIONS) == list(settings.PRIORS)
    assert list(STRATEGIES) == list(settings.STRATEGIES)
    assert list(LABEL_FUNCTIONS) == list(settings.LABEL_METHODS)


def test_an_attack_imports_nothing_that_only_scoring_and_searching_need():
    modules = "inversion.strategies, inversion.labels.reconstruct, inversion.search.trial"
    code = (
        f"import sys, {modules}\n"
        "heavy = {'scipy', 'skimage', 'lpips', 'ray', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
