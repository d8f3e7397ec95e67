"""Times a step of two processes against one, with one thread each and the same batch.

    python -m benchmarks.scaling --csv FILE

The two are measured in turn in one run: process 0 computes a step with the whole batch while the
other waits, then both compute it together. The time in collectives includes waiting for the other
process. The time for one process's part of the batch alone bounds the gain from above.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch

from benchmarks.setting import photo_objective
from inversion.pixel_gradient import exact
from inversion.restarts import initial_images
from utils.console import table
from utils.files import write_csv
from utils.launch import Group, free_address, launch
from utils.shard import Shard


@dataclass(frozen=True)
class TimedShard(Shard):
    """A shard that records the time spent in its sums."""

    #: Duration of each sum, in seconds.
    seconds: list = field(default_factory=list)

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over processes and record the time."""
        begin = time.perf_counter()
        total = super().sum_(x)
        self.seconds.append(time.perf_counter() - begin)
        return total


def parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark's flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=11, help="number of interleaved measurements")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--csv", help="file for the rows")
    return parser


def work(argv: list[str], place: Shard, local_rank: int) -> int:
    """Measure in one process of the group; process 0 prints the results."""
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    shard = TimedShard(place.rank, place.size)
    setting = (args.arch, args.image_size, args.batch_size)
    alone, shared = photo_objective(*setting), photo_objective(*setting, shard=shard)
    part = photo_objective(args.arch, args.image_size, max(1, args.batch_size // place.size))
    x = initial_images(0, args.batch_size, (3, args.image_size, args.image_size), torch.float32)
    rows = []
    for pair in range(-1, args.pairs):  # the first warms up
        single = fraction = 0.0
        if shard.is_main:
            begin = time.perf_counter()
            exact(alone, x)
            middle = time.perf_counter()
            exact(part, x[: len(part.y)])
            single, fraction = middle - begin, time.perf_counter() - middle
        shard.any(False)
        shard.seconds.clear()
        begin = time.perf_counter()
        exact(shared, shared.local_part(x))
        together = time.perf_counter() - begin
        if pair >= 0:
            sums = [sum(shard.seconds), len(shard.seconds)]
            rows.append([pair, single, fraction, together, *sums])
    if not shard.is_main:
        return 0
    header = [
        "pair",
        "one process s",
        "one process, its part alone s",
        f"{place.size} processes s",
        "in collectives s",
        "collectives",
    ]
    print(table(header, rows))
    speedups = [row[1] / row[3] for row in rows]
    ideal = statistics.median(row[1] / row[2] for row in rows)
    quartiles = statistics.quantiles(speedups, n=4)
    share = statistics.median(row[4] / row[3] for row in rows)
    print(
        f"{args.arch} {args.image_size} px B {args.batch_size}: speed-up {quartiles[1]:.2f} "
        f"({quartiles[0]:.2f}-{quartiles[2]:.2f}) of at most {ideal:.2f}, {100 * share:.0f} % of a "
        f"step in {rows[0][5]} collectives"
    )
    if args.csv:
        write_csv(header, rows, args.csv)
    return 0


if __name__ == "__main__":
    count = parser().parse_args().nproc
    sys.exit(launch(work, sys.argv[1:], Group(count, count, 0, free_address(), "gloo")))
