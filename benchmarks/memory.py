"""Compares the memory and time of the exact derivative whole and in chunks, and checks the counts.

    python -m benchmarks.memory --csv FILE

Parts of the rows. "flat": what tensors take at their most, and the ratio of the times of a step in
interleaved pairs, for growing batches. "time": that ratio alone, at 224 px. "count": the bytes
counted on shapes alone beside those of the tensors that operations make, and beside what a fresh
process on the CPU takes more; where real images would take too long only counted. "plan": the
chunks that --max-memory picks for a batch. Machines are noisy: quote the ratio. Nothing but the
counts is comparable between machines.
"""

import argparse
import ctypes
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.setting import photo_objective
from inversion.audit.memory import HEAP, memory_plan
from inversion.counting import chunk_bytes, evaluation_bytes, on_shapes
from inversion.objective import Objective
from inversion.pixel_gradient import exact
from inversion.settings import AttackSettings, Loop
from utils.console import table
from utils.files import write_csv
from utils.live_bytes import peak_bytes
from utils.shard import ALONE

MODES: dict[str, dict[str, Any]] = {
    "eval": {"train_mode": False},
    "forced": {"bn_coupling": "forced"},
}
HEADER = [
    "part", "network", "pixels", "mode", "batch", "chunk", "saved MiB", "counted MiB", "held MiB",
    "resident MiB", "time / whole", "first quartile", "third quartile",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Says what is evaluated."""

    network: str
    size: int
    mode: str
    batch: int
    #: Images at a time; 0 for all.
    chunk: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image."""
        return 3, self.size, self.size

    def objective(self) -> Objective:
        """Return the objective, and make its client's gradient."""
        found = photo_objective(self.network, self.size, self.batch, **MODES[self.mode])
        return found.in_chunks(self.chunk or None)

    def start(self) -> Tensor:
        """Return images to evaluate."""
        return torch.randn(self.batch, *self.shape, generator=torch.Generator().manual_seed(0))

    def counted(self, objective: Objective) -> int:
        """Return the bytes that are expected, counted on shapes alone."""
        if self.chunk:
            return chunk_bytes(objective, self.shape, self.chunk)
        return evaluation_bytes(exact, objective, self.shape, self.batch)

    def row(self, part: str, *figures: object) -> list:
        """Return a row with these figures."""
        chunk = self.chunk or ""
        found = [part, self.network, self.size, self.mode, self.batch, chunk, *figures]
        return found + [""] * (len(HEADER) - len(found))


def mib(number: int) -> float:
    """Return bytes in MiB."""
    return round(number / 2**20, 1)


def saved_bytes(setting: Setting, objective: Objective) -> int:
    """Return the bytes of all tensors that the graph of a step saves, each storage once."""
    images = setting.chunk or setting.batch
    shapes = on_shapes(objective, images)
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    x = torch.empty(images, *setting.shape, device="meta").requires_grad_()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        graph = shapes.gradient_and_priors(x)
    own = [*shapes.model.parameters(), *shapes.model.buffers()]
    beside = {id(tensor.untyped_storage()) for tensor in own}
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in beside)
    del graph
    return total


