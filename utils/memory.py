"""How much memory this process may still take, and refusals and limits that follow from it."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from utils.errors import InputError

#: Files of Linux that say how much memory a container may hold and holds, newer kind first.
CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


#: Held while a limit is set.
_LIMITING = threading.RLock()


def free_memory() -> int | None:
    """Return the bytes that this process can still take; None where the system does not say.

    That is the least of what the machine has available, of what its container leaves, and of what
    the process's own limit of address space leaves.
    """
    found = [_available(), _left_in_container(), _left_by_limit()]
    known = [number for number in found if number is not None]
    return min(known, default=None)


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise InputError where `needed` bytes are more than this process can still take.

    what: what takes them, in words that follow "for". remedy: what to do instead.
    """
    free = free_memory()
    if free is not None and needed > free:
        raise InputError(
            f"needs at least {gibibytes(needed)} for {what}, and {gibibytes(free)} of memory are "
            f"free; {remedy}"
        )


def gibibytes(number: int) -> str:
    """Write a number of bytes in GiB."""
    return f"{number / 2**30:,.1f} GiB"


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Within this context the process can take only about `more` bytes beyond what it has.

    What asks for more, as a hostile file makes its reader do, meets a MemoryError, or torch's
    RuntimeError, before any memory is touched. The limit is the whole process's: other threads wait
    to set one of their own. Where the system has no such limit, none is set.
    """
    with _LIMITING:
        before = _set_limit(more)
        try:
            yield
        finally:
            if before is not None:
                import resource

                resource.setrlimit(resource.RLIMIT_AS, before)


def _set_limit(more: int) -> tuple[int, int] | None:
    """Set the limit of `limited_memory`; return the one before, None where there can be none."""
    try:
        import resource

        used = _address_space()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):  # Windows has no limits, and only Linux says what is used
        return None
    limit = used + more if soft == resource.RLIM_INFINITY else min(used + more, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    return soft, hard


def _available() -> int | None:
    """Return what the whole machine has available."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_container() -> int | None:
    for limit, usage in CONTAINER_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
            return max(0, int(Path(limit).read_text()) - int(Path(usage).read_text()))
    return None


def _left_by_limit() -> int | None:
    with contextlib.suppress(ImportError, OSError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            return max(0, soft - _address_space())
    return None


def _address_space() -> int:
    """Return the bytes of this process's address space; raise OSError where nothing says."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")
