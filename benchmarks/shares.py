"""Says where the time of whole runs of run.py goes, from the start of Python to its end.

    python -m benchmarks.shares --csv docs/rows/shares.csv

Every case runs in a process of its own, as a user would start it. A thread looks every few
milliseconds at what the main thread does, and counts the time since the last look for that: the
clock's and the main thread's CPU time, which other programs disturb less. A stage is found by the
files of this project that are on the stack. Within a stage the place counts: the deepest function
of this project, or the package that is imported. So nothing has to be known beforehand to show up.

The cases: a small attack with labels from the gradient, scores, controls, decoys and pictures; the
same by MLCO with four seeds; a layerwise attack; a search of hyper-parameters alone, whose trials
run in ray's processes and show up as waiting. Printed are all stages, and all places outside the
step and the controls, which are attacks too, that take more than 5 % of a run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

# The rest is imported where it is used: what run.py imports shall be seen.

ROOT = Path(__file__).resolve().parent.parent
#: Seconds between two looks.
PAUSE = 0.004
#: From which share of a run on a place is printed.
LARGE = 0.05
#: Stages that attack, whose places are not looked at.
ATTACKS = ("step", "controls")
IMPORTS, OTHER, START, END = "imports", "other", "start of Python", "end of Python"
#: Stage → files of it; the first stage with a file on the stack counts.
STAGES = {
    "controls": ("inversion/audit/controls.py",),
    "labels": ("inversion/labels/",),
    "pictures": ("utils/pictures.py",),
    "scores": (
        "inversion/audit/scoring.py", "inversion/audit/identification.py",
        "inversion/audit/verdict.py", "utils/metrics.py",
    ),
    "combination": ("inversion/combine.py",),
    "step": ("inversion/pixel_gradient.py",),
    "loop around the step": ("inversion/optimise.py", "inversion/restarts.py"),
    "layerwise": ("inversion/layerwise/",),
    "search": ("inversion/search/", "inversion/audit/searching.py"),
    "reading": ("inversion/audit/inputs.py",),
    "writing": (
        "inversion/audit/report.py", "utils/files.py", "utils/journal.py", "utils/tensor_files.py",
        "inversion/audit/resuming.py",
    ),
    "telling": (
        "inversion/audit/plan.py", "inversion/audit/threat.py", "inversion/audit/tables.py",
        "inversion/audit/certificate.py", "utils/console.py",
    ),
}  # fmt: skip
LENET = ("-a", "lenet", "-b", "8", "--outlayer-state", "keep", "--with-control", "--decoys", "8")
MATCHING = ("--lr", "0.05", "--TV", "1e-4", "--grad-sign", "--metric")
#: Case → the client's flags and the attack's, at 32 px.
CASES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "matching": (LENET, (*MATCHING, "--epochs", "1000")),
    "mlco": (LENET, (*MATCHING, "--epochs", "300", "--n-seed", "4", "--MinCombine")),
    "layerwise": (
        ("-a", "resnet18", "-b", "2", "--upload-bn", "--with-control", "--decoys", "8"),
        ("--attack", "layerwise", "--metric"),
    ),
    "search": (
        LENET,
        (*MATCHING, "--epochs", "100", "--superparameters-search", "--search-only", "--TV-tune",
         "--simulation-checkpoint", "CHECKPOINT", "--num-samples", "4", "--HP-epochs", "60",
         "--min-t", "20", "--max-t", "60", "--max-concurrent", "1"),
    ),
}  # fmt: skip
HEADER = ["case", "round", "stage", "place", "seconds", "cpu seconds"]


def own_files(frame: FrameType | None) -> list[tuple[str, str]]:
    """Return file and function of every frame on the stack, the outermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def place_of(stack: Sequence[tuple[str, str]], root: str) -> tuple[str, str]:
    """Return stage and place of a stack, whose first frame is the outermost.

    root: the folder of this project.
    """
    own = [
        (file.removeprefix(f"{root}/"), name)
        for file, name in stack
        if file.startswith(f"{root}/") and f"{root}/." not in file
    ]
    if any(file.startswith("<frozen importlib") for file, _ in stack):
        first = next(i for i, (file, _) in enumerate(stack) if file.startswith("<frozen importlib"))
        packages = [file for file, _ in stack[first:] if "site-packages/" in file]
        if not packages:
            return IMPORTS, "this project and the standard library"
        name = packages[0].rpartition("site-packages/")[2].partition("/")[0]
        return IMPORTS, name.removesuffix(".py")
    place = f"{own[-1][0]}: {own[-1][1]}" if own else ""
    for stage, files in STAGES.items():
        if any(file.startswith(files) for file, _ in own):
            return stage, place
    return OTHER, place


