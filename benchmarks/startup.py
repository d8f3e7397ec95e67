"""Times how soon both scripts answer, beside `import torch`, interleaved.

    python -m benchmarks.startup --rounds 5 --csv docs/rows/startup.csv

It prints the median seconds of each command, and the median of its ratio to `import torch` in the
same round, and writes every measurement as CSV. Machines are noisy: quote the ratio.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from utils.files import write_csv

ROOT = Path(__file__).resolve().parent.parent
TORCH = "import torch"
#: What no attack can do without: its optimiser imports torch's compiler at the first step.
ADAM = "import torch; torch.optim.Adam([torch.ones(1, requires_grad=True)]).step()"
CLIENT = ["training.py", "--data-name", "photos", "-a", "lenet", "-b", "2"]


def seconds(command: list[str], until: str | None = None) -> float:
    """Return the seconds until `command` prints a line with `until`, or ends without one."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            if until is not None and until in line:
                return time.perf_counter() - start
    assert until is None, f"{command} never printed {until}"
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements per command")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, *CLIENT, "--results", folder],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (checkpoint,) = Path(folder).glob("*-checkpoint.pth.tar")
        attack = ["run.py", "--root", folder, "--checkpoint", str(checkpoint), "--lr", "0.1"]
        attack += ["--epochs", "1", "-p", "1"]
        commands: dict[str, tuple[list[str], str | None]] = {
            TORCH: (["-c", TORCH], None),
            "import torch, one step of Adam": (["-c", ADAM], None),
            "run.py --help": (["run.py", "--help"], None),
            "training.py --help": (["training.py", "--help"], None),
            "run.py --lr 0 (refused)": (["run.py", "--checkpoint", "x", "--lr", "0"], None),
            "run.py to its first iteration": (attack, "iteration 1/"),
            "training.py to its checkpoint": (
                [*CLIENT, "--results", folder],
                "checkpoint written",
            ),
        }
        rows = []
        for number in range(-1, args.rounds):  # the first round warms the file cache
            measured = {name: seconds(*command) for name, command in commands.items()}
            if number >= 0:
                rows += [(number, name, value) for name, value in measured.items()]
    of = {name: [row[2] for row in rows if row[1] == name] for name in commands}
    for name, values in of.items():
        ratios = [value / torch for value, torch in zip(values, of[TORCH], strict=True)]
        print(f"{name:32} {statistics.median(values):6.2f} s {statistics.median(ratios):6.2f}")
    if args.csv:
        write_csv(["round", "command", "seconds"], rows, args.csv)


if __name__ == "__main__":
    main()
