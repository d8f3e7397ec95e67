import importlib.util
import os
import signal

import matplotlib
import pytest
import torch
from matplotlib import pyplot

from benchmarks.peers_breaching import missing as missing_breaching
from tests.browser import missing_browser
from utils import image_files

matplotlib.use("Agg")
# A shell's background job ignores Ctrl-C, and so would the scripts that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Ray starts trials with a niceness of 15, with which a busy machine would starve them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # share the cores between the workers
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items):
    has_bohb = all(importlib.util.find_spec(name) for name in ("hpbandster", "ConfigSpace"))
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "bohb": None if has_bohb else "needs requirements-bohb.txt",
        "browser": missing_browser(),
        "breaching": missing_breaching(),
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


#: What a test may need, and be skipped without.
MARKERS = {"gpu", "bohb", "browser", "breaching"}
_unexpected_skips = []


def pytest_runtest_logreport(report):
    if report.skipped and not MARKERS & set(report.keywords):
        _unexpected_skips.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    """A test that does not run proves nothing: none is skipped but for want of what it needs."""
    if _unexpected_skips and exitstatus == 0:
        needs = ", ".join(sorted(MARKERS))
        print(f"\nskipped, but needs none of {needs}: {', '.join(_unexpected_skips)}")
        session.exitstatus = 1


@pytest.fixture(scope="session", autouse=True)
def plain_layout():
    """Figures are laid out roughly: doing it well takes half of a short attack."""
    whole = pyplot.subplots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "subplots", lambda *a, layout=None, **options: whole(*a, **options))
        yield


@pytest.fixture(scope="session", autouse=True)
def crops_once():
    """A crop of a public photograph is cut once a session: attacks and controls take hundreds."""
    cut, made = image_files.random_crop, {}

    def remembered(photo, size, draw):
        key = photo.mode, photo.size, photo.getpixel((0, 0)), size, str(draw.bit_generator.state)
        if key not in made:
            made[key] = cut(photo, size, draw)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "random_crop", remembered)
        yield


@pytest.fixture(scope="session")
def captured(tmp_path_factory):
    """captured(name, *flags): path of a checkpoint that training.py wrote, made once a session."""
    from tests.support import capture_photos

    made = {}

    def get(*flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            made[flags] = capture_photos(folder, *flags)
        return made[flags]

    return get


@pytest.fixture(scope="session")
def pair():
    """Two processes, started once a session, which do one work after the other."""
    from tests.pair import Pair

    two = Pair()
    yield two
    two.close()


@pytest.fixture
def in_two_processes(pair, monkeypatch):
    """The scripts of this process leave the work of --nproc 2 to the `pair`."""
    from utils import launch

    monkeypatch.setattr(launch, "launch", pair.launch)
