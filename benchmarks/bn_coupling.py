"""Compares matching with BatchNorm's exact coupling and with forced statistics.

    python -m benchmarks.bn_coupling --csv docs/rows/bn_coupling.csv
    python -m benchmarks.bn_coupling --only-cost --csv docs/rows/bn_coupling_cost.csv

Both attack the same client from the same start with the same settings, at equal iterations, in
train mode with uploaded statistics: a random ResNet-18, a random convnet, and a ResNet-18 trained
on public photographs alone with a fresh head. Beside the images stand grey and mean-colour ones,
the gradient distance that each coupling gives images at 30 dB from the truth, and the ratio of the
times of a step, measured in interleaved pairs. Machines are noisy: quote the ratio.

`--only-cost` attacks nothing. It measures on random weights, which cost what trained ones do, the
time of a step in more pairs and the bytes of the tensors that it holds at most at one time.
"""

import argparse
import functools
import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.setting import photo_objective
from inversion.objective import Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import exact
from inversion.restarts import initial_images
from inversion.settings import BN_COUPLINGS, Loop, Weights
from models.build import build_model
from train.datasets import DATASETS, normalise
from train.photos import photo_batch
from utils.console import table
from utils.files import write_csv
from utils.image_files import PUBLIC_PHOTOS, public_photographs
from utils.images import denormalise
from utils.live_bytes import peak_bytes
from utils.matching import assign
from utils.metrics import baselines, psnr, ssim

SIZE, BATCH_SIZE = 32, 4
SPEC = DATASETS["photos"]
#: Crops of public photographs that a network is trained on, and images per step.
CROPS, TRAINING_BATCH = 900, 32
#: Distance from the truth, in dB, at which gradient distances are compared.
NEAR = 30.0
#: Networks whose cost is measured: name, side of the images, images.
COSTS = (("convnet", 32, 8), ("resnet18", 32, 8), ("resnet50", 64, 4))
COST_HEADER = [
    "network", "px", "B", "pair", "exact seconds", "forced seconds", "forced / exact",
    "exact live bytes", "forced live bytes",
]  # fmt: skip
HEADER = [
    "network", "seed", "coupling", "iterations", "psnr", "ssim", "distance", "exact distance",
    "distance at 30 dB", "grey psnr", "grey ssim", "mean colour psnr", "mean colour ssim",
    "step time / exact",
]  # fmt: skip


@dataclass(frozen=True)
class Attacks:
    """Says how the networks of one kind are attacked."""

    arch: str
    trained: bool
    steps: int
    #: First step size.
    lr: float
    #: Weights of the priors; the BN prior pulls to the uploaded statistics.
    weights: Weights


COST_WEIGHTS = Weights(priors={"tv": 1e-2, "bn": 1e-2})
OF_RESNET18 = Weights(priors={"tv": 1e-2, "bn": 1e-3})
OF_CONVNET = Weights(priors={"tv": 1e-2, "bn": 1e-2})
CASES = {
    "random resnet18": Attacks("resnet18", False, 120, 0.1, OF_RESNET18),
    "random convnet": Attacks("convnet", False, 400, 0.1, OF_CONVNET),
    "trained resnet18": Attacks("resnet18", True, 120, 0.1, OF_RESNET18),
    "trained resnet18, rate 0.01": Attacks("resnet18", True, 120, 0.01, OF_RESNET18),
}


@functools.cache
def trained_weights(
    arch: str, seconds: float, seed: int, length: int | None = None
) -> dict[str, Tensor]:
    """Train a network to tell public photographs apart; return its weights by name.

    seconds: CPU time that training takes. length: steps that it takes instead, so that every
    machine trains alike. The classes are the photographs; crops come shifted,
    mirrored and at other brightness and contrast, by a generator of `seed`.
    """
    torch.manual_seed(seed)
    shape = (3, SIZE + 8, SIZE + 8)
    x = normalise(public_photographs(CROPS, shape, seed), SPEC)
    y = torch.arange(CROPS) % len(PUBLIC_PHOTOS)
    model = build_model(arch, len(PUBLIC_PHOTOS), (3, SIZE, SIZE)).train()
    optimiser = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    begin, steps, right = time.process_time(), 0, 0.0

    def done() -> float:
        return (time.process_time() - begin) / seconds if length is None else steps / length

    while (share := done()) < 1:
        optimiser.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * share)) / 2
        chosen = torch.randint(CROPS, (TRAINING_BATCH,))
        row, column = torch.randint(9, (2,)).tolist()
        images = x[chosen, :, row : row + SIZE, column : column + SIZE]
        if steps % 2:
            images = images.flip(-1)
        contrast, brightness = torch.rand(2, TRAINING_BATCH, 1, 1, 1)
        logits = model(images * (0.6 + 0.8 * contrast) + brightness - 0.5)
        optimiser.zero_grad()
        F.cross_entropy(logits, y[chosen]).backward()
        optimiser.step()
        right = 0.95 * right + 0.05 * (logits.argmax(1) == y[chosen]).float().mean().item()
        steps += 1
    print(f"trained {arch}: {steps} steps, {100 * right:.1f} % right (running mean)", flush=True)
    return model.state_dict()