class Looks:
    """Looks at the main thread again and again, and counts its time by stage and place."""

    def __init__(self) -> None:
        #: (stage, place) → seconds by the clock and of the main thread's CPU time.
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._main = threading.get_ident()
        self._cpu = time.pthread_getcpuclockid(self._main)

    def __enter__(self) -> "Looks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        root = str(ROOT)
        last = self._now()
        while not self._over.wait(PAUSE):
            frame = sys._current_frames().get(self._main)
            now = self._now()
            counted = self.seconds[place_of(own_files(frame), root)]
            for clock in (0, 1):
                counted[clock] += now[clock] - last[clock]
            last = now

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.clock_gettime(self._cpu)


def one(words: Sequence[str]) -> None:
    """Run run.py's own function with these flags, and print what was seen of it."""
    begin, started = time.time(), float(os.environ["STARTED"])
    cpu = time.process_time()
    with Looks() as looks:
        import run

        code = run.main(list(words))
    if code:
        sys.exit(code)
    rows = [[*key, *values] for key, values in looks.seconds.items()]
    rows.append([START, "", begin - started, cpu])
    print("\n" + json.dumps({"rows": rows, "end": time.time()}), flush=True)


def captured(folder: Path, client: Sequence[str]) -> str:
    """Capture photographs; return the checkpoint's path."""
    command = [sys.executable, "training.py", "--data-name", "photos", "--image-size", "32"]
    subprocess.run(
        [*command, *client, "--results", str(folder)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return str(next(folder.glob("*-checkpoint.pth.tar")))


def measured(case: str, extra: Sequence[str] = ()) -> list[list]:
    """Run a case once; return stage, place, seconds and CPU seconds, the longest first."""
    client, attack = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = captured(folder / "target", client)
        words = ["--root", name, "--checkpoint", checkpoint]
        if "CHECKPOINT" in attack:
            other = captured(folder / "simulation", [*client, "--target-idx", "1"])
            attack = [other if word == "CHECKPOINT" else word for word in attack]
        command = [sys.executable, "-m", "benchmarks.shares", "--one", *words, *attack, *extra]
        environment = {**os.environ, "STARTED": str(time.time()), "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        over = time.time()
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-1000:]}")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    rows = told["rows"] + [[END, "", over - told["end"], ""]]  # its CPU time is not known
    return sorted(rows, key=lambda row: -row[2])


def summary(rows: Sequence[Sequence]) -> str:
    """Return one case's stages and large places as a table, by the medians of the rounds."""
    from utils.console import table

    rounds = sorted({row[1] for row in rows})

    def summed(i: int, number: int, stage: str | None = None, place: str | None = None) -> float:
        return sum(
            row[i] or 0.0
            for row in rows
            if row[1] == number and stage in (None, row[2]) and place in (None, row[3])
        )

    def shares(stage: str, place: str | None) -> list[float]:
        return [
            statistics.median(summed(i, n, stage, place) / summed(i, n) for n in rounds)
            for i in (4, 5)
        ]

    found = [(shares(stage, None), stage, "") for stage in dict.fromkeys(row[2] for row in rows)]
    places = dict.fromkeys((row[2], row[3]) for row in rows if row[3])
    found += [
        (shares(*key), *key)
        for key in places
        if key[0] not in ATTACKS and max(shares(*key)) >= LARGE
    ]
    order = sorted(found, key=lambda each: (each[2] != "", -each[0][0]))
    return table(
        ["stage", "place", "share", "share of CPU time"],
        [[stage, place, *(f"{share:.1%}" for share in both)] for both, stage, place in order],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["--one"]:
        one(words[1:])
        return
    from utils.files import write_csv

    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args(words)
    rows: list[list] = []
    for number in range(args.rounds):
        for case in args.cases:
            rows += [[case, number, *row] for row in measured(case)]
    for case in args.cases:
        own = [row for row in rows if row[0] == case]
        seconds = statistics.median(
            sum(row[4] for row in own if row[1] == number) for number in range(args.rounds)
        )
        print(f"{case}: {seconds:.1f} s", summary(own), sep="\n", flush=True)
    if args.csv:
        write_csv(HEADER, rows, args.csv)


if __name__ == "__main__":
    main()
