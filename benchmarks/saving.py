"""Measures what saving a run costs: runs with and without saves, in turn.

    python -m benchmarks.saving --csv docs/rows/saving.csv

Every pair of runs is one attack in one process: with `--save-every` at the interval named and with
none. What a save costs does not depend on the interval, so its seconds are told by the difference
of the pair's attack times per save, and as a share of the default interval.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import run
import training
from inversion.audit.flags import parser as attack_parser
from utils.console import table
from utils.files import write_csv
from utils.journal import FolderJournal
from utils.script import run_script

#: Interval of the measured runs, in seconds: many saves in a short run.
EVERY = 0.5
#: Name → flags of the capture, iterations.
CASES = {
    "lenet 32 px B 8": (["--arch", "lenet", "--image-size", "32", "--batch-size", "8"], 1200),
    "ResNet-18 32 px B 8": (["--arch", "resnet18", "--image-size", "32", "--batch-size", "8"], 24),
    "ResNet-18 64 px B 16": (["--arch", "resnet18", "--image-size", "64", "--batch-size", "16"], 5),
}
ATTACK = ["--lr", "0.05", "--TV", "1e-4", "--grad-sign", "--input-boxed", "--min-grads-loss"]


def main() -> None:
    """Run all pairs, print and write the rows."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    default = attack_parser().parse_args([]).save_every
    rows = []
    for name, (capture, steps) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            script(training.main, ["--data-name", "photos", *capture, "--results", folder])
            (checkpoint,) = Path(folder).glob("*.pth.tar")
            flags = [*ATTACK, "--epochs", str(steps), "--checkpoint", str(checkpoint)]
            pairs = [pair(flags, Path(folder), number) for number in range(args.pairs + 1)][1:]
        of_a_save = [(saved - unsaved) / saves for saved, unsaved, saves, _ in pairs]
        median = statistics.median(of_a_save)
        within = statistics.median(inside for *_, inside in pairs)
        rows.append(
            [name, steps, round(statistics.median(p[1] for p in pairs), 2),
             round(statistics.median(p[2] for p in pairs)), round(1e3 * median, 1),
             round(1e3 * within, 1), f"{100 * max(median, within) / default:.4f}"]
        )  # fmt: skip
        print(rows[-1], flush=True)
    header = [
        "run", "iterations", "seconds", "saves", "ms_per_save_by_difference",
        "ms_per_save_inside", "percent_at_default",
    ]  # fmt: skip
    print(table(header, rows))
    if args.csv:
        write_csv(header, rows, args.csv)


def pair(flags: list[str], folder: Path, number: int) -> tuple[float, float, int, float]:
    """Run with saves and without.

    Returns the seconds of both attacks, the number of saves, and the seconds per save that passed
    within `FolderJournal.save`.
    """
    taken: list[float] = []
    save = FolderJournal.save

    def timed(journal: FolderJournal) -> None:
        start = time.perf_counter()
        save(journal)
        taken.append(time.perf_counter() - start)

    seconds = {}
    for every in (EVERY, 0) if number % 2 else (0, EVERY):
        FolderJournal.save = timed  # type: ignore[method-assign, assignment]
        try:
            words = [*flags, "--root", str(folder), "--id", f"{number}-{every}"]
            script(run.main, [*words, "--save-every", str(every)])
        finally:
            FolderJournal.save = save  # type: ignore[method-assign]
        result = folder / "results" / "exp" / f"{number}-{every}" / "result.json"
        seconds[every] = json.loads(result.read_text())["seconds"]
    return seconds[EVERY], seconds[0], max(1, len(taken)), sum(taken) / max(1, len(taken))


def script(main, flags: list[str]) -> None:
    """Run a script's main in this process, in silence; raise where it fails."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert run_script(main, flags) == 0


if __name__ == "__main__":
    main()
