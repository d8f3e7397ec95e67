"""Prints the tables of docs/sweep.md from finished sweeps and draws them, a panel per sweep.

    python -m benchmarks.defences_table FOLDER [FOLDER ...] --picture FILE

A folder holds a sweep.json and gives its panel its name. A file from before it had `lowest_control`
is drawn without the bands of the controls.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from inversion.audit.sweep.picture import Panel, save_sweeps
from inversion.audit.sweep.table import rows_of, sweep_cells


def panel(folder: Path) -> Panel:
    """Read the sweep of a folder."""
    record = json.loads((folder / "sweep.json").read_text())
    return Panel(record["parameter"], record["values"], rows_of(record), folder.resolve().name)


def markdown(of: Panel) -> str:
    """Return the table of a sweep in Markdown; columns in which every value has none are left out.

    A column of none says nothing that the page does not say once.
    """
    header, lines = sweep_cells(of.parameter, of.values, of.rows)
    kept = [k for k in range(len(header)) if any(line[k] not in ("", "none") for line in lines)]
    table = [header, ["---"] * len(header), *lines]
    cells = [[line[k].replace("|", "\\|") for k in kept] for line in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main(words: Sequence[str] | None = None) -> None:
    """Print a table per folder and draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of sweep.json")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    args = parser.parse_args(words)
    panels = [panel(folder) for folder in args.folders]
    for one in panels:
        print(f"{one.title}:\n\n{markdown(one)}\n")
    if args.picture is not None:
        save_sweeps(panels, args.picture)


if __name__ == "__main__":
    main()
