"""Decides whether finite differences of the gradient deserve to be the default pixel gradient.

    python -m benchmarks.first_order --only-time --csv docs/rows/first_order_time.csv
    python -m benchmarks.first_order --csv docs/rows/first_order.csv

The first command measures what a step takes, relative to an exact one, in interleaved pairs. The
second attacks the same clients from the same starts with `exact`, with finite differences of
several steps, and with a control: exact derivatives averaged over networks with noise on their
weights, which smooths as finite differences might. All take equal iterations; `exact` and the
control also take as many as fit into the time of the finite differences, by the first command's
rows. The gradient distance of the last images is evaluated exactly. Beside the scores stand those
of grey and mean-colour images. The images depend on no time but that share.
"""

import argparse
import csv
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bn_coupling import scores, trained_weights
from benchmarks.setting import photo_objective
from inversion.first_order import finite_differences
from inversion.objective import Losses, Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import exact
from inversion.restarts import initial_images
from inversion.settings import Loop, Weights
from models.comparing import joint_norm
from models.gradient import trainable_parameters
from train.datasets import DATASETS
from train.photos import photo_batch
from utils.console import table
from utils.files import write_csv
from utils.images import denormalise
from utils.metrics import baselines

SIZE, BATCH_SIZE = 32, 4
SPEC = DATASETS["photos"]
STEPS = (1e-4, 1e-3, 1e-2)
#: Steps that the trained network is trained for.
TRAINING_STEPS = 300
#: Networks that the control averages over, and the norm of their noise relative to the weights'.
AVERAGED, NOISE = 2, 1e-3
#: Rows of `--only-time`.
TIMES = Path(__file__).parent.parent / "docs" / "rows" / "first_order_time.csv"
HEADER = [
    "network", "seed", "method", "step", "iterations", "time / exact", "distance", "psnr", "ssim",
    "cosine at the start", "signs at the start", "grey psnr", "grey ssim", "mean colour psnr",
    "mean colour ssim",
]  # fmt: skip
GAINS_HEADER = ["network", "method", "step", "at equal"] + [
    f"{of} {what}" for what in ("-log10 distance", "psnr", "ssim") for of in ("mean", "min", "max")
]
TIME_HEADER = ["network", "pair", "exact seconds", "finite differences seconds", "ratio"]


@dataclass(frozen=True)
class Attacks:
    """Says how the networks of one kind are attacked."""

    arch: str
    train_mode: bool
    steps: int
    #: First step size of sign Adam in the box.
    lr: float
    #: Weights of the priors; the BN prior pulls to the uploaded statistics.
    weights: Weights
    trained: bool = False


DEMO = Weights(priors={"tv": 1e-4}, priors_end={"tv": 1e-6})
WITH_BN = {"tv": 1e-2, "bn": 1e-3}
EVAL = Weights(priors={"tv": 1e-1}, priors_end={"tv": 1e-2})
CASES = {
    "lenet": Attacks("lenet", False, 800, 0.05, DEMO),
    "convnet, train": Attacks("convnet", True, 250, 0.1, Weights(priors={"tv": 1e-2, "bn": 1e-2})),
    "random resnet18, train": Attacks("resnet18", True, 40, 0.1, Weights(priors=WITH_BN)),
    "random resnet18, eval": Attacks("resnet18", False, 80, 1.0, EVAL),
    "trained resnet18, eval": Attacks("resnet18", False, 80, 0.1, EVAL, trained=True),
}
Method = Callable[[Objective, Tensor, float], tuple[Losses[Tensor], Tensor]]


def averaged(generator: torch.Generator) -> Method:
    """Return the control: the mean of exact derivatives over networks with noise on the weights.

    The loss is the mean of theirs too. Every call draws new noise.
    """

    def method(
        objective: Objective, x: Tensor, progress: float = 0.0
    ) -> tuple[Losses[Tensor], Tensor]:
        parameters = list(trainable_parameters(objective.model).values())
        own = [parameter.detach().clone() for parameter in parameters]
        total, found = [], []
        for _ in range(AVERAGED):
            noise = [torch.randn(p.shape, generator=generator) for p in own]
            size = NOISE * joint_norm(own) / joint_norm(noise)
            with torch.no_grad():
                for parameter, value, n in zip(parameters, own, noise, strict=True):
                    parameter.copy_(value + size * n)
            losses, derivative = exact(objective, x, progress)
            found.append(derivative)
            total.append(losses)
        with torch.no_grad():
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)
        mean = [
            sum(getattr(losses, part) for losses in total) / AVERAGED
            for part in ("total", "gradient")
        ]
        return Losses(mean[0], mean[1], total[0].terms), sum(found) / AVERAGED

    return method


def objective_of(name: str, seed: int, index: int) -> Objective:
    """Return the objective of one client of a case; `index` says which batch."""
    case = CASES[name]
    return photo_objective(
        case.arch, SIZE, BATCH_SIZE, seed=seed, index=index, weights=case.weights,
        train_mode=case.train_mode,
        body=trained_weights(case.arch, 0.0, 0, TRAINING_STEPS) if case.trained else None,
    )  # fmt: skip


