"""Times the layerwise attack step by step, and whole against another version of the code.

    python -m benchmarks.layerwise_time --csv docs/rows/layerwise_time.csv [--weights FILE]
    python -m benchmarks.layerwise_time --before FOLDER --csv docs/rows/layerwise_speed.csv
    python -m benchmarks.layerwise_time --markdown docs/rows/layerwise_speed.csv

The first command writes the CPU seconds of every step and every tensor per case, in a process of
its own. A step's time is its own: what it calls that is a step, too, does not count for it. The
second one runs each case with the code of the checkout in FOLDER and with this one in turn, in
processes, and prints the medians, the median ratio and by how much certificates and images differ.
With --sensitivity it also says by how much images differ if the code in FOLDER disturbs all that
the walk recovered by random numbers of 1e-9 of it before images are made of that. The third one
prints the table of such rows. Photographs are those of batch 10. --weights gives a trained network
(benchmarks/train_network.py); the cases that need one are left out without it.
"""

import argparse
import csv
import functools
import importlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.layerwise import SPEC, client
from benchmarks.layerwise_cases import Case
from inversion.layerwise import attack
from inversion.layerwise.images import PUBLIC_IMAGES
from inversion.layerwise.layer import Layer
from train.datasets import normalise
from utils.console import table
from utils.files import write_csv
from utils.image_files import public_photographs
from utils.tensor_files import load_plain

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "train-2": Case(batch=2, index=10, train_mode=True, control=False),
    "train-4": Case(batch=4, index=10, train_mode=True, control=False),
    "eval-8": Case(batch=8, index=10, control=False),
    "resnet50": Case("resnet50", size=64, batch=4, index=10, control=False),
    "trained-8": Case(batch=8, index=10, train_mode=True, trained=True, head="keep",
                      classes_used=5, control=False),
    "trained-16": Case(batch=16, index=10, train_mode=True, trained=True, head="keep",
                       classes_used=8, control=False),
}  # fmt: skip
#: Step → functions whose time it is, by module below `inversion.layerwise` and name there.
STEPS: dict[str, Sequence[tuple[str, str]]] = {
    "tracing the network": [("attack", "target_network")],
    "head": [("certify", "solve_head")],
    "direct attack on a convolution": [("peel", "_find_anchor")],
    "positions of a pooling": [("peel", "find_route")],
    "equations about a tensor": [("certify", "solve_tensor")],
    "dense solves": [("solve", "solve_gradients")],
    "last digits on all equations": [
        ("solve", "polished"), ("solve", "conjugate_gradients"), ("solve", "preconditioner"),
    ],
    "outputs behind BatchNorm": [("solve", "outputs_from_gradient"), ("solve", "search_mask")],
    "images' common part": [("solve", "common_offset")],
    "mask repair": [("solve", "repaired"), ("refine", "repaired"), ("joint", "repaired")],
    "Gauss-Newton": [("refine", "start_coupled"), ("refine", "refine_coupled")],
    "Gauss-Newton's certificate": [
        ("refine", "_with_rank"), ("refine", "_with_error"), ("refine", "_with_certificate"),
    ],
    "all equations together": [("solve", "solve_all_equations")],
    "other work of the walk": [("attack", "peel")],
    "decoder": [("images", "_decoded")],
    "images by the stem": [("images", "_solved_stem")],
    "images by matching": [
        ("images", "match_activations"), ("images", "whitening"), ("images", "match_smoothly"),
    ],
}  # fmt: skip
REST = "other work"
#: What of a certificate is compared between two versions of the code.
COMPARED = ("residual", "expected_error", "condition")
#: Share of a case's time from which a step stands in its table.
LEAST_SHARE = 0.04
#: Relative size of the random numbers that show how sensitive images are.
DISTURBED = 1e-9


