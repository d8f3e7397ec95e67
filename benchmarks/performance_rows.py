"""Reads committed rows and puts them into sentences and tables of docs/performance.md."""

import csv
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]
#: Longest line of a sentence.
WIDTH = 110


def read(folder: Path, name: str) -> list[Row]:
    """Return the rows of a CSV file; none where it is missing."""
    path = folder / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def groups(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Put rows that agree in the columns together, in the order of the first of each."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def numbers(rows: Iterable[Row], column: str) -> list[float]:
    """Return what stands in a column, without empty cells."""
    return [float(row[column]) for row in rows if row.get(column)]


def median(values: Sequence[float]) -> float:
    """Return the median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, lower and upper quartile."""
    if len(values) < 2:
        return (median(values),) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def figure(value: float, digits: int = 3) -> str:
    """Write a number with so many digits, never as a power of ten; a dash for none."""
    if value != value:
        return "–"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    whole = len(str(int(abs(rounded))))
    after = max(0, digits - whole) if abs(rounded) >= 1 else None
    if after is None:
        return f"{rounded:.{digits + 3}f}".rstrip("0")
    return f"{rounded:,.{after}f}"


def spread(middle: float, low: float, high: float, digits: int = 3) -> str:
    """Write a median with its quartiles."""
    if low == middle == high or low != low:
        return figure(middle, digits)
    return f"{figure(middle, digits)} ({figure(low, digits)}–{figure(high, digits)})"


def percent(share: float) -> str:
    """Write a share in per cent."""
    return "–" if share != share else f"{100 * share:.0f} %"


def verdict(middle: float, low: float, high: float) -> str:
    """Say whether ratios of times show a difference: their quartiles lie on one side of 1."""
    if middle != middle:
        return "not comparable"
    if low == high:
        return "not repeated"
    if high < 1:
        return "faster"
    if low > 1:
        return "slower"
    return "not clearly different"


def paragraph(*sentences: str) -> str:
    """Wrap sentences as one paragraph."""
    text = " ".join(sentence for sentence in sentences if sentence)
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Make a table."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def missing(name: str) -> str:
    """Return the sentence for a file without rows."""
    if name.startswith("gpu"):
        return f"Not measured on a GPU: there is no `docs/rows/{name}`."
    return f"Not measured: there is no `docs/rows/{name}`."