def step_times(
    forced: Objective, other: Objective, x: Tensor, pairs: int
) -> list[tuple[float, float]]:
    """Return the seconds of a step, forced and other, in interleaved pairs."""

    def seconds(objective: Objective) -> float:
        start = time.perf_counter()
        exact(objective, x)
        return time.perf_counter() - start

    seconds(forced), seconds(other)  # warm-up
    return [(seconds(forced), seconds(other)) for _ in range(pairs)]


def cost_rows(arch: str, size: int, batch_size: int, pairs: int) -> list[list]:
    """Measure time and memory of both couplings on random weights; return a row for each pair."""
    objectives = [
        photo_objective(arch, size, batch_size, weights=COST_WEIGHTS, bn_coupling=coupling)
        for coupling in ("forced", "exact")
    ]
    x = initial_images(0, batch_size, (3, size, size), torch.float32)
    forced_bytes, exact_bytes = (
        peak_bytes(functools.partial(exact, objective, x)) for objective in objectives
    )
    forced, other = objectives
    return [
        [arch, size, batch_size, pair, there, here, here / there, exact_bytes, forced_bytes]
        for pair, (here, there) in enumerate(step_times(forced, other, x, pairs))
    ]


def scores(images: Tensor, true: Tensor) -> tuple[float, float]:
    """Return mean PSNR and SSIM of images in [0, 1] after the best pairing."""
    paired = images[assign(images, true)]
    return psnr(paired, true).mean().item(), ssim(paired, true).mean().item()


def attack_rows(name: str, seed: int, pairs: int, body: dict[str, Tensor] | None) -> list[list]:
    """Attack one client with both couplings; return a row for each."""
    case = CASES[name]
    objectives = {
        coupling: photo_objective(
            case.arch, SIZE, BATCH_SIZE, seed=seed, weights=case.weights, bn_coupling=coupling,
            body=body,
        )
        for coupling in BN_COUPLINGS
    }  # fmt: skip
    true, _ = photo_batch(BATCH_SIZE, 1, SIZE, seed=seed)
    x_true = normalise(true, SPEC)
    mean, std = SPEC.normalisation
    noise = initial_images(1000 + seed, BATCH_SIZE, (3, SIZE, SIZE), torch.float32)
    near = x_true + 10 ** (-NEAR / 20) * noise / std
    start = initial_images(seed, BATCH_SIZE, (3, SIZE, SIZE), torch.float32)
    times = step_times(objectives["forced"], objectives["exact"], start, pairs)
    ratio = statistics.median(forced / other for forced, other in times)
    flat = [value for x in baselines(true).values() for value in scores(x, true)]
    box = (-mean / std, (1 - mean) / std)
    loop = Loop(case.steps, case.lr, signed=True, box=box, keep_best=True)
    rows = []
    for coupling, objective in objectives.items():
        x = reconstruct(functools.partial(exact, objective), start, loop).x
        found = scores(denormalise(x, mean, std), true)
        distances = [each.gradient_distance(x) for each in (objective, objectives["exact"])]
        distances.append(objective.gradient_distance(near))
        relative = ratio if coupling == "forced" else 1.0
        rows.append([name, seed, coupling, case.steps, *found, *distances, *flat, relative])
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="pairs of steps that are timed, 5 or 15")
    parser.add_argument("--only-cost", action="store_true", help="time and memory, no attack")
    parser.add_argument("--training-seconds", type=float, default=60.0)
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    rows = []
    if args.only_cost:
        for arch, size, batch_size in COSTS:
            rows += cost_rows(arch, size, batch_size, args.pairs or 15)
            ratios = [row[6] for row in rows if row[0] == arch]
            low, middle, high = statistics.quantiles(ratios, n=4)
            exactly, forced = (rows[-1][i] / 2**20 for i in (7, 8))
            print(
                f"{arch}, {size} px, B {batch_size}: forced / exact {middle:.2f} "
                f"({low:.2f} to {high:.2f}), {forced:.1f} MiB against {exactly:.1f} MiB",
                flush=True,
            )
        if args.csv:
            write_csv(COST_HEADER, rows, args.csv)
        return
    for name in args.networks:
        case = CASES[name]
        body = trained_weights(case.arch, args.training_seconds, 0) if case.trained else None
        for seed in range(args.seeds):
            rows += attack_rows(name, seed, args.pairs or 5, body)
    print(table(HEADER, rows))
    if args.csv:
        write_csv(HEADER, rows, args.csv)


if __name__ == "__main__":
    main()