class Stopwatch:
    """Sums CPU seconds by step, each without those of the steps inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = [REST]
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def of(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted for this step."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(step)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return timed

    def watch(self) -> None:
        """Count the time of all STEPS that this version of the code has."""
        for step, functions in STEPS.items():
            for module_name, name in functions:
                module = importlib.import_module(f"inversion.layerwise.{module_name}")
                if hasattr(module, name):
                    setattr(module, name, self.of(step, getattr(module, name)))


def disturb(peeled: Any) -> None:
    """Change the values that a walk recovered by DISTURBED of themselves, at random."""
    generator, values = torch.Generator().manual_seed(1), peeled.network.values
    for node, t in values.items():
        values[node] = t * (
            1 + DISTURBED * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        )


def measure(case: Case, weights: str | None, *, disturbed: bool = False) -> dict:
    """Attack one case; return seconds by step and by tensor, certificates and images.

    disturbed: the values that the walk recovered are disturbed before images are made of them.
    """
    of = client(case, None if weights is None else load_plain(weights))
    public = normalise(public_photographs(PUBLIC_IMAGES, of.target.image_shape), SPEC)
    tensors: list[tuple[str, str, float]] = []
    watch = Stopwatch()
    watch.watch()
    if disturbed:
        make = attack.make_images

        def making(model: Any, target: Any, peeled: Any, *args: Any, **kwargs: Any) -> Any:
            disturb(peeled)
            return make(model, target, peeled, *args, **kwargs)

        attack.make_images = making
    start = last = time.process_time()

    def told(layer: Layer) -> None:
        nonlocal last
        now = time.process_time()
        tensors.append((layer.name, layer.kind, now - last))
        last = now

    found = watch.of(REST, attack.layerwise_attack)(
        of.model, of.target, of.y, public, on_layer=told
    )
    names = ("name", "certified", "rank", "flips", *COMPARED)
    return {
        "seconds": time.process_time() - start, "steps": dict(watch.seconds), "tensors": tensors,
        "certificates": [[getattr(layer, name) for name in names] for layer in found.layers],
        "images": found.images,
    }  # fmt: skip


def measured_in(folder: Path, case: str, weights: str | None, *, disturbed: bool = False) -> dict:
    """Return what `measure` does with the code of a checkout, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        command = [sys.executable, __file__, "--measure", case, "--output", file.name]
        command += ["--disturbed"] * disturbed
        command += [] if weights is None else ["--weights", str(Path(weights).resolve())]
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=environment, check=True)
        return load_plain(file.name)


def images_apart(before: dict, after: dict) -> float:
    """Return the root mean square difference of two results' images, pixels from 0 to 1."""
    std = torch.tensor(SPEC.std).view(-1, 1, 1)
    return ((after["images"] - before["images"]) * std).square().mean().sqrt().item()


def difference(before: dict, after: dict) -> dict:
    """Return how far two results of one case differ.

    `images`: the root mean square over pixels from 0 to 1. The rest: of the certificates in the
    same order, relative to the first one's, the largest; infinite where tensors, ranks, masks or
    verdicts differ.
    """
    found = {"images": images_apart(before, after)}
    same = [row[:4] for row in before["certificates"]] == [row[:4] for row in after["certificates"]]
    for i, name in enumerate(COMPARED, 4):
        pairs = [
            (a[i], b[i])
            for a, b in zip(before["certificates"], after["certificates"], strict=False)
            if a[i] is not None and b[i] is not None
        ]
        apart = max((abs(b - a) / max(abs(a), 1e-300) for a, b in pairs), default=0.0)
        found[name] = apart if same else float("inf")
    return found


def steps(cases: Sequence[str], weights: str | None) -> tuple[list[str], list[list]]:
    """Measure every case once; print and return header and rows: one per step and per tensor."""
    rows: list[list] = []
    for case in cases:
        found = measured_in(ROOT, case, weights)
        whole = found["seconds"]
        ordered = sorted(found["steps"].items(), key=lambda pair: -pair[1])
        rows += [[case, "step", name, seconds] for name, seconds in ordered]
        rows += [[case, f"tensor: {kind}", name, s] for name, kind, s in found["tensors"]]
        rows.append([case, "whole", "", whole])
        print(f"{case}: {whole:.1f} CPU s")
        shown = [[name, f"{s:.2f}", f"{s / whole:.0%}"] for name, s in ordered if s >= 0.005]
        print(table(["step", "CPU s", "share"], shown), flush=True)
    return ["case", "what", "name", "cpu_seconds"], rows


