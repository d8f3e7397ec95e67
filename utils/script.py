"""Does what both scripts need around their work: folders, signals, exit codes, provenance."""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from utils import interruption
from utils.errors import FaultError, InputError, is_out_of_memory
from utils.files import package_folder, printable


def check_reachable(address: str, flag: str, seconds: float = 5.0) -> None:
    """Raise InputError, naming `flag`, unless HOST:PORT or ray://HOST:PORT accepts a connection.

    seconds: how long to wait for the connection.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"{flag} {address}: not of the form HOST:PORT or ray://HOST:PORT")
    try:
        with socket.create_connection((host, int(port)), seconds):
            return
    except OSError as error:
        raise InputError(f"{flag} {address}: cannot be reached ({error}); check it") from error


def writable_folder(path: str, flag: str) -> str:
    """Return folder `path` after checking that it exists or can be made; create nothing.

    Raises InputError, naming `flag`, if it is a file or there is no permission.
    """
    probe = os.path.abspath(path)
    while not os.path.lexists(probe):
        probe = os.path.dirname(probe)
    if not os.path.isdir(probe):
        raise InputError(f"{flag} {path}: {probe} is a file; name a folder")
    if not os.access(probe, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: no permission to write in {probe}; name another folder")
    return path


class Stop(Protocol):
    """Tells long work whether to end cleanly: on a signal, or when its time is over."""

    @property
    def should_stop(self) -> bool:
        """Whether to end now; asked wherever the work can end cleanly."""

    @property
    def stopped(self) -> bool:
        """Whether the work was asked to end, by a signal or by a true `should_stop`."""


class Interrupts:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; the second acts as usual.

    Signals that are ignored, such as SIGHUP under nohup, stay ignored. Use
    `with Interrupts() as interrupts:` and ask `interrupts.should_stop` wherever the work can end
    cleanly. It is a `Stop`. The end of the context restores the former handlers.
    """

    #: Number of the signal that came, or None.
    signal: int | None

    def __enter__(self):
        self.signal = None
        self._before = {number: signal.getsignal(number) for number in interruption.heeded()}
        for number_ in self._before:
            signal.signal(number_, self._request)
        return self

    @property
    def should_stop(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    @property
    def stopped(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def _request(self, number_, frame):
        self.signal = number_
        self._restore()

    def _restore(self):
        for number_, handler in self._before.items():
            signal.signal(number_, handler)

    def __exit__(self, *exc):
        self._restore()


def run_script(
    main: Callable[[list[str]], int | None],
    argv: list[str] | None = None,
    complain: Callable[[str], None] = interruption.print_line,
) -> int:
    """Call `main(argv)` and return the documented exit code.

    The code is 0 if `main` returned 0 or None, 2 for a refused input, 1 for a fault, and 128 + the
    signal's number for an interruption; another integer that `main` returns is the code itself.
    Refusals, faults and interruptions are one line each, which goes to `complain(line)`. With
    --traceback among the flags, the place in the code stands before that line.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        _refuse_lost_folder()
        return main(argv) or 0
    except SystemExit:  # of --help and --version
        raise
    except BaseException as error:
        came = interruption.end()
        if came is not None or isinstance(error, KeyboardInterrupt):
            complain(interruption.LINE)  # whatever else followed the signal is its consequence
            return 128 + (came or signal.SIGINT)
        code, line = _ending(error)
        if line is None:
            raise
        if "--traceback" in argv:
            traceback.print_exc()
        complain(printable(" ".join(line.splitlines())))  # names from files may have more
        return code
    finally:
        interruption.end()
        _flush_output()


def _ending(error: BaseException) -> tuple[int, str | None]:
    """Return the exit code of an error and the line that says it, None for a bug."""
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, FaultError | OSError):
        return 1, f"fault: {error}"
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        size = f", {asked[1]} more were asked for" if asked else ""
        return 1, (
            f"fault: out of memory{size}; take a smaller batch, smaller images or another device"
        )
    return 1, None


def _refuse_lost_folder() -> None:
    """Raise InputError if the working directory is gone: torch cannot be imported there."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError("the working directory is gone; change to a folder that exists") from error


def _flush_output() -> None:
    """Flush what is printed: Python would turn a closed or full output into exit code 120."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        interruption.silence("stdout")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    import numpy  # not above: both scripts answer --help and refuse flags before these seconds
    import torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": _torchvision_version(),
        "numpy": numpy.__version__,
    }


def _torchvision_version() -> str:
    """Read torchvision's `__version__` from its file: importing it takes about as long as torch."""
    text = (package_folder("torchvision") / "version.py").read_text()
    found = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    if found:
        return found[1]
    import torchvision  # of a release that keeps its number elsewhere

    return torchvision.__version__


def git_revision() -> str | None:
    """Return the commit of this checkout, with `+changes` if files differ; None outside git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
