"""Measures how far the original's truncated BatchNorm derivative is from the exact one.

    python -m benchmarks.bn_derivative --csv FILE

For random networks in train mode and random initial images it prints the cosine and the agreement
of signs between the pixel gradients with `--bn-grad detached` and `exact`, and the ratio of their
norms.
"""

import argparse

import torch

from benchmarks.setting import photo_objective
from inversion.pixel_gradient import exact
from inversion.restarts import initial_images
from inversion.settings import Weights
from utils.console import table
from utils.files import write_csv

CASES = (("convnet", 32, 8), ("resnet18", 32, 8), ("resnet18", 64, 4), ("resnet50", 64, 4))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    header = ["arch", "px", "B", "seed", "cosine", "sign agreement", "norm ratio"]
    rows = []
    for arch, size, batch_size in CASES:
        for seed in range(args.seeds):
            x = initial_images(seed, batch_size, (3, size, size), torch.float32)
            derivatives = []
            for bn_grad in ("exact", "detached"):
                objective = photo_objective(
                    arch, size, batch_size, seed=seed, weights=Weights(), bn_grad=bn_grad
                )
                derivatives.append(exact(objective, x)[1].flatten())
            true, truncated = derivatives
            agreement = (true.sign() == truncated.sign()).float().mean().item()
            cosine = torch.nn.functional.cosine_similarity(true, truncated, dim=0).item()
            ratio = (truncated.norm() / true.norm()).item()
            rows.append([arch, size, batch_size, seed, cosine, agreement, ratio])
    print(table(header, rows))
    if args.csv:
        write_csv(header, rows, args.csv)


if __name__ == "__main__":
    main()