def resident_bytes(setting: Setting) -> int:
    """Return what a fresh process takes more at the most of one step."""
    words = [setting.network, setting.size, setting.mode, setting.batch, setting.chunk]
    command = [sys.executable, "-m", "benchmarks.memory", "--one", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def resident_growth(setting: Setting) -> int:
    """Return what this process takes more at the most of one step; on Linux."""

    def kibibytes(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 0 if found is None else int(found[1])

    objective, x = setting.objective(), setting.start()
    exact(photo_objective("lenet", 32, 1), torch.randn(1, 3, 32, 32))  # loads what is loaded once
    ctypes.CDLL(None).malloc_trim(0)  # or the step fills gaps that the client's gradient left
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = kibibytes("VmRSS")
    exact(objective, x)
    return 1024 * (kibibytes("VmHWM") - before)


def time_ratio(one: Objective, other: Objective, x: Tensor, pairs: int) -> list[float]:
    """Return the median and quartiles of the ratio of step times of interleaved pairs."""

    def seconds(objective: Objective) -> float:
        start = time.perf_counter()
        exact(objective, x)
        return time.perf_counter() - start

    seconds(one), seconds(other)  # warm-up
    ratios = [seconds(one) / seconds(other) for _ in range(pairs)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [round(value, 3) for value in (middle, low, high)]


def flat_rows(network: str, size: int, mode: str, batches: list[int], chunk: int, pairs: int):
    """Return the rows of growing batches, whole and in chunks, of the largest also in larger."""
    for batch in batches:
        whole = Setting(network, size, mode, batch, 0)
        objective, x = whole.objective(), whole.start()
        held = mib(peak_bytes(partial(exact, objective, x)))
        yield whole.row("flat", "", mib(whole.counted(objective)), held)
        larger = [batch // 4, batch // 2] if batch == max(batches) else []
        for size_of_chunk in sorted({chunk, *larger}):
            if not 0 < size_of_chunk < batch:
                continue
            parts, in_chunks = (
                replace(whole, chunk=size_of_chunk),
                objective.in_chunks(size_of_chunk),
            )
            held = mib(peak_bytes(partial(exact, in_chunks, x)))
            ratios = time_ratio(in_chunks, objective, x, pairs)
            yield parts.row("flat", "", mib(parts.counted(objective)), held, "", *ratios)


def count_row(setting: Setting, *, real: bool) -> list:
    """Return the bytes of one setting by several ways; real: also of real tensors."""
    small = Setting(setting.network, 64, setting.mode, 2, 0)
    objective = (setting if real else small).objective()
    saved, counted = saved_bytes(setting, objective), setting.counted(objective)
    if not real:
        return setting.row("count", mib(saved), mib(counted))
    held = peak_bytes(partial(exact, objective, setting.start()))
    resident = resident_bytes(setting)
    return setting.row("count", mib(saved), mib(counted), mib(held), mib(resident))


def plan_row(setting: Setting, limit: int, device: str) -> list:
    """Return the chunk that a limit picks, and what is expected then."""
    small = Setting(setting.network, 64, setting.mode, 2, 0)
    objective = small.objective()
    objective.y = objective.y[:1].expand(setting.batch)
    asked = AttackSettings(objective.weights, Loop(1, 1.0), matching_memory=limit)
    plan = memory_plan(
        asked, objective, setting.shape, ALONE, heap=HEAP if device == "cpu" else 1.0
    )
    assert plan is not None
    chosen = replace(setting, chunk=plan.chunk_size or 0)
    return chosen.row(f"plan {device} {limit / 2**30:g} GiB", "", mib(plan.expected))


def rows_of(args: argparse.Namespace):
    """Go through all rows."""
    for mode in MODES:
        yield from flat_rows("resnet18", 64, mode, args.batches, args.chunk, args.pairs)
    for mode in MODES:
        whole = Setting("resnet50", 224, mode, 4, 0)
        objective = whole.objective()
        ratios = time_ratio(objective.in_chunks(2), objective, whole.start(), args.pairs)
        yield replace(whole, chunk=2).row("time", "", "", "", "", *ratios)
        for network, size, batch, chunk in (
            ("convnet", 32, 64, 0), ("resnet18", 64, 32, 0), ("resnet18", 64, 32, 8),
            ("resnet50", 64, 16, 0), ("resnet50", 224, 1, 0), ("resnet50", 224, 2, 0),
            ("resnet50", 224, 4, 2),
        ):  # fmt: skip
            yield count_row(Setting(network, size, mode, batch, chunk), real=True)
        for batch in (4, 8, 16, 32, 64):
            yield count_row(Setting("resnet50", 224, mode, batch, 0), real=False)
        for device in ("cpu", "gpu"):
            yield plan_row(Setting("resnet50", 224, mode, 256, 0), 20 * 2**30, device)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--chunk", type=int, default=4, help="images at a time")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of steps that are timed")
    parser.add_argument("--one", nargs=5, help="network, pixels, mode, batch, chunk of one step")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    if args.one:
        network, size, mode, batch, chunk = args.one
        print(resident_growth(Setting(network, int(size), mode, int(batch), int(chunk))))
        return
    rows = []
    for row in rows_of(args):
        rows.append(row)
        print(*row, flush=True)
        if args.csv:  # after every row: the last ones take minutes
            write_csv(HEADER, rows, args.csv)
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
