"""What both scripts share at the border to the user: refusals, flag types, device, exit codes."""

import argparse
import math
import os
import signal
import socket
import sys

import torch


class InputError(ValueError):
    """A refused input. Its text is one line: the flag or file, the value, what to do."""


class FaultError(RuntimeError):
    """Something outside the user's input went wrong, such as a full disk."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and which takes no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def error(self, message):
        """Refuse the command line."""
        raise InputError(" ".join(message.split()))


def integer_from(low: int, high: int = 2**31 - 1):
    """A flag type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is below {low}; give {low} or more")
        if value > high:
            raise argparse.ArgumentTypeError(f"{value} is above {high}; give {high} or less")
        return value

    return parse


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
):
    """A flag type: a finite number in [low, high], strictly above `above` and below `below`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} must be above {above:g}")
        if below is not None and value >= below:
            raise argparse.ArgumentTypeError(f"{text} must be below {below:g}")
        if not low <= value <= high:
            allowed = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {allowed}")
        return value

    return parse


def choose_device(gpu: int | None, local_rank: int = 0) -> torch.device:
    """The device of `--gpu`: that GPU, else number `local_rank` (in turn), else the CPU.

    TensorFloat-32 is switched off: it rounds inputs to 10 bits, and a gradient match below
    about 1e-3 would measure that rounding.
    """
    torch.backends.cudnn.allow_tf32 = False
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None and count == 0:
        raise InputError(f"--gpu {gpu}: no CUDA device here; leave --gpu out to run on the CPU")
    if gpu is not None and not 0 <= gpu < count:
        raise InputError(f"--gpu {gpu}: this machine has GPUs 0 to {count - 1}")
    if count == 0:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % count if gpu is None else gpu)
    torch.cuda.set_device(device)  # where collectives look
    return device


def file_name(text: str) -> str:
    """A flag type: something that can be part of a file's name."""
    if os.sep in text or text in ("", ".", "..") or len(text.encode()) > 100:
        raise argparse.ArgumentTypeError(
            f"'{text[:120]}' is part of a file name: give 1 to 100 characters without {os.sep}"
        )
    return text


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch raised `error` because memory ran out, on the GPU or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(
        phrase in text for phrase in ("out of memory", "can't allocate memory")
    )


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
