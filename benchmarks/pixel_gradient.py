"""Time of the exact pixel gradient against its plain twin, interleaved in one process.

    python -m benchmarks.pixel_gradient --arch resnet18 --image-size 32 --batch-size 8

Prints the median seconds of both and their ratio, pair by pair, and writes the rows as CSV.
Machines are noisy: quote the ratio.
"""

import argparse
import statistics
import time

import torch

from inversion.objective import Objective, Weights
from inversion.pixel_gradient import exact, plain
from inversion.restarts import initial_images
from models.build import build_model, init_head
from models.target import target_from_checkpoint
from train.capture import capture
from train.datasets import DATASETS, normalise, photo_batch
from utils.checkpoint import make_checkpoint
from utils.report import device_name, write_csv


def objective_for(arch: str, size: int, batch_size: int, device: torch.device) -> Objective:
    """The attack on random weights in train mode with TV and the exact BN prior."""
    torch.manual_seed(0)
    spec = DATASETS["photos"]
    shape = (3, size, size)
    model = build_model(arch, spec.num_classes, shape)
    init_head(model, "normal")
    x, y = photo_batch(batch_size, 1, size, seed=0)
    sent = capture(model, normalise(x, spec), y, train_mode=True, capture_bn=True)
    checkpoint = make_checkpoint(
        model,
        sent.gradient,
        arch=arch,
        batch_size=batch_size,
        image_shape=shape,
        num_classes=spec.num_classes,
        mean=spec.mean,
        std=spec.std,
        train_mode=True,
        bn_mean=sent.bn_mean,
        bn_var=sent.bn_var,
    )
    priors = {"tv": 0.01, "bn": 0.01} if sent.bn_mean else {"tv": 0.01}
    target = target_from_checkpoint(checkpoint)
    return Objective(model.to(device), target, y, Weights(priors=priors), bn_source="batch")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15, help="measured A-B pairs")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = objective_for(args.arch, args.image_size, args.batch_size, device)
    shape = (3, args.image_size, args.image_size)
    x = initial_images(0, args.batch_size, shape, torch.float32).to(device)

    def seconds(method) -> float:
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
