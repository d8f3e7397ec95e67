"""Measures on a GPU what no CPU shows: graphs, number formats, batches of 256, layers' solves.

    benchmarks/gpu.sh FOLDER
    python -m benchmarks.gpu --section step --out FOLDER

Every section appends its rows to FOLDER/gpu_SECTION.csv as they are measured, and ends before its
`--seconds` are over. On a machine without a GPU it runs on the CPU; `--smoke` makes all of it tiny,
to see that it works.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_steps import (
    CPU_WAYS,
    WAYS,
    Way,
    copy_peak,
    free,
    matmul_peak,
    run_of,
    step_rows,
)
from benchmarks.setting import photo_objective
from inversion.objective import Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import exact
from inversion.precision import in_precision
from inversion.restarts import initial_images
from inversion.settings import PRECISIONS, Loop, Weights
from train.datasets import DATASETS, normalise
from train.photos import photo_batch
from utils.device import choose_device, device_name
from utils.images import denormalise
from utils.matching import assign
from utils.metrics import psnr, ssim

ROOT = Path(__file__).resolve().parent.parent
SPEC = DATASETS["photos"]
#: Images per step of a batch that is taken in chunks.
CHUNK = 32


@dataclass(frozen=True)
class Bench:
    """Says where a section measures, how long, and how small."""

    device: torch.device
    #: Moment by `time.monotonic` after which nothing new is begun.
    deadline: float
    smoke: bool

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.deadline

    @property
    def precisions(self) -> tuple[str, ...]:
        """The number formats that the device has."""
        return tuple(p for p in PRECISIONS if p != "tf32" or self.device.type == "cuda")


# Sections ----------------------------------------------------------------------------------


def peaks(bench: Bench) -> Iterator[dict]:
    """Measure products of matrices in every number format, and copies."""
    size = 256 if bench.smoke else 8192
    for precision in bench.precisions:
        found = matmul_peak(bench.device, precision, size)
        yield {"what": f"matrix product, {precision}", "size": size, "tera_per_s": found / 1e12}
    found = copy_peak(bench.device, size**2)
    yield {"what": "copy, bytes", "size": size**2, "tera_per_s": found / 1e12}


def step(bench: Bench) -> Iterator[dict]:
    """Measure an iteration of ResNet-50 at 224 px in every way, at batches of 8, 64 and 256.

    In train mode, as a client's gradient mostly is; and in eval mode, where a batch can be taken in
    chunks.
    """
    on_gpu = bench.device.type == "cuda"
    ways: Sequence[Way] = WAYS if on_gpu else CPU_WAYS
    arch, size = ("lenet", 16) if bench.smoke else ("resnet50", 224)
    batches = (2, 3) if bench.smoke else (8, 64, 256)
    product = 256 if bench.smoke else 8192
    limits = {p: matmul_peak(bench.device, p, product) for p in bench.precisions}
    options = {"rounds": 2, "steps": 2 if bench.smoke else 5, "repeats": 2 if bench.smoke else 5}
    chunk = 2 if bench.smoke else CHUNK
    chunked = tuple(
        replace(way, name=f"{way.name}, chunks of {chunk}", chunk=chunk)
        for way in (Way("exact"), *ways[-1:])
    )
    plan = [(batch, True, ways) for batch in batches]
    plan += [(batch, False, (*ways[1:3], *chunked)) for batch in batches[1:]]
    for batch, train_mode, chosen in plan:
        rows = step_rows(
            arch, size, batch, chosen, limits, bench.device, train_mode=train_mode, **options
        )
        for row in rows:
            yield row
            if bench.over:
                return
        free(bench.device)


def loop(bench: Bench) -> Iterator[dict]:
    """Measure iterations of small networks: read every time, read rarely, and as a graph."""
    count, rounds = (4, 2) if bench.smoke else (100, 5)
    kinds = {"read every iteration": (Way(""), 1), "read rarely": (Way(""), count)}
    if bench.device.type == "cuda":
        kinds["graph, read rarely"] = (Way("", graph=True), count)
    networks = ("lenet",) if bench.smoke else ("lenet", "convnet", "resnet18")
    for arch in networks:
        objective = photo_objective(arch, 32, 8, device=bench.device)
        x = initial_images(0, 8, (3, 32, 32), torch.float32).to(bench.device)
        runs = {name: run_of(objective, x, way, every) for name, (way, every) in kinds.items()}
        for number in range(rounds + 1):  # the first round warms up
            for name, run in runs.items():
                every = kinds[name][1]
                begin, first = time.perf_counter(), number * count
                for done in range(first, first + count, every):
                    run.improve(range(done, done + every), None)
                ms = 1e3 * (time.perf_counter() - begin) / count
                if number:
                    yield {"arch": arch, "size": 32, "batch": 8, "kind": name, "round": number,
                           "iterations": count, "ms": ms}  # fmt: skip
            if bench.over:
                return


#: Network → iterations, first step size and weights of the attacks that compare number formats.
ATTACKS = {
    "lenet": (1000, 0.05, Weights(priors={"tv": 1e-4})),
    "convnet": (1000, 0.1, Weights(priors={"tv": 1e-2, "bn": 1e-2})),
    "resnet18": (400, 0.1, Weights(priors={"tv": 1e-2, "bn": 1e-3})),
}


def agreement(objective: Objective, x: Tensor, precision: str) -> tuple[float, float]:
    """Compare a format's derivative at `x` with float32's: share of equal signs, and cosine."""
    _, true = exact(objective, x)
    _, found = in_precision(exact, precision)(objective, x, 0.0)
    same = (true.sign() == found.sign()).double().mean().item()
    cosine = torch.nn.functional.cosine_similarity(true.flatten(), found.flatten(), dim=0)
    return same, cosine.item()


def signs(bench: Bench) -> Iterator[dict]:
    """Compare derivatives in every number format with float32's, at random weights.

    At normal initial images, and at the truth with a tenth of such noise.
    """
    device, size, batch = bench.device, 16 if bench.smoke else 32, 4
    networks = ("lenet",) if bench.smoke else ("lenet", "convnet", "resnet18", "resnet50")
    modes = ("train", "eval")
    for arch, seed, mode in itertools.product(networks, range(1 if bench.smoke else 3), modes):
        objective = photo_objective(
            arch, size, batch, seed=seed, device=device, train_mode=mode == "train"
        )
        true, _ = photo_batch(batch, 1, size, seed=seed)
        start = initial_images(seed, batch, (3, size, size), torch.float32).to(device)
        images = {"start": start, "near truth": normalise(true, SPEC).to(device) + 0.1 * start}
        for name, (where, x) in itertools.product(bench.precisions[1:], images.items()):
            same, cosine = agreement(objective, x, name)
            yield {"arch": arch, "mode": mode, "size": size, "batch": batch, "seed": seed,
                   "precision": name, "where": where, "same_signs": same,
                   "cosine": cosine}  # fmt: skip
        if bench.over:
            return


def precision(bench: Bench) -> Iterator[dict]:
    """Attack the same clients in every number format; tell images and losses.

    `run` numbers attacks with everything equal: where a GPU adds in another order each time, two
    attacks in float32 differ, and that is the measure of every difference.
    """
    device, size, batch = bench.device, 16 if bench.smoke else 32, 2 if bench.smoke else 8
    seeds = range(1 if bench.smoke else 2)
    mean, std = SPEC.normalisation
    box = (-mean / std, (1 - mean) / std)
    for arch, seed, mode in itertools.product(ATTACKS, seeds, ("train", "eval")):
        if bench.smoke and (arch, mode) != ("lenet", "train"):
            continue
        steps, rate, weights = ATTACKS[arch]
        objective = photo_objective(
            arch, size, batch, seed=seed, weights=weights, device=device,
            train_mode=mode == "train",
        )  # fmt: skip
        true, _ = photo_batch(batch, 1, size, seed=seed)
        start = initial_images(seed, batch, (3, size, size), torch.float32).to(device)
        settings = Loop(
            3 if bench.smoke else steps, rate, signed=True, box=box, keep_best=True, read_every=100
        )
        runs = [(name, 0) for name in bench.precisions] + [("float32", 1)]
        for name, number in runs:
            begin = time.perf_counter()
            found = reconstruct(partial(in_precision(exact, name), objective), start, settings)
            seconds = time.perf_counter() - begin
            images = denormalise(found.x.cpu(), mean, std)
            paired = images[assign(images, true)]
            yield {
                "arch": arch, "mode": mode, "size": size, "batch": batch, "seed": seed,
                "precision": name, "run": number, "iterations": settings.steps,
                "psnr": psnr(paired, true).mean().item(),
                "ssim": ssim(paired, true).mean().item() if size > 10 else "",
                "distance": objective.gradient_distance(found.x), "seconds": seconds,
            }  # fmt: skip
            if bench.over:
                return


def script(name: str, *flags: object, gpu: bool = True) -> None:
    """Run training.py or run.py in a process of its own; without `gpu` it sees none."""
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(ROOT / name), *map(str, flags)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **hidden})
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-300:]}")


def captured(folder: Path, *flags: object) -> Path:
    """Capture photographs into `folder`; return the checkpoint's path."""
    script("training.py", "--data-name", "photos", "--results", folder, *flags)
    return next(folder.glob("*-checkpoint.pth.tar"))


