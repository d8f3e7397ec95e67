"""Ends a script in one line on Ctrl-C, SIGTERM or a lost terminal, from its first moment on.

A script imports this file first. It imports nothing that takes time.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

#: What asks a run to end: Ctrl-C, the end of a job, a terminal that is gone.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: The line that says it.
LINE = "interrupted"


class _State:
    """What is known of this process's end."""

    #: Whether `begin` has set its handlers.
    begun = False
    #: Whether another process started this one, and says how it ended.
    started_by_another = False
    #: Number of the signal that ends this process, or None.
    came: int | None = None
    #: Whether Python's own end of this process may abort it.
    ends_on_the_spot = False
    #: Files that are worth nothing unless this process goes on.
    unfinished: set[str] = set()


def begin(*, started_by_another: bool = False) -> None:
    """Let a signal end this process in one line and with exit code 128 + its number.

    While modules are being imported the process ends on the spot: libraries do not expect an
    exception there. Else KeyboardInterrupt is raised, also for SIGTERM and SIGHUP, so that what
    the work has begun is tidied up; a second signal ends the process on the spot. Signals that
    whoever started the process had it ignore, such as SIGHUP under nohup, stay ignored.

    Standard streams that are closed lead nowhere from here on, since a file that is opened later
    would take their place. Letters that an output does not know are printed as escapes.

    started_by_another: whether this is one of several processes of a run. Such a process leaves its
    terminal's group, and says nothing when a signal ends it: the process that started it does.
    """
    _State.begun, _State.started_by_another = True, started_by_another
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if started_by_another:
        os.setpgrp()  # a terminal's Ctrl-C reaches the first process, which passes it on once
    for number in heeded():
        signal.signal(number, _interrupt)
    sys.excepthook, sys.unraisablehook = _uncaught, _unraisable
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def heeded() -> list[int]:
    """Return the SIGNALS that whoever started this process did not have it ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def end() -> int | None:
    """Heed no further signal: the work is done or given up. Return the signal that came, if any.

    Without `begin` this changes nothing.
    """
    if _State.begun:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    return _State.came


def end_on_the_spot() -> None:
    """Let `leave` end this process without Python's own end of it, from now on.

    For processes that were members of a group: torch.distributed leaves threads behind, and one
    that asks for the interpreter while that ends aborts a process whose work is done.
    """
    _State.ends_on_the_spot = True


def leave(code: int) -> NoReturn:
    """End this process with an exit code, after `run_script` has flushed what it printed."""
    if _State.ends_on_the_spot:
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within this context signals wait, also for processes that it starts until these `begin`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def unfinished(*paths: str) -> Iterator[None]:
    """Within this context, remove these files if a signal ends the process on the spot."""
    _State.unfinished.update(paths)
    try:
        yield
    finally:
        _State.unfinished.difference_update(paths)


def print_line(line: str) -> None:
    """Print to stderr, or nowhere if it is closed or full: the exit code must stay right."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence("stderr")


def silence(name: str) -> None:
    """Let sys.stdout or sys.stderr, whose output has failed, lead nowhere from now on."""
    setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _open_closed_streams() -> None:
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _interrupt(number: int, frame: FrameType | None) -> None:
    again, _State.came = _State.came is not None, number
    if again or _importing(frame):
        _leave(number)
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _leave(number: int) -> None:
    """End this process on the spot, without what it had begun to write."""
    for path in _State.unfinished:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if _State.started_by_another:  # which tells it from a process that ended in its own way
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    with contextlib.suppress(OSError):
        os.write(2, f"{LINE}\n".encode())
    os._exit(128 + number)


def _uncaught(kind, error, trace) -> None:
    """Print what ends the process; whatever follows a signal is its consequence."""
    if _State.came is not None:
        _leave(_State.came)
    sys.__excepthook__(kind, error, trace)


def _unraisable(unraisable) -> None:
    """Print an exception that Python cannot raise; do not lose an interruption that way."""
    if _State.came is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave(_State.came)
    sys.__unraisablehook__(unraisable)
