"""Settings: their names are those of the registries, and one function builds and refuses them."""

import subprocess
import sys

import pytest

import run
from inversion import settings
from inversion.audit import inputs, searching
from inversion.audit.flags import parser
from inversion.audit.settings import settings_from
from inversion.audit.verdict import LEAKAGE_DIGITS
from inversion.distances import GRADIENT_DISTANCES
from inversion.labels.reconstruct import LABEL_FUNCTIONS
from inversion.optimise import OPTIMISERS
from inversion.pixel_gradient import PIXEL_GRADIENTS
from inversion.precision import PRECISION_CONTEXTS
from inversion.priors import PRIOR_FUNCTIONS
from inversion.search.tune import ALGORITHMS
from inversion.strategies import STRATEGIES
from tests.support import ROOT
from utils.metrics import SSIMS
from utils.shard import ALONE


def test_every_name_has_a_function_and_every_function_a_name():
    assert tuple(GRADIENT_DISTANCES) == settings.GRADIENT_DISTANCES
    assert tuple(PIXEL_GRADIENTS) == (*settings.PIXEL_GRADIENTS, settings.PRIOR_ONLY)
    assert tuple(OPTIMISERS) == settings.OPTIMISERS
    assert tuple(ALGORITHMS) == settings.SEARCH_ALGORITHMS
    assert tuple(LEAKAGE_DIGITS) == settings.VERDICT_METRICS
    assert tuple(SSIMS) == settings.SSIMS
    assert tuple(PRECISION_CONTEXTS) == settings.PRECISIONS
    assert list(PRIOR_FUNCTIONS) == list(settings.PRIORS)
    assert list(STRATEGIES) == list(settings.STRATEGIES)
    assert list(LABEL_FUNCTIONS) == list(settings.LABEL_METHODS)


def settings_of(*flags):
    return settings_from(parser().parse_args(["--checkpoint", "file", "--lr", "0.1", *flags]))


def test_equal_flags_are_equal_settings():
    flags = ("--epochs", "9", "--TV", "0.1", "--MinCombine", "--n-seed", "3")
    assert settings_of(*flags).attack == settings_of(*flags).attack
    assert settings_of(*flags).attack != settings_of(*flags, "--seed", "1").attack


def test_the_control_without_gradient_has_priors_alone():
    mlco = settings_of("--epochs", "9", "--TV", "0.1", "--MinCombine", "--n-seed", "3").attack
    assert mlco.prior_names == ["tv", "group"]
    assert mlco.loop_in(None).noise == 0.2
    control = mlco.without_gradient()
    assert (control.pixel_gradient, control.num_seeds) == (settings.PRIOR_ONLY, 1)
    assert control.prior_names == ["tv"]
    assert control.loop_in(None).noise == 0
    assert control.total_iterations(1) == 9
    forced = settings_of("--epochs", "9", "--bn-coupling", "forced").attack
    assert (forced.bn_coupling, forced.without_gradient().bn_coupling) == ("forced", "exact")
    mean = settings_of("--epochs", "9", "--strategy", "mean", "--n-seed", "3").attack
    assert mean.without_gradient().num_seeds == 3


def test_what_a_search_found_enters_the_settings_and_the_record():
    search = ("--superparameters-search", "--simulation-checkpoint", "other", "--lr-tune")
    before = settings_of("--epochs", "9", *search, "--TV-tune", "--max-t", "3", "--min-t", "2")
    assert before.attack.weights.priors == {"tv": settings.RANGES["tv"].low}
    after = before.with_values({"lr": 0.3, "tv": 0.02})
    assert (after.attack.loop.lr, after.attack.weights.priors) == (0.3, {"tv": 0.02})
    assert (after.record["lr"], after.record["TV"]) == (0.3, 0.02)
    assert before.record["lr"] == 0.1


def test_trials_are_the_same_whatever_becomes_of_their_result():
    one = settings_of("--epochs", "9", "--TV", "0.1").attack
    many = settings_of("--epochs", "7", "--TV", "0.1", "--strategy", "mean", "--n-seed", "4").attack
    assert one.for_trials(50) == many.for_trials(50)
    assert one.for_trials(50) != settings_of("--epochs", "9", "--TV", "0.2").attack.for_trials(50)


@pytest.mark.parametrize("flags", [["--help"], ["--version"], ["--lr", "0"], ["--no-such-flag"]])
def test_a_flag_is_refused_before_torch_is_imported(flags):
    code = f"""
import sys
import run
from utils.script import run_script
try:
    code = run_script(run.main, {flags})
except SystemExit as end:  # as argparse ends --help
    code = end.code
print([name for name in ("torch", "numpy", "torchvision", "ray") if name in sys.modules], code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] in ("[] 0", "[] 2"), done.stderr


def test_an_attack_imports_nothing_that_only_scoring_and_searching_need():
    modules = "inversion.strategies, inversion.labels.reconstruct, inversion.search.trial"
    code = (
        f"import sys, {modules}\n"
        "heavy = {'scipy', 'skimage', 'lpips', 'ray', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_search_only_needs_no_iterations_and_stops_after_the_search(monkeypatch, tmp_path):
    found = {"best": {"lr": 0.3}}
    monkeypatch.setattr(searching, "prepare_search", lambda *_: None)
    monkeypatch.setattr(searching, "run_search", lambda *_: found)
    monkeypatch.setattr(inputs, "load_inputs", lambda *_: pytest.fail("it goes on"))
    flags = ["--checkpoint", "file", "--root", str(tmp_path), "--superparameters-search"]
    flags += ["--simulation-checkpoint", "other", "--lr-tune", "--search-only"]
    assert run.work(flags, ALONE, 0) == 0
    assert list(tmp_path.iterdir()) == []
