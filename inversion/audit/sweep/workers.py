"""Runs the jobs of a sweep, in this process or in several at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from inversion.audit.settings import Settings
from inversion.audit.sweep.job import Simulate, run_job
from inversion.audit.sweep.row import Job, Result
from utils import interruption
from utils.errors import FaultError
from utils.journal import FORGETFUL, Journal
from utils.launch import die_with
from utils.script import Interrupts

#: How often an interruption is looked for while all workers are busy, in seconds.
LOOK = 0.2
#: Of a worker: set to a signal once the sweep is asked to end.
_asked = Interrupts()


def run_jobs(
    settings: Settings,
    simulate: Simulate,
    jobs: Sequence[Job],
    folder: Path,
    interrupts: Interrupts,
    on_result: Callable[[Result], None],
    journal: Journal = FORGETFUL,
) -> None:
    """Run every job and hand its result to `on_result`, in the order in which they end.

    After an interruption only jobs that have ended count. Several workers are processes of one
    thread each. journal: where the attacks on a client are saved on their way, by one worker;
    those of several start anew. Raises FaultError where one of them was ended from outside.
    """
    assert settings.sweep is not None  # it has jobs
    if settings.sweep.workers == 1 or not jobs:
        for job in jobs:
            result = run_job(settings, simulate, job, folder, interrupts, job.journal_in(journal))
            if result is not None:
                on_result(result)
            if interrupts.signal is not None:
                return
        return
    context = get_context("spawn")
    stop = context.Event()
    workers = min(settings.sweep.workers, len(jobs))
    with _one_thread_each(), ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(stop, os.getpid())
    ) as pool:  # fmt: skip
        with interruption.held_back():  # a worker that is being started knows no signals yet
            futures = {pool.submit(_work, settings, simulate, job, folder) for job in jobs}
        try:
            _collect(futures, interrupts, stop.set, on_result)
        except BrokenProcessPool as error:
            raise FaultError(
                "a worker of the sweep was ended from outside, perhaps for want of memory; give "
                "fewer --sweep-workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _collect(
    futures: set[Future],
    interrupts: Interrupts,
    stop: Callable[[], None],
    on_result: Callable[[Result], None],
) -> None:
    """Hand over results as they come; after an interruption wait only for jobs that are running."""
    while futures:
        done, futures = wait(futures, LOOK, FIRST_COMPLETED)
        for future in done:
            result = future.result()
            if result is not None:
                on_result(result)
        if interrupts.signal is not None:
            stop()
            futures = {future for future in futures if not future.cancel()}


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within this context processes are started that compute in one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _begin(stop, parent: int) -> None:
    """Set a worker up: it ends with its parent, which alone is interrupted and passes that on."""
    die_with(parent)
    interruption.begin(started_by_another=True)
    torch.set_num_threads(1)
    _asked.signal = None

    def follow() -> None:
        stop.wait()
        _asked.signal = signal.SIGINT

    threading.Thread(target=follow, daemon=True).start()


def _work(settings: Settings, simulate: Simulate, job: Job, folder: Path) -> Result | None:
    """Run one job in a worker; None where it was interrupted or had not begun."""
    if _asked.signal is not None:
        return None
    return run_job(settings, simulate, job, folder, _asked)
