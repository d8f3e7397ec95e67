"""Does what both scripts need around their work: folders, signals, exit codes, provenance."""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Protocol

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
    """Turns the first Ctrl-C or SIGTERM into a request to stop; the second acts as usual.

    Use `with Interrupts() as interrupts:` and ask `interrupts.should_stop` wherever the work can
    end cleanly. It is a `Stop`. The end of the context restores the former handlers.
    """

    #: Number of the signal that came, or None.
    signal: int | None

    def __enter__(self):
        self.signal = None
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
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


def run_script(main, argv: list[str] | None = None, complain=None) -> int:
    """Call `main(argv)` and return the documented exit code.

    The code is 0 if `main` returned 0 or None, 2 for a refused input, 1 for a fault, and 130 for an
    interruption; another integer that `main` returns is the code itself. Refusals and faults are
    one line each, which goes to `complain(line)`, or to stderr without it. With --traceback among
    the flags, the place in the code stands before that line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if complain is None:

        def complain(line):
            print(line, file=sys.stderr)

    try:
        return main(argv) or 0
    except InputError as error:
        if "--traceback" in argv:
            traceback.print_exc()
        complain(f"error: {printable(' '.join(str(error).splitlines()))}")  # names from files
        return 2
    except (FaultError, OSError) as error:
        if "--traceback" in argv:
            traceback.print_exc()
        complain(f"fault: {error}")
        return 1
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            complain("fault: out of memory; take a smaller batch, smaller images or another device")
            return 1
        raise
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


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
