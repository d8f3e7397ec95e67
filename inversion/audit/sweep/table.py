"""The rows of a sweep as one table, one CSV file and one JSON file."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from inversion.audit.sweep.row import Row
from inversion.audit.verdict import LEAKAGE_DIGITS, NOT_ARRIVED, NOT_SHOWN, STRENGTH
from utils.console import table

#: Columns of the table before those of the verdict.
HEADER = (
    "epsilon", "any attacker", "cosine", "labels %", "identified", "leakage max", "leakage mean",
    "PSNR dB", "SSIM",
)  # fmt: skip
#: Columns of sweep.csv that are fields of a row.
FIELDS = (
    "value", "repeat", "batch_size", "epsilon", "candidates", "cosine", "label_accuracy",
    "label_method", "tv", "metric", "deepest", "certified", "p", "smallest_p", "verdict", "reason",
    "seconds",
)  # fmt: skip


def sweep_table(parameter: str, values: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the table of a sweep as text; see `sweep_cells`."""
    return table(*sweep_cells(parameter, values, rows))


def sweep_cells(
    parameter: str, values: Sequence[str], rows: Sequence[Row]
) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of a sweep: one per value, a mean with its range over the repeats.

    rows: those that are done, in any order.
    """
    layerwise = any(row.certified is not None for row in rows)
    header = [parameter, *HEADER, *(["deepest certified"] if layerwise else []), "verdict"]
    lines = []
    for value in values:
        of_value = [row for row in rows if row.value == value]
        lines.append([value, *_cells(of_value, layerwise)])
    return header, lines


def _cells(rows: Sequence[Row], layerwise: bool) -> list[str]:
    """Return the cells of one value after its name."""
    done = [row for row in rows if row.reason is None]
    why = why_none(rows)
    if why is not None:
        return [""] * (len(HEADER) + layerwise) + [why]
    metric = next(row.metric for row in done)
    digits = LEAKAGE_DIGITS.get(str(metric), 3)
    leaks = [row.leakage for row in done if row.leakage]
    cells = [
        epsilon_cell(done[0]),
        bound_cell(done[0]),
        _spread([row.cosine for row in done], 3),
        _spread([None if row.label_accuracy is None else 100 * row.label_accuracy
                 for row in done], 0),
        _identified(done),
        _spread([max(values) for values in leaks], digits),
        _spread([float(np.mean(values)) for values in leaks], digits),
        _spread([_mean(row.scores.get("psnr")) for row in done], 1),
        _spread([_mean(row.scores.get("ssim")) for row in done], 3),
    ]  # fmt: skip
    if layerwise:
        cells.append(", ".join(dict.fromkeys(row.deepest or "none" for row in done)))
    return [*cells, verdict_cell(rows)]


def epsilon_cell(row: Row) -> str:
    """Write the ε of a client's protection, or "none"."""
    return "none" if row.epsilon is None else f"{row.epsilon:.3g}"


def bound_cell(row: Row) -> str:
    """Write the bound on what any attacker identifies, or "none"."""
    return "none" if row.bound is None else f"≤ {row.bound:.2g}"


def why_none(rows: Sequence[Row]) -> str | None:
    """Say why none of a value's rows has a verdict; None where one has."""
    if any(row.reason is None for row in rows):
        return None
    return str(next((row.reason for row in rows), "not run"))[:60]


def verdict_cell(rows: Sequence[Row]) -> str:
    """Write the strongest verdict of the repeats, and how many of them have it.

    Beside "no leakage shown" stands how many of these attacks by matching did not arrive.
    """
    found = [row.verdict for row in rows if row.verdict is not None]
    strongest = min(found, key=STRENGTH.index)
    notes = [] if len(rows) == 1 else [f"{found.count(strongest)} of {len(rows)}"]
    stuck = sum(
        row.verdict == NOT_SHOWN and row.arrived is False and row.certified is None for row in rows
    )
    if strongest == NOT_SHOWN and stuck:
        which = "" if stuck == len(found) else f"{stuck} "
        notes.append(f"{which}did not arrive")
    return f"{strongest} ({', '.join(notes)})" if notes else strongest


def _identified(rows: Sequence[Row]) -> str:
    images = sum(row.batch_size or 0 for row in rows)
    return f"{sum(len(row.identified) for row in rows)} of {images}"


def _mean(values: Sequence[float] | None) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(values: Sequence[float | None], digits: int) -> str:
    """Write a mean, with the lowest and highest value where they differ; "n/a" without values."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    if not known:
        return "n/a"
    mean, low, high = (f"{v:.{digits}f}" for v in (np.mean(known), min(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"


def csv_table(parameter: str, rows: Sequence[Row]) -> tuple[list[str], list[list]]:
    """Return the header and the lines of sweep.csv, one per value and repeat."""
    summaries: dict[str, Callable[[Row], object]] = {
        "mu": lambda row: row.mu,
        "bound": lambda row: row.bound,
        "identified": lambda row: len(row.identified),
        "leakage_max": lambda row: max(row.leakage, default=None),
        "leakage_mean": lambda row: _mean(row.leakage),
        "psnr": lambda row: _mean(row.scores.get("psnr")),
        "ssim": lambda row: _mean(row.scores.get("ssim")),
        "control_psnr": lambda row: _mean(row.controls.get("psnr")),
        "control_ssim": lambda row: _mean(row.controls.get("ssim")),
        "client": lambda row: row.client,
    }
    lines = []
    for row in rows:
        values = [getattr(row, name) for name in FIELDS] + [of(row) for of in summaries.values()]
        lines.append([parameter, *("" if _empty(v) else v for v in values)])
    return ["parameter", *FIELDS, *summaries], lines


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def entries(rows: Sequence[Row]) -> list[Mapping]:
    """Return the rows as entries of sweep.json."""
    return [asdict(row) for row in rows]


def rows_of(record: Mapping) -> list[Row]:
    """Return the rows of a sweep.json, as its content was read.

    A file without `arrived` says by the sentence that an attack did not arrive.
    """
    found = []
    for entry in record["rows"]:
        row = Row(**{**entry, "scores": _numbers(entry["scores"]),
                     "controls": _numbers(entry["controls"])})  # fmt: skip
        if row.arrived is None and NOT_ARRIVED in (row.sentence or ""):
            row = replace(row, arrived=False)
        found.append(row)
    return found


def _numbers(of_metrics: Mapping) -> dict[str, list[float]]:
    """Put NaN where sweep.json has null."""
    return {
        name: [math.nan if value is None else value for value in values]
        for name, values in of_metrics.items()
    }
