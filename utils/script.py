"""What both scripts do around their work: folders, signals, exit codes, provenance."""

import importlib.util
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from utils.errors import FaultError, InputError, is_out_of_memory


def check_reachable(address: str, flag: str, seconds: float = 5.0) -> None:
    """Raise InputError, naming `flag`, unless something listens at HOST:PORT or ray://HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"{flag} {address}: not of the form HOST:PORT or ray://HOST:PORT")
    try:
        with socket.create_connection((host, int(port)), seconds):
            return
    except OSError as error:
        raise InputError(f"{flag} {address}: cannot be reached ({error}); check it") from error


def writable_folder(path: str, flag: str) -> str:
    """Check, without creating anything, that folder `path` exists or can be made; return it."""
    probe = os.path.abspath(path)
    while not os.path.lexists(probe):
        probe = os.path.dirname(probe)
    if not os.path.isdir(probe):
        raise InputError(f"{flag} {path}: {probe} is a file; name a folder")
    if not os.access(probe, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: no permission to write in {probe}; name another folder")
    return path


class Interrupts:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second acts as usual.

    `with Interrupts() as interrupts:` and ask `interrupts.signal` (None, or the signal's
    number) wherever work can end cleanly. The handlers of before come back at the end.
    """

    def __enter__(self):
        self.signal = None
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for number_ in self._before:
            signal.signal(number_, self._request)
        return self

    def _request(self, number_, frame):
        self.signal = number_
        self._restore()

    def _restore(self):
        for number_, handler in self._before.items():
            signal.signal(number_, handler)

    def __exit__(self, *exc):
        self._restore()


def run_script(main, argv: list[str] | None = None, complain=None) -> int:
    """Call `main(argv)` and turn what it raises into the documented exit codes.

    0 done, 2 a refused input (one line on stderr), 1 a fault, 130 interrupted. An integer
    that `main` returns is the exit code itself. complain(line): instead of stderr.
    """
    if complain is None:

        def complain(line):
            print(line, file=sys.stderr)

    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except InputError as error:
        complain(f"error: {' '.join(str(error).splitlines())}")  # names from files may have more
        return 2
    except (FaultError, OSError) as error:
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
    """Return the versions of what a result depends on, by package."""
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
    spec = importlib.util.find_spec("torchvision")
    text = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    if found:
        return found[1]
    import torchvision  # of a release that keeps its number elsewhere

    return torchvision.__version__


def git_revision() -> str | None:
    """Commit of this project's checkout, with `+changes` when it differs; None outside git."""
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
