import os

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # share the cores between the workers
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


_unexpected_skips = []


def pytest_runtest_logreport(report):
    if report.skipped and "gpu" not in report.keywords:
        _unexpected_skips.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    """A test that does not run proves nothing: only those that need a GPU may be skipped."""
    if _unexpected_skips and exitstatus == 0:
        print(f"\nskipped without needing a GPU: {', '.join(_unexpected_skips)}")
        session.exitstatus = 1


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