def result_of(folder: Path, name: str, *flags: object, gpu: bool = True) -> tuple[dict, Tensor]:
    """Attack under the name `name`; return result.json and the images."""
    script("run.py", "--root", folder, "--id", name, "--save-every", 0, *flags, gpu=gpu)
    results = folder / "results" / "exp" / name
    return json.loads((results / "result.json").read_text()), torch.load(results / "x_recon.pth")


def seeds(bench: Bench) -> Iterator[dict]:
    """Attack from four seeds: one after the other, and in several processes on the one device."""
    counts, epochs = ((1,), 2) if bench.smoke else ((1, 2, 4), 300)
    graphs = (False, True) if bench.device.type == "cuda" else (False,)
    networks = {"lenet": 16} if bench.smoke else {"lenet": 32, "resnet18": 32}
    for arch, size in networks.items():
        with tempfile.TemporaryDirectory() as name:
            folder, alone = Path(name), None
            path = captured(folder, "-a", arch, "-b", 8, "--image-size", size)
            for count, graph in itertools.product(counts, graphs):
                several = ("--nproc", count, "--shard", "seeds", "--dist-backend", "gloo")
                result, images = result_of(
                    folder, f"{count}-{graph}", "--checkpoint", path, "--epochs", epochs, "--lr",
                    0.1, "--TV", 1e-4, "--grad-sign", "--n-seed", 1 if bench.smoke else 4,
                    *(several if count > 1 else ()), *(["--cuda-graph"] if graph else ()),
                )  # fmt: skip
                alone = images if alone is None else alone
                yield {
                    "arch": arch, "size": size, "batch": 8, "processes": count, "graph": graph,
                    "iterations": result["iterations"], "seconds": result["seconds"],
                    "peak_mib_of_first": result["peak_memory_mib"],
                    "largest_difference": (images - alone).abs().max().item(),
                }  # fmt: skip
                if bench.over:
                    return