def against(
    before: Path, cases: Sequence[str], weights: str | None, rounds: int, *, sensitivity: bool
) -> tuple[list[str], list[list]]:
    """Measure both checkouts in turn; print and return header and rows: one per pair of runs."""
    rows = []
    for case in cases:
        sensitive = float("nan")
        for number in range(rounds):
            old, new = (measured_in(folder, case, weights) for folder in (before, ROOT))
            apart = difference(old, new)
            if sensitivity and number == 0:
                other = measured_in(before, case, weights, disturbed=True)
                sensitive = images_apart(old, other)
            apart["images_disturbed"] = sensitive
            rows.append([case, number, old["seconds"], new["seconds"], *apart.values()])
            print(rows[-1], flush=True)
    return ["case", "round", "before", "after", *(f"{name}_apart" for name in apart)], rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the Markdown table of the rows that `steps` or `against` returned."""
    of: dict[str, list[list]] = defaultdict(list)
    for row in rows:
        of[row[0]].append([*row[1:]])
    lines = []
    for case, found in of.items():
        if header[1] == "what":
            whole = next(float(row[2]) for row in found if row[0] == "whole")
            shares = [(row[1], float(row[2])) for row in found if row[0] == "step"]
            parts = [f"{name} {s / whole:.0%}" for name, s in shares if s >= LEAST_SHARE * whole]
            lines.append([case, f"{whole:.1f}", ", ".join(parts)])
            continue
        numbers = [[float(value) for value in row[1:]] for row in found]
        before, after, *apart = (statistics.median(column) for column in zip(*numbers, strict=True))
        ratios = sorted(new / old for old, new, *_ in numbers)
        spread = f" ({ratios[0]:.2f}–{ratios[-1]:.2f})" if len(ratios) > 1 else ""
        ratio = f"{statistics.median(ratios):.2f}{spread}"
        sizes = ("–" if math.isnan(value) else f"{value:.0e}" for value in apart)
        lines.append([case, f"{before:.1f}", f"{after:.1f}", ratio, *sizes])
    head = ["case", "CPU s", "steps"]
    if header[1] != "what":
        head = ["case", "before, CPU s", "after", "ratio", *(name.replace("_", " ")
                for name in header[4:])]  # fmt: skip
    whole_table = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in whole_table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--csv", help="file for the raw rows")
    parser.add_argument("--weights", help="weights that benchmarks/train_network.py wrote")
    parser.add_argument("--only", help="cases to run, such as train-4,eval-8")
    parser.add_argument("--before", type=Path, help="checkout whose code is compared with this one")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each version per case")
    parser.add_argument(
        "--sensitivity", action="store_true", help="run FOLDER's code on disturbed tensors, too"
    )
    parser.add_argument("--markdown", type=Path, help="file of rows whose table to print")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--disturbed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        found = measure(CASES[args.measure], args.weights, disturbed=args.disturbed)
        torch.save(found, args.output)
        return
    if args.markdown:
        with args.markdown.open(newline="") as file:
            header, *rows = csv.reader(file)
        print(markdown(header, rows))
        return
    cases = [n for n, case in CASES.items() if args.weights is not None or not case.trained]
    if args.only:
        cases = args.only.split(",")
    if args.before is None:
        header, rows = steps(cases, args.weights)
    else:
        header, rows = against(
            args.before.resolve(), cases, args.weights, args.rounds, sensitivity=args.sensitivity
        )
    print(markdown(header, rows))
    if args.csv:
        write_csv(header, rows, args.csv)


if __name__ == "__main__":
    main()
