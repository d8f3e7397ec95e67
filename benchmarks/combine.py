"""Compares the two searches of `combine`: per-sample gradients and Gram matrix, and greedy.

    python -m benchmarks.combine --csv FILE

It combines the attack's candidates after a few iterations from several seeds, in eval mode, with 32
images and 8 seeds. The greedy search is the slow, obvious twin: the same function with no memory
for gradients. Work is counted in gradients of one image.
"""

import argparse
import time
from functools import partial

import torch

from benchmarks.setting import photo_objective
from inversion.combine import combine
from inversion.optimise import reconstruct
from inversion.pixel_gradient import exact
from inversion.restarts import initial_images
from inversion.settings import Loop
from utils.console import table
from utils.files import write_csv


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["lenet", "convnet"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=8, help="seeds per combination")
    parser.add_argument(
        "--cases",
        type=int,
        default=3,
        help="random networks and starts",
    )
    parser.add_argument("--steps", type=int, default=30, help="iterations before combining")
    parser.add_argument("--csv", help="file for the rows")
    args = parser.parse_args()
    header = ["arch", "case", "search", "gradient loss", "best seed", "image gradients", "seconds"]
    rows = []
    for arch in args.arch:
        for case in range(args.cases):
            objective = photo_objective(arch, 32, args.batch_size, seed=case, train_mode=False)
            loop = Loop(args.steps, 0.1, signed=True, keep_best=True)
            x_seeds = []
            for seed in range(args.seeds):
                start = initial_images(
                    100 * case + seed, args.batch_size, (3, 32, 32), torch.float32
                )
                x_seeds.append(reconstruct(partial(exact, objective), start, loop).x)
            for search, memory in (("gram", 2**40), ("greedy", 0)):
                begin = time.perf_counter()
                found = combine(objective, x_seeds, memory=memory)
                seconds = time.perf_counter() - begin
                best = min(found.seed_losses)
                rows.append([arch, case, search, found.loss, best, found.image_gradients, seconds])
    print(table(header, rows))
    if args.csv:
        write_csv(header, rows, args.csv)


if __name__ == "__main__":
    main()
