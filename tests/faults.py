"""What the world does to a running script: signals at chosen moments, full disks, lost rights.

    with started(tmp_path, "run.py", "--checkpoint", path, …) as process:
        process.end_by(signal.SIGKILL, when=said("iteration 40/"))
        outcome = process.outcome()

A moment is a function of a `Process`, and tells whether it has come.
"""

import contextlib
import ctypes
import errno
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support import HANG, ROOT, Outcome
from utils import console, files
from utils.interruption import SIGNALS

#: How often a process is looked at while a moment is waited for, in seconds.
LOOK = 0.002


class Process:
    """A script that runs in a process group of its own, with its output in files."""

    def __init__(self, popen: subprocess.Popen, out: Path, err: Path):
        self.popen, self._out, self._err = popen, out, err
        self.pid, self.began = popen.pid, time.monotonic()

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def wait(self, when: Callable[["Process"], bool]) -> None:
        """Return when the moment has come; fail where the process ends before, or hangs."""
        while not when(self):
            assert self.popen.poll() is None, f"it ended before: {self.out}\n{self.err}"
            assert time.monotonic() - self.began < HANG, f"nothing happened: {self.out}"
            time.sleep(LOOK)

    def end_by(self, number: int, when: Callable[["Process"], bool], *, group: bool = False):
        """Send a signal at a moment: to the script, or as a terminal does to its whole group."""
        self.wait(when)
        (os.killpg if group else os.kill)(self.pid, number)

    def outcome(self) -> Outcome:
        """Wait for the end; return exit code (−n: ended by signal n) and what was printed."""
        code = self.popen.wait(HANG)
        return Outcome(code, self.out, self.err)


@contextlib.contextmanager
def started(
    folder: Path,
    *command,
    env: dict | None = None,
    cwd: Path = ROOT,
    closed: Sequence[int] = (),
    full: Sequence[int] = (),
    prepare: Callable[[], None] = lambda: None,
) -> Iterator[Process]:
    """Start `python command…` and end it, with all its processes, at the end of the context.

    folder: where its output is kept. env: the whole environment; without it this one's. closed,
    full: numbers of streams (1 stdout, 2 stderr) that are closed, or lead to a full disk. prepare:
    called in the new process before anything else.
    """
    number = len(list(folder.glob("*.stdout")))
    out, err = folder / f"{number}.stdout", folder / f"{number}.stderr"
    if command[0] in ("run.py", "training.py"):
        command = (ROOT / command[0], *command[1:])

    def begin():
        for number in SIGNALS:  # whoever runs the tests may have them ignored, as nohup does
            signal.signal(number, signal.SIG_DFL)
        for stream in closed:
            os.close(stream)
        for stream in full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
        prepare()

    with open(out, "wb") as to_out, open(err, "wb") as to_err:
        popen = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.DEVNULL, stdout=to_out, stderr=to_err, cwd=cwd, env=env,
            start_new_session=True, preexec_fn=begin,  # noqa: PLW1509
        )  # fmt: skip
    try:
        yield Process(popen, out, err)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait(HANG)


def finished(folder: Path, *command, **options) -> Outcome:
    """Start a script as `started` does, and return how it ended."""
    with started(folder, *command, **options) as process:
        return process.outcome()


# Moments ------------------------------------------------------------------------------------


def said(text: str) -> Callable[[Process], bool]:
    """When the script has printed a text."""
    return lambda process: text in process.out


def appears(folder: Path, pattern: str, count: int = 1) -> Callable[[Process], bool]:
    """When so many files of a pattern are in a folder."""
    return lambda process: len(list(folder.glob(pattern))) >= count


def heeds_signals(process: Process) -> bool:
    """When the script's own code has begun, and with it the handlers of its signals."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def later(seconds: float, than: Callable[[Process], bool] = heeds_signals):
    """When so many seconds have passed since another moment."""
    came: list[float] = []

    def when(process):
        if not came and than(process):
            came.append(time.monotonic())
        return bool(came) and time.monotonic() - came[0] >= seconds

    return when


def random_moment(seed: int, within: float, than: Callable[[Process], bool] = heeds_signals):
    """When a random part of `within` seconds has passed since another moment."""
    return later(random.Random(seed).uniform(0, within), than)


# Disks and rights ---------------------------------------------------------------------------


class SmallDisk:
    """Takes so many bytes and is full from then on; what is removed frees nothing."""

    def __init__(self, size: int):
        self.left = size

    def open(self, path, mode="r", buffering=-1, **options):
        """Open a file as the builtin does; what is written to it goes to this disk."""
        if "b" not in mode or "r" in mode:
            return open(path, mode, buffering, **options)
        raw = _OnSmallDisk(path, mode.replace("b", ""))
        raw.disk = self
        return raw if buffering == 0 else io.BufferedWriter(raw)


class _OnSmallDisk(io.FileIO):
    disk: SmallDisk

    def write(self, data):
        size = memoryview(data).nbytes
        if size and not self.disk.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(memoryview(data).cast("B")[: self.disk.left])
        self.disk.left -= taken
        return taken


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[SmallDisk]:
    """Within this context, what this process writes goes to a disk of `size` bytes."""
    disk = SmallDisk(size)
    with pytest.MonkeyPatch.context() as patch:
        for module in (files, console):
            patch.setattr(module, "open", disk.open, raising=False)
        yield disk


def small_files(size: int) -> Callable[[], None]:
    """For `prepare`: every file ends at `size` bytes, beyond which a write fails (EFBIG)."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_privileges() -> None:
    """For `prepare`: rights of files bind this process, even one of the superuser."""
    overrides_rights, drop = 1, 24  # CAP_DAC_OVERRIDE, PR_CAPBSET_DROP
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(drop, overrides_rights):
        raise OSError(ctypes.get_errno(), "the superuser's privileges cannot be given up")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Within this context nothing can be written in a folder by `without_privileges`."""
    before = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        yield folder
    finally:
        folder.chmod(before)


# What is left -------------------------------------------------------------------------------


def damaged(folder: Path) -> list[str]:
    """Names of files below a folder that are not whole, and of temporary ones."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            if path.name.startswith(files.TEMPORARY) or path.name.endswith(files.CLAIM):
                raise ValueError("left behind")
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix in (".pth", ".tar"):
                torch.load(path, weights_only=True)
            elif not path.read_bytes().endswith(b"\n"):
                raise ValueError("its last line is not whole")
        except (ValueError, OSError, RuntimeError, SyntaxError) as error:
            found.append(f"{path.name}: {error}")
    return found