def layerwise(bench: Bench) -> Iterator[dict]:
    """Solve gradients layer by layer, on the GPU and on the CPU."""
    clients: Sequence[tuple] = (
        ("-a", "lenet", "-b", 1, "--image-size", 16, "--outlayer-state", "keep"),
        ("-a", "resnet18", "-b", 2, "--image-size", 32, "--upload-bn"),
        ("-a", "resnet18", "-b", 4, "--image-size", 32, "--upload-bn"),
    )
    places = (True, False) if bench.device.type == "cuda" else (False,)
    for client in clients[:1] if bench.smoke else clients:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = captured(folder, *client)
            for gpu in places:
                result, _ = result_of(
                    folder, f"gpu-{gpu}", "--checkpoint", path, "--attack", "layerwise",
                    "--metric", "--no-controls", gpu=gpu,
                )  # fmt: skip
                layers = result["layerwise"]["layers"]
                yield {
                    "arch": client[1], "batch": client[3], "size": client[5],
                    "where": "gpu" if gpu else "cpu", "layers": len(layers),
                    "seconds_of_layers": sum(layer["seconds"] for layer in layers),
                    "seconds": result["seconds"],
                    "psnr": result["metrics"]["mean"]["psnr"],
                }  # fmt: skip
                if bench.over:
                    return


#: name → section.
SECTIONS = {
    "peaks": peaks, "loop": loop, "signs": signs, "precision": precision, "step": step,
    "seeds": seeds, "layerwise": layerwise,
}  # fmt: skip
#: Columns that a row of `step` may lack.
STEP_COLUMNS = (
    "arch", "size", "batch", "mode", "way", "round", "steps", "lower_quartile_ms", "median_ms",
    "upper_quartile_ms", "peak_mib", "reserved_mib", "exact_gflop", "exact_tflops",
    "share_of_matmul", "note",
)  # fmt: skip


def write_rows(rows: Iterator[dict], path: Path, always: dict) -> int:
    """Append rows to a CSV file as they come, and print them; return how many there were."""
    count = 0
    for row in rows:
        row = always | row
        header = [*always, *STEP_COLUMNS] if "way" in row else list(row)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, header)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(*row.values(), flush=True)
        count += 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one section, print and write its rows."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--section", choices=SECTIONS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--seconds", type=float, default=600.0, help="when to begin nothing more")
    parser.add_argument("--smoke", action="store_true", help="make all of it tiny")
    args = parser.parse_args(argv)
    device = choose_device(None)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(device, time.monotonic() + args.seconds, args.smoke)
    always = {"device": device_name(device), "torch": torch.__version__}
    path = args.out / f"gpu_{args.section}.csv"
    count = write_rows(SECTIONS[args.section](bench), path, always)
    end = "; its time was over" if bench.over else ""
    print(f"{args.section}: {count} rows in {path}{end}", flush=True)
    if not count:
        sys.exit(f"{args.section}: no row")


if __name__ == "__main__":
    main()
