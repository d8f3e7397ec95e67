"""Measures what updates of several local steps give away: surrogate, mean gradient, unrolled steps.

    python -m benchmarks.updates --csv FILE --picture FILE

A client with a random lenet takes T steps of plain SGD on photographs and sends the update. The
same attack, equally long, takes the update for the gradient at the place of the surrogate
(sme), for the gradient at the state before (mean) or unrolls the steps (unroll). The control is the
surrogate's attack on the update of other photographs with the same labels. Batches 0, 1, 2; the
settings were chosen on batch 10.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from inversion.objective import Objective
from inversion.optimise import Reconstruction, reconstruct
from inversion.pixel_gradient import exact
from inversion.restarts import initial_images
from inversion.settings import UPDATE_MODELS, Loop, Weights
from models.build import build_model
from models.checkpoint import Task, make_checkpoint
from models.gradient import ClientLoss
from models.local import LocalSteps, local_gradient
from models.reading import target_from_checkpoint
from models.target import Target
from train.datasets import DATASETS, normalise
from train.photos import photo_batch
from utils.console import table
from utils.files import write_csv
from utils.image_files import public_photographs
from utils.images import denormalise
from utils.matching import assign
from utils.metrics import psnr, ssim
from utils.pictures import save_panels

#: (steps T, step size, what is measured), batch by batch; the control is dear, and once is enough.
CONTROL = "control"
CASES = (
    (2, 0.001, UPDATE_MODELS),
    (4, 0.001, (*UPDATE_MODELS, CONTROL)),
    (4, 0.003, UPDATE_MODELS),
    (16, 0.001, ("sme", "mean")),
)
BATCHES = (0, 1, 2)
#: Sixteen steps are unrolled for one batch, last, since each iteration takes as long as sixteen.
LAST = (16, 0.001, "unroll", 0)
#: The case of the picture.
PICTURED = (4, 0.001, 0)


@dataclass(frozen=True)
class Client:
    """Holds one simulated client: what it sent, and for scoring its images."""

    model: torch.nn.Module
    target: Target
    x: Tensor
    y: Tensor


def client(index: int, steps: int, lr: float, args, *, others: bool = False) -> Client:
    """Simulate the client of batch `index`; others: with public photographs for its images."""
    spec, shape = DATASETS["photos"], (3, args.size, args.size)
    torch.manual_seed(index)
    model = build_model("lenet", spec.class_count, shape)
    x, y = photo_batch(args.batch_size, index, args.size, seed=0)
    if others:
        x = public_photographs(args.batch_size, shape, seed=index)
    x, loss = normalise(x, spec), ClientLoss(train_mode=True)
    local = LocalSteps(steps, lr)
    gradient = local_gradient(model, x, y, loss, local)
    task = Task("lenet", len(x), shape, spec.class_count, spec.mean, spec.std, loss)
    target = target_from_checkpoint(make_checkpoint(model, gradient, task, local=local))
    return Client(model, target, x, y)


def attack(of: Client, name: str, iterations: int) -> Reconstruction:
    """Reconstruct the client's images with the update taken for what `name` says."""
    weights = Weights(priors={"tv": 1e-4}, priors_end={"tv": 1e-6})
    objective = Objective(of.model, of.target, of.y, weights, update_model=name)
    start = initial_images(0, len(of.y), of.target.image_shape, of.x.dtype)
    loop = Loop(iterations, 0.1, signed=True, box=of.target.box, keep_best=True)
    return reconstruct(partial(exact, objective), start, loop)


def colours(of: Client, x: Tensor) -> Tensor:
    """Return normalised images (B, C, H, W) as colours in [0, 1]."""
    return denormalise(x, of.target.mean, of.target.std)


def row(case: tuple, name: str, args) -> tuple[dict, Tensor]:
    """Measure one attack: its scores, and its images beside the truth they are scored by."""
    steps, lr, index = case
    private = client(index, steps, lr, args)
    attacked = client(index, steps, lr, args, others=True) if name == CONTROL else private
    start = time.process_time()
    found = attack(attacked, "sme" if name == CONTROL else name, args.iterations)
    seconds = time.process_time() - start
    images, true = colours(private, found.x), colours(private, private.x)
    images = images[assign(images, true)]
    flat = true.mean((-2, -1), keepdim=True).expand_as(true)
    entry = {
        "steps": steps, "lr": lr, "batch": index, "images": len(true), "size": args.size,
        "model": name, "iterations": found.steps,
        "psnr": psnr(images, true).mean().item(), "ssim": ssim(images, true).mean().item(),
        "mean colour psnr": psnr(flat, true).mean().item(),
        "gradient loss": found.losses.gradient, "alpha": found.losses.alpha,
        "cpu seconds": round(seconds, 1),
    }  # fmt: skip
    return entry, images


def summary(rows: list[dict]) -> str:
    """Return a table of means over the batches, one row per steps, rate and model."""
    lines = []
    for key in dict.fromkeys((row["steps"], row["lr"], row["model"]) for row in rows):
        of_key = [row for row in rows if (row["steps"], row["lr"], row["model"]) == key]

        def mean(name: str, of_key: list[dict] = of_key) -> float:
            return statistics.mean(row[name] for row in of_key)

        alphas = [f"{row['alpha']:.2f}" for row in of_key if row["alpha"] is not None]
        psnrs = " ".join(f"{row['psnr']:.1f}" for row in of_key)
        lines.append(
            [*key, f"{mean('psnr'):.1f}", psnrs, f"{mean('ssim'):.2f}",
             f"{mean('mean colour psnr'):.1f}", f"{mean('gradient loss'):.1e}",
             " ".join(alphas) or "-", f"{mean('cpu seconds') / mean('iterations') * 1e3:.0f}"]
        )  # fmt: skip
    header = ["steps", "rate", "model", "PSNR", "by batch", "SSIM", "mean colour", "gradient loss",
              "alpha", "ms per iteration"]  # fmt: skip
    return table(header, lines)


def main() -> None:
    """Measure, print, write after every attack."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--csv", type=Path, help="file for the rows")
    parser.add_argument("--picture", type=Path, help="file for the picture of one case")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=4, help="images of the client")
    parser.add_argument("--iterations", type=int, default=200, help="iterations of every attack")
    args = parser.parse_args()
    runs = [
        (steps, lr, name, index)
        for index in BATCHES
        for steps, lr, names in CASES
        for name in names
    ]
    rows: list[dict] = []
    panels: list[tuple[str, Tensor]] = []
    for steps, lr, name, index in [*runs, LAST]:
        entry, images = row((steps, lr, index), name, args)
        rows.append(entry)
        print(", ".join(f"{key} {value}" for key, value in entry.items()), flush=True)
        if (steps, lr, index) == PICTURED:
            panels.append((f"{name}, {entry['psnr']:.1f} dB", images))
        if args.csv:
            write_csv(list(rows[0]), [list(r.values()) for r in rows], args.csv)
        if args.picture and len(panels) == len(CASES[1][2]):
            _draw(panels, args)
    print(summary(rows))


def _draw(panels: list[tuple[str, Tensor]], args) -> None:
    """Write the picture of one case: the truth, and what each model of the update gave."""
    steps, lr, index = PICTURED
    of = client(index, steps, lr, args)
    save_panels([("truth", colours(of, of.x)), *panels], args.picture)


if __name__ == "__main__":
    main()
