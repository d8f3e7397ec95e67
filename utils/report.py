"""What a run tells: printed lines and log, progress, tables, run folder, result.json."""

import csv
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy
import torch
import torchvision
from prettytable import PrettyTable
from torch import Tensor
from tqdm import tqdm

from utils.cli import FaultError
from utils.files import free_stem, whole_file


class Reporter:
    """Prints lines and keeps them for a log file; lines from before `log_to` go there too.

    A closed output or a full disk silences it, but never ends the work it reports on.
    """

    def __init__(self):
        self._lines: list[str] = []
        self._path: Path | None = None

    def say(self, text: str = "") -> None:
        """Print `text` and log it."""
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # such as `| head` that has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        self._lines.append(text)
        if self._path is not None:
            self._flush()

    def log_to(self, path: str | Path) -> None:
        """Write the log to `path` from now on."""
        self._path = Path(path)
        self._flush()

    def _flush(self):
        try:
            with open(self._path, "a") as log:
                log.writelines(line + "\n" for line in self._lines)
            self._lines.clear()
        except OSError:
            pass  # the lines are kept for the next attempt


class Silent(Reporter):
    """The reporter of every process but the first."""

    def say(self, text: str = "") -> None:
        """Say nothing."""

    def log_to(self, path: str | Path) -> None:
        """Write nothing."""


class Progress:
    """Progress of `total` iterations: a bar on a terminal, else a line every `every` iterations."""

    def __init__(self, total: int, every: int, reporter: Reporter):
        self.total, self.every, self.reporter = total, every, reporter
        self.done = 0
        self.start = time.perf_counter()
        shown = sys.stderr.isatty() and not isinstance(reporter, Silent)
        self._bar = tqdm(total=total, unit="it") if shown else None

    def step(self, prefix: str, values: Mapping[str, float]) -> None:
        """Count one iteration; `prefix` and `values` are shown with it."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)
        elif self.done % self.every == 0 or self.done == self.total:
            seconds = time.perf_counter() - self.start
            left = seconds / self.done * (self.total - self.done)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.reporter.say(
                f"{prefix}  iteration {self.done}/{self.total}  {shown}  "
                f"{self.done / seconds:.1f} it/s  {duration(left)} left"
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def table(header: Sequence[str], rows: Sequence[Sequence], separated: int = 0) -> str:
    """A text table; floats with four digits, NaN as n/a; a line before the last `separated`."""
    pretty = PrettyTable(list(header), align="r")
    for i, row in enumerate(rows):
        pretty.add_row([_cell(v) for v in row], divider=i == len(rows) - separated - 1)
    return pretty.get_string()


def _cell(value) -> str:
    if isinstance(value, float):
        return "n/a" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def setting_lines(settings: Mapping) -> str:
    """Every setting, `name value` in columns sorted by name."""
    width = max(map(len, settings))
    return "\n".join(f"  {name:<{width}}  {settings[name]}" for name in sorted(settings))


def claim_folder(path: str | Path) -> Path:
    """Create folder `path`, or `path-2`, `path-3`, … where it exists, and return it.

    Raises FaultError when it cannot be created.
    """
    while True:
        free = Path(free_stem(str(path)))
        try:
            free.mkdir(parents=True)
            return free
        except FileExistsError:  # somebody else took the name in between
            continue
        except OSError as error:
            raise FaultError(f"{free} could not be created: {error.strerror}") from error


def write_json(content: Mapping, path: str | Path) -> None:
    """Write strict JSON, in which every number is finite.

    Raises ValueError, naming the entry, for one that is not: JSON has no word for it, so the
    caller says by `null_if_nan` or `null_unless_finite` where null stands for such a number, and
    the documentation what it means there.
    """
    text = json.dumps(_plain(content, ""), indent=1, allow_nan=False) + "\n"
    with whole_file(path, text=True) as file:
        file.write(text)


def _plain(value, place: str):
    if isinstance(value, Mapping):
        return {str(key): _plain(v, f"{place}/{key}") for key, v in value.items()}
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v, f"{place}/{i}") for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {value} has no meaning in JSON")
    return value


def null_if_nan(value):
    """`value`, of mappings and sequences, with None for NaN, which stands for "no value" here."""
    return _with_null(value, math.isnan)


def null_unless_finite(value):
    """`value`, of mappings and sequences, with None for NaN and infinities: it overflowed."""
    return _with_null(value, lambda number: not math.isfinite(number))


def _with_null(value, where: Callable[[float], bool]):
    if isinstance(value, Mapping):
        return {key: _with_null(v, where) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(v, where) for v in value]
    return None if isinstance(value, float) and where(value) else value


def write_csv(header: Sequence[str], rows: Sequence[Sequence], path: str | Path) -> None:
    """Write rows under a header."""
    with whole_file(path, text=True) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }


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


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU with torch's thread count."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
