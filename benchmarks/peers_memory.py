"""Measures the memory of one method's iteration, in a process of its own."""

import ctypes
import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

#: Files of Linux: what a process takes, and where it forgets the most that it took.
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_a_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Return what a function of a module returns in a process that did nothing before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def resident_above_start(step: Callable[[], object]) -> float | None:
    """Return by how many MiB the resident memory rises at most while `step` runs, from before it.

    What is free in the process is given back first, so that it cannot hide a rise. None where the
    system does not tell (other than Linux).
    """
    if not FORGET.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    FORGET.write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    """Return an entry of the process's status, in KiB."""
    found = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def allocated_above_start(step: Callable[[], object]) -> float:
    """Return how many MiB torch holds at most while `step` runs, above what it held before it.

    All allocations and releases on the CPU are recorded. What a kernel takes past torch's
    allocator is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = highest = 0
    for _, change in sorted(changes, key=lambda moment: moment[0]):
        held += change
        highest = max(highest, held)
    return highest / 2**20


def costliest(step: Callable[[], object], count: int) -> Sequence[tuple[str, int, float]]:
    """Return the operators that take most of a step's time: name, calls, share of the time."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    found = [(e.key, e.count, e.self_cpu_time_total) for e in record.key_averages()]
    whole = sum(time for _, _, time in found)
    found.sort(key=lambda row: -row[2])
    return [(name, calls, time / whole) for name, calls, time in found[:count]]
