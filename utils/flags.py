"""Defines the flag types and the parser that both scripts build on."""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from utils.errors import InputError

#: Of both scripts; CHANGELOG.md says what changed.
VERSION = "0.13.0"
#: Letter of a duration → seconds.
UNITS = {"s": 1, "m": 60, "h": 3600}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises one-line InputErrors and accepts no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )
        self.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
        self.add_argument(
            "--traceback",
            action="store_true",
            default=argparse.SUPPRESS,
            help="Print where in the code an input was refused, besides the one line.",
        )

    def error(self, message: str) -> NoReturn:
        """Raise InputError with `message` on one line."""
        raise InputError(" ".join(message.split()))


def integer_from(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a flag type that accepts integers from `low` to `high`."""

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
) -> Callable[[str], float]:
    """Return a flag type for finite numbers in [low, high], above `above` and below `below`."""

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


def duration_from(low: float, *, or_zero: bool = False) -> Callable[[str], float]:
    """Return a flag type for durations such as 90s, 5m or 1h, in seconds, from `low` seconds on.

    or_zero: whether 0 is accepted too, and a number of seconds without a letter.
    """

    def parse(text: str) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
        if found is None or not (found[2] or or_zero):
            raise argparse.ArgumentTypeError(
                f"'{text}' is no duration; give a number with s, m or h, like 5m"
            )
        seconds = float(found[1]) * UNITS[found[2] or "s"]
        if seconds < low and not (or_zero and seconds == 0):
            raise argparse.ArgumentTypeError(f"{text} is below {low:g}s; give more time")
        return seconds

    return parse


def mebibytes(text: str) -> float:
    """Return the MiB of a size such as 20GiB, 512MiB or 512 (a flag type)."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)(MiB|GiB)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no size of memory; give one such as 20GiB, 512MiB or 512"
        )
    value = float(found[1]) * (1024 if found[2] == "GiB" else 1)
    if not 0 < value <= 1e12:
        raise argparse.ArgumentTypeError(
            f"{text} is out of range; give more than 0 and at most 1e12"
        )
    return value


def file_name(text: str) -> str:
    """Return `text` if it can be part of a file name (a flag type)."""
    if os.sep in text or text in ("", ".", "..") or len(text.encode()) > 100:
        raise argparse.ArgumentTypeError(
            f"'{text[:120]}' is part of a file name: give 1 to 100 characters without {os.sep}"
        )
    return text


def add_process_flags(parser: argparse.ArgumentParser):
    """Add the flags by which both scripts run in several processes; return the group's adder."""
    add = parser.add_argument_group("several processes").add_argument
    add(
        "--multiprocessing-distributed",
        action="store_true",
        help="Start one process per GPU on every node.",
    )
    add(
        "--nproc",
        type=integer_from(1, 1024),
        help="Processes on this node. Without it: one, or one per GPU with the flag above.",
    )
    add("--world-size", type=int, default=-1, help="Number of nodes; -1 is this one alone.")
    add("--rank", type=int, default=-1, help="Number of this node; -1 is 0.")
    add(
        "--dist-url",
        help="Where processes meet: tcp://HOST:PORT of node 0, or env://. Without it: a free "
        "local port.",
    )
    add("--dist-backend", choices=("nccl", "gloo"), help="Without it: nccl with CUDA, else gloo.")
    return add


@dataclass(frozen=True)
class ProcessSettings:
    """Which processes a command line asks for; the fields have the names of their flags."""

    multiprocessing_distributed: bool
    nproc: int | None
    world_size: int
    rank: int
    dist_url: str | None
    dist_backend: str | None
    gpu: int | None
    #: Every flag with its value: processes that share work compare what they were given.
    record: Mapping[str, object]


def process_settings(args: argparse.Namespace) -> ProcessSettings:
    """Return what the flags of `add_process_flags`, and --gpu, ask for."""
    return ProcessSettings(
        args.multiprocessing_distributed,
        args.nproc,
        args.world_size,
        args.rank,
        args.dist_url,
        args.dist_backend,
        args.gpu,
        record=vars(args),
    )
