"""Kills runs at random moments and lets them go on: are the images those of a whole run?

    python -m benchmarks.kills --csv docs/rows/kills.csv

Every case is first run whole. Then run.py is started again and ended by SIGKILL after a random part
of the whole run's time; it goes on by --resume, and every third time it is killed once more on the
way. The rows say how far it had come, what the last save held, and how far the final images are
from those of the whole run. Progress is read from the log, of which every iteration is a line.
"""

import argparse
import itertools
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from inversion.audit.beginning import STATE
from utils.console import table
from utils.files import write_csv
from utils.journal import FolderJournal, consolidate

ROOT = Path(__file__).resolve().parent.parent
#: Of the runs: a kill loses at most this many seconds, and the step that was on its way.
SAVE_EVERY = 0.5
MATCHING = shlex.split(
    "--lr 0.05 --TV 1e-4 --grad-sign --input-boxed --min-grads-loss --print-freq 1 --metric "
    "--MinCombine --n-seed 2 --T-in 60"
)


@dataclass(frozen=True)
class Case:
    """Describes what is killed."""

    name: str
    #: Flags of training.py and of run.py.
    capture: Sequence[str]
    attack: Sequence[str]
    #: Kills, and flags of the processes that go on; several take turns.
    kills: int
    going_on: Sequence[Sequence[str]] = ((),)


LENET = shlex.split("--data-name photos --arch lenet --image-size 16 --batch-size 4 --with-control")
RESNET = shlex.split(
    "--data-name photos --arch resnet18 --image-size 32 --batch-size 2 --with-control --upload-bn"
)
TWO = ("--nproc", "2")
ONE_OR_TWO: Sequence[Sequence[str]] = (("--nproc", "1"), TWO)
CASES = (
    Case("MLCO, 2 seeds, controls", LENET, (*MATCHING, "--epochs", "600"), 14),
    Case("layerwise, control", RESNET, ("--attack", "layerwise", "--metric"), 6),
    Case("2 processes, a batch", LENET, (*MATCHING, "--epochs", "300", *TWO), 3, ONE_OR_TWO),
    Case(
        "2 processes, whole seeds", LENET,
        (*MATCHING, "--epochs", "300", *TWO, "--shard", "seeds"), 2, ONE_OR_TWO,
    ),
)  # fmt: skip


def main() -> None:
    """Run all cases, print and write the rows."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="A part of the names of the cases to run.")
    args = parser.parse_args()
    chance, rows = random.Random(args.seed), []
    for case in CASES:
        if args.only and args.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for row in measured(case, Path(folder), chance):
                rows.append(row)
                print(" ".join(map(str, row)), flush=True)
    header = [
        "case", "killed_after_s", "stage", "iteration", "saved_iteration", "kills", "going_on",
        "largest_difference",
    ]  # fmt: skip
    print(table(header, rows))
    if args.csv:
        write_csv(header, rows, args.csv)


def measured(case: Case, folder: Path, chance: random.Random):
    """Yield a row per kill of a case."""
    script("training.py", *case.capture, "--results", str(folder))
    (checkpoint,) = folder.glob("*.pth.tar")
    flags = [*case.attack, "--checkpoint", str(checkpoint), "--root", str(folder)]
    flags += ["--save-every", str(SAVE_EVERY)]
    start = time.monotonic()
    script("run.py", *flags, "--id", "whole")
    seconds = time.monotonic() - start
    results = folder / "results" / "exp"
    whole = torch.load(results / "whole" / "x_recon.pth")
    number = 0
    for attempt in itertools.count():
        if number == case.kills:
            return
        run, moment = results / f"killed-{attempt}", chance.uniform(0.1, 0.98) * seconds
        words = [*flags, "--id", run.name]
        if not killed(words, moment, run):
            continue  # before there was anything to go on with, or after its end
        at, saved, kills = reached(run), saved_progress(run), 1
        going_on = [*words, *case.going_on[number % len(case.going_on)], "--resume", str(run)]
        if number % 3 == 2 and killed(going_on, chance.uniform(0.2, 0.6) * seconds, run):
            kills += 1
        if (run / STATE).exists():
            script("run.py", *going_on)
        difference = (torch.load(run / "x_recon.pth") - whole).abs().max().item()
        processes = " ".join(case.going_on[number % len(case.going_on)]) or "as before"
        yield [case.name, round(moment, 1), *at, saved, kills, processes, difference]
        number += 1


def script(name: str, *flags: str) -> None:
    """Run a script to its end; raise where it fails."""
    subprocess.run([sys.executable, name, *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def killed(flags: Sequence[str], moment: float, run: Path) -> bool:
    """Start run.py and kill it after `moment` seconds; tell whether a state is left."""
    process = subprocess.Popen(
        [sys.executable, "run.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return (run / STATE / "manifest-0.json").exists()


def reached(run: Path) -> tuple[str, str]:
    """Return the stage and the iteration, or tensor, of the last line of progress in the log."""
    stage, done = "start", ""
    if not (run / "log.txt").exists():
        return stage, done
    for line in (run / "log.txt").read_text().splitlines():
        found = re.match(r"(.*)  iteration (\d+)/", line)
        solved = re.match(r"(.*?)([\w.]+): rank \d+ of", line)
        if found:
            stage, done = found[1], found[2]
        elif solved:
            stage, done = f"{solved[1]}layers", solved[2]
    return stage, done


def saved_progress(run: Path) -> str:
    """Return the iteration that the last save of a matching holds, "" where none was saved."""
    consolidate(run / STATE)
    journal = FolderJournal.opened(run / STATE, 1.0, print, 0)
    for part in ("controls/other gradient", "controls/prior only", "attack"):
        found = journal.recall(f"{part}/progress")
        if found is not None:
            return str(found["done"])
    return ""


if __name__ == "__main__":
    main()
