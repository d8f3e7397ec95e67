"""Prints what a run reports: lines and their log, progress, tables."""

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from prettytable import PrettyTable
from tqdm import tqdm

from utils.files import printable
from utils.interruption import silence


class Reporter:
    """Prints lines and writes them to a log file, with those printed before `log_to`.

    A closed output or a full disk silences the reporter but never ends the run.
    """

    def __init__(self):
        self._lines: list[str] = []
        self._path: Path | None = None

    def say(self, text: str = "") -> None:
        """Print `text` and log it; what names from files may hold beside letters is escaped."""
        text = "\n".join(map(printable, text.split("\n")))
        try:
            try:
                tqdm.write(text, file=sys.stdout)
            except UnicodeEncodeError:  # an output that knows few letters, and a file's name
                known = text.encode(sys.stdout.encoding, "backslashreplace")
                tqdm.write(known.decode(sys.stdout.encoding), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):  # such as `| head` that has seen enough
            silence("stdout")
        self._lines.append(text)
        self._flush()

    def log_to(self, path: str | Path) -> None:
        """Write the log to `path` from now on."""
        self._path = Path(path)
        self._flush()

    def _flush(self) -> None:
        if self._path is None:
            return
        text = "".join(line + "\n" for line in self._lines).encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError), open(self._path, "ab", buffering=0) as log:
            before = log.tell()
            if log.write(text) == len(text):
                self._lines.clear()
            else:  # the disk is full: whole lines or none; they are kept for the next attempt
                log.truncate(before)


class Silent(Reporter):
    """The reporter of every process except the first: it prints and writes nothing."""

    def say(self, text: str = "") -> None:
        """Print nothing."""

    def log_to(self, path: str | Path) -> None:
        """Write nothing."""


class Progress:
    """Shows the progress of `total` iterations.

    On a terminal it shows a bar, elsewhere it prints one line every `every` iterations.
    """

    def __init__(self, total: int, every: int, reporter: Reporter):
        self.total, self.every, self.reporter = total, every, reporter
        self.done = 0
        self.start = time.perf_counter()
        shown = sys.stderr.isatty() and not isinstance(reporter, Silent)
        self._bar = tqdm(total=total, unit="it") if shown else None

    def step(self, prefix: str, values: Mapping[str, float]) -> None:
        """Count one iteration and show it with `prefix` and `values` (name → value)."""
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
    """Write seconds as h:mm:ss, or m:ss below one hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def table(header: Sequence[str], rows: Sequence[Sequence], separated: int = 0) -> str:
    """Lay out a text table: floats with four digits, NaN as n/a.

    A horizontal line sets the last `separated` rows apart.
    """
    pretty = PrettyTable(list(header), align="r")
    for i, row in enumerate(rows):
        pretty.add_row([_cell(v) for v in row], divider=i == len(rows) - separated - 1)
    return pretty.get_string()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "n/a" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def setting_lines(settings: Mapping) -> str:
    """List all settings, one `name value` per line, in columns and sorted by name."""
    width = max(map(len, settings))
    return "\n".join(f"  {name:<{width}}  {settings[name]}" for name in sorted(settings))
