"""Times the exact pixel gradient against its plain twin, interleaved in one process.

    python -m benchmarks.pixel_gradient --arch resnet18 --image-size 32 --batch-size 8

It prints the median time of both and the median ratio of each pair, and writes the pairs as CSV.
Machines are noisy: quote the ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.setting import photo_objective
from inversion.pixel_gradient import exact, plain
from inversion.restarts import initial_images
from utils.device import device_name
from utils.files import write_csv


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15, help="number of measured pairs")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = photo_objective(args.arch, args.image_size, args.batch_size, device=device)
    shape = (3, args.image_size, args.image_size)
    x = initial_images(0, args.batch_size, shape, torch.float32).to(device)

    def seconds(method: Callable) -> float:
        start = time.perf_counter()
        losses, derivative = method(objective, x, 0.0)
        losses.floats()
        derivative.sum().item()  # waits for the device
        return time.perf_counter() - start

    for method in (exact, plain, exact, plain):
        seconds(method)  # warm-up
    rows = [(pair, seconds(exact), seconds(plain)) for pair in range(args.pairs)]
    ratios = [a / b for _, a, b in rows]
    print(f"{args.arch}, {args.image_size} px, B {args.batch_size}, {device_name(device)}")
    print(f"exact  {1e3 * statistics.median(a for _, a, _ in rows):8.1f} ms (median)")
    print(f"plain  {1e3 * statistics.median(b for _, _, b in rows):8.1f} ms (median)")
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"ratio  {statistics.median(ratios):8.3f} (median of {args.pairs} pairs; "
        f"quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})"
    )
    if args.csv:
        write_csv(["pair", "exact_seconds", "plain_seconds"], rows, args.csv)


if __name__ == "__main__":
    main()
