"""What a command line chooses from, and that it is judged before torch is imported."""

import subprocess
import sys

import pytest
import torchvision

from models import choices
from models.batchnorm import BATCHNORM_REPLACEMENTS
from models.build import HEAD_INITS
from tests.support import ROOT
from train.datasets import DATASETS
from train.photos import PHOTOS
from train.request import DATASET_NAMES, PHOTO_NAMES
from utils.errors import InputError, naming
from utils.script import versions

HEAVY = {"torch", "torchvision", "numpy", "scipy", "matplotlib", "skimage", "sklearn", "opacus"}


@pytest.mark.parametrize(
    ("names", "registry"),
    [
        (choices.HEAD_INITS, HEAD_INITS),
        (choices.BATCHNORM_REPLACEMENTS, BATCHNORM_REPLACEMENTS),
        (DATASET_NAMES, DATASETS),
        (PHOTO_NAMES, PHOTOS),
    ],
)
def test_the_names_are_those_of_the_registry(names, registry):
    assert names == tuple(registry)


def modules_of(code):
    """What a line printed, and the heavy packages that it imported."""
    code = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *said, modules = done.stdout.splitlines()
    return "\n".join(said) + done.stderr, HEAVY & {name.split(".")[0] for name in modules.split()}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--help",), "usage: training.py"),
        (("--data-name", "mnist"), "--data-name mnist: unknown"),
        (("--data-name", "imagenet"), "--data: missing"),
        (("--data-name", "photos", "-b", "0"), "0 is below 1"),
        (("--data-name", "photos", "--distinct-labels", "9"), "photos has 8 classes"),
        (("--data-name", "photos", "--sigma", "1"), "--sigma 1: belongs to --enable-dp"),
        (("--data-name", "photos", "--outlayer-state", "new"), "invalid choice: 'new'"),
    ],
)
def test_help_and_refusals_of_flags_come_before_the_imports(flags, says):
    call = f"from training import main, run_script\ntry: run_script(main, {list(flags)})\n"
    said, imported = modules_of(call + "except SystemExit: pass")
    assert says in said
    assert not imported


def test_a_small_network_needs_nothing_that_it_does_not_use():
    flags = ["--data-name", "photos", "-a", "lenet", "-b", "8", "--dry-run"]
    _, imported = modules_of(f"from training import main\nmain({flags})")
    assert not imported & {"torchvision", "matplotlib", "sklearn", "opacus"}


def test_the_version_of_torchvision_is_read_without_importing_it():
    assert versions()["torchvision"] == torchvision.__version__


def test_naming_puts_the_subject_before_refusals_alone():
    refused = pytest.raises(InputError, match="^--checkpoint c.tar: no such file$")
    with refused, naming("--checkpoint c.tar"):
        raise InputError("no such file")
    with pytest.raises(RuntimeError, match="^a bug$"), naming("--checkpoint c.tar"):
        raise RuntimeError("a bug")