def agreement(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Return the cosine of two derivatives and the share of equal signs."""
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), true.flatten(), dim=0)
    return cosine.item(), (found.sign() == true.sign()).float().mean().item()


def attack_rows(name: str, seed: int, index: int, share: float) -> list[list]:
    """Attack one client in every way; return a row for each.

    share: time of a step with finite differences, relative to an exact one.
    """
    case = CASES[name]
    objective = objective_of(name, seed, index)
    true, _ = photo_batch(BATCH_SIZE, index, SIZE, seed=seed)
    start = initial_images(seed, BATCH_SIZE, (3, SIZE, SIZE), torch.float32)
    mean, std = SPEC.normalisation
    box = (-mean / std, (1 - mean) / std)
    flat = [value for x in baselines(true).values() for value in scores(x, true)]
    fits = max(1, round(case.steps * share))
    runs: list[tuple[str, float | None, int, float, Method]] = [
        ("exact", None, case.steps, 1.0, exact),
        ("exact", None, fits, 1.0, exact),
    ]
    runs += [
        ("finite differences", c, case.steps, share, functools.partial(finite_differences, step=c))
        for c in STEPS
    ]
    for steps in (case.steps, max(1, round(fits / AVERAGED))):
        control = averaged(torch.Generator().manual_seed(seed))
        runs.append(("averaged exact", NOISE, steps, AVERAGED, control))
    _, derivative = exact(objective, start)
    rows = []
    for label, c, count, relative, method in runs:
        agrees = agreement(method(objective, start, 0.0)[1], derivative)
        loop = Loop(count, case.lr, signed=True, box=box, keep_best=True)
        x = reconstruct(functools.partial(method, objective), start, loop).x
        distance = objective.gradient_distance(x)
        found = scores(denormalise(x, mean, std), true)
        time_used = relative * count / case.steps
        rows.append([name, seed, label, c, count, time_used, distance, *found, *agrees, *flat])
        print(*rows[-1][:11], flush=True)
    return rows


def time_rows(name: str, pairs: int) -> list[list]:
    """Time steps of both ways, in interleaved pairs, with random weights."""
    case = CASES[name]
    objective = photo_objective(
        case.arch, SIZE, BATCH_SIZE, weights=case.weights, train_mode=case.train_mode
    )
    x = initial_images(0, BATCH_SIZE, (3, SIZE, SIZE), torch.float32)

    def seconds(method: Method) -> float:
        begin = time.perf_counter()
        method(objective, x, 0.0)
        return time.perf_counter() - begin

    for method in (exact, finite_differences) * 2:
        seconds(method)  # warm-up
    rows = []
    for pair in range(pairs):
        both = seconds(exact), seconds(finite_differences)
        rows.append([name, pair, *both, both[1] / both[0]])
    return rows


def shares(path: str) -> dict[str, float]:
    """Read the median ratio of every network from the rows of `--only-time`."""
    ratios: dict[str, list[float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            ratios.setdefault(row["network"], []).append(float(row["ratio"]))
    return {name: statistics.median(found) for name, found in ratios.items()}


def gains(rows: list[list]) -> list[list]:
    """Compare each other way with `exact` on the same clients: mean, lowest and highest gain.

    A positive gain is the better image, or the lower distance, of which log10 is told. At equal
    time the rival is the `exact` of as many iterations as fit.
    """
    exact_of: dict[tuple, list[list]] = {}
    for row in rows:
        if row[2] == "exact":
            exact_of.setdefault((row[0], row[1]), []).append(row)
    ways = dict.fromkeys(tuple(row[i] for i in (0, 2, 3, 4)) for row in rows if row[2] != "exact")
    found = []
    for name, *way in ways:
        own = [row for row in rows if row[0] == name and row[2:5] == way]
        for equal in ("iterations", "time"):
            if (way[0] == "averaged exact") and (equal == "time") == (way[2] == CASES[name].steps):
                continue  # a control's run serves one of the two comparisons
            columns: list[list[float]] = [[], [], []]
            for row in own:
                whole, fits = exact_of[name, row[1]]
                rival = whole if equal == "iterations" else fits
                columns[0].append(math.log10(rival[6] / row[6]))
                columns[1].append(row[7] - rival[7])
                columns[2].append(row[8] - rival[8])
            spread = [f(values) for values in columns for f in (statistics.mean, min, max)]
            found.append([name, *way[:2], equal, *spread])
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--index", type=int, default=1, help="which batch of photographs")
    parser.add_argument("--only-time", action="store_true", help="measure steps, attack nothing")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps that are timed")
    parser.add_argument("--times", default=str(TIMES), help="rows of --only-time")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    rows = []
    if args.only_time:
        for name in args.networks:
            rows += time_rows(name, args.pairs)
            ratios = [row[-1] for row in rows if row[0] == name]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f}) of an exact step", flush=True)
    else:
        share = shares(args.times)
        for name in args.networks:
            for seed in range(args.seeds):
                rows += attack_rows(name, seed, args.index, share[name])
        print(table(HEADER, rows))
        print(table(GAINS_HEADER, gains(rows)))
    if args.csv:
        write_csv(TIME_HEADER if args.only_time else HEADER, rows, args.csv)


if __name__ == "__main__":
    main()
