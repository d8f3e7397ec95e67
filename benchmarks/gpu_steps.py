"""One iteration of the attack in several ways, for benchmarks/gpu.py: its time, memory, operations.

The ways are measured in turn, several rounds of them, and the memory of one is freed before the
next. Every measurement is that of whole iterations of the loop, read at the end.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.setting import photo_objective
from inversion.objective import Objective
from inversion.optimise import Run
from inversion.pixel_gradient import PIXEL_GRADIENTS, exact
from inversion.precision import PRECISION_CONTEXTS, in_precision
from inversion.restarts import initial_images
from inversion.settings import FINITE_DIFFERENCES, Loop
from utils.errors import is_out_of_memory, one_line
from utils.shard import ALONE

#: Steps of all measured loops; the rates fall so slowly that every step is alike.
LOOP = Loop(100_000, 0.01, signed=True, keep_best=True)
#: Steps before a measurement: those of `inversion.step_graph.WARM_UPS`, and the recording.
WARM_UPS = 5


@dataclass(frozen=True)
class Way:
    """Says how an iteration is computed."""

    name: str
    method: str = "exact"
    graph: bool = False
    channels_last: bool = False
    precision: str = "float32"
    #: Images whose graph is kept at the same time; None for all.
    chunk: int | None = None


#: All ways on a GPU; the first one is the twin that every other one is compared with.
WAYS = (
    Way("plain", "plain"),
    Way("exact"),
    Way("exact, graph", graph=True),
    Way("finite differences, graph", FINITE_DIFFERENCES, graph=True),
    Way("exact, graph, channels_last", graph=True, channels_last=True),
    Way("exact, graph, tf32", graph=True, precision="tf32"),
    Way("exact, graph, channels_last, tf32", graph=True, channels_last=True, precision="tf32"),
    Way("exact, graph, channels_last, bf16", graph=True, channels_last=True, precision="bf16"),
)
#: The same on the CPU, where there are neither graphs nor TensorFloat-32.
CPU_WAYS = (
    Way("plain", "plain"),
    Way("exact"),
    Way("exact, channels_last", channels_last=True),
    Way("exact, bf16", precision="bf16"),
)


@dataclass(frozen=True)
class Measured:
    """Holds what a few iterations took, in one round."""

    #: Milliseconds per iteration: first quartile, median, third quartile.
    ms: tuple[float, float, float]
    #: MiB at most: in tensors, and in what the allocator held for them; NaN on the CPU.
    peak_mib: float
    reserved_mib: float


def wait(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back all memory that nothing refers to, and let peaks be counted from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def run_of(objective: Objective, x: Tensor, way: Way, read_every: int) -> Run:
    """Return the loop's state at the images `x`, for iterations of this kind."""
    if way.chunk is not None:
        objective = objective.in_chunks(way.chunk)
    loop = replace(LOOP, cuda_graph=way.graph, read_every=read_every)
    pixel_gradient = in_precision(PIXEL_GRADIENTS[way.method], way.precision)
    return Run(partial(pixel_gradient, objective), x, loop, ALONE, None)


def as_laid_out(objective: Objective, x: Tensor, channels_last: bool) -> Tensor:
    """Lay weights and the target's gradient out as asked; return the images `x` likewise."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    objective.model.to(memory_format=form)
    objective.target_gradient = [
        g.contiguous(memory_format=form) if g.dim() == 4 else g for g in objective.target_gradient
    ]
    return x.contiguous(memory_format=form)


def measured(objective: Objective, x: Tensor, way: Way, steps: int, repeats: int) -> Measured:
    """Measure `repeats` times `steps` iterations in a row."""
    device = x.device
    free(device)
    run = run_of(objective, as_laid_out(objective, x, way.channels_last), way, steps)
    for step in range(WARM_UPS):
        run.improve(range(step, step + 1), None)
    times = []
    for number in range(repeats):
        wait(device)
        begin = time.perf_counter()
        first = WARM_UPS + number * steps
        run.improve(range(first, first + steps), None)  # ends with a reading
        times.append(1e3 * (time.perf_counter() - begin) / steps)
    quartiles = statistics.quantiles(times, n=4) if repeats > 1 else times * 3
    peak = reserved = float("nan")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        reserved = torch.cuda.max_memory_reserved(device) / 2**20
    return Measured((quartiles[0], quartiles[1], quartiles[2]), peak, reserved)


class _Operations(TorchDispatchMode):
    """Adds up what torch's table says of each operation within this context."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out


def operations(objective: Objective, x: Tensor) -> float:
    """Return the floating-point operations of one exact derivative per image, in convolutions and
    matrix products."""
    with _Operations() as counter:
        exact(objective, x)
    return counter.count / len(x)


def matmul_peak(device: torch.device, precision: str, size: int, repeats: int = 10) -> float:
    """Return the operations per second of the best of several products of square matrices."""
    a = torch.randn(size, size, device=device)
    seconds = []
    with PRECISION_CONTEXTS[precision](device.type):
        if precision == "bf16":
            a = a.bfloat16()
        a @ a
        for _ in range(repeats):
            wait(device)
            begin = time.perf_counter()
            a @ a
            wait(device)
            seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def copy_peak(device: torch.device, size: int, repeats: int = 10) -> float:
    """Return the bytes per second of the best of several copies of `size` float32 numbers."""
    a = torch.randn(size, device=device)
    b, seconds = torch.empty_like(a), []
    for _ in range(repeats + 1):
        wait(device)
        begin = time.perf_counter()
        b.copy_(a)
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * 4 * size / min(seconds[1:])


def step_rows(
    arch: str,
    size: int,
    batch_size: int,
    ways: Sequence[Way],
    peaks: dict[str, float],
    device: torch.device,
    *,
    train_mode: bool,
    rounds: int,
    steps: int,
    repeats: int,
) -> Iterator[dict]:
    """Measure every way at one batch size, and yield a row for each as it is measured.

    peaks: precision → operations per second of a matrix product. A way that fails gives a row that
    says why.
    """
    objective = photo_objective(arch, size, batch_size, train_mode=train_mode, device=device)
    x = initial_images(0, batch_size, (3, size, size), torch.float32).to(device)
    few = photo_objective(arch, size, min(batch_size, 2), train_mode=train_mode, device=device)
    per_image = operations(few, x[: min(batch_size, 2)])
    failed = set()
    for number in range(rounds):
        for way in ways:
            if way.name in failed:
                continue
            row = {
                "arch": arch, "size": size, "batch": batch_size,
                "mode": "train" if train_mode else "eval", "way": way.name, "round": number,
                "steps": steps * repeats,
            }  # fmt: skip
            try:
                found = measured(objective, x, way, steps, repeats)
            except RuntimeError as error:
                failed.add(way.name)
                row["note"] = "out of memory" if is_out_of_memory(error) else one_line(error)[:200]
                yield row
                continue
            speed = per_image * batch_size / (found.ms[1] / 1e3)
            yield row | {
                "lower_quartile_ms": found.ms[0], "median_ms": found.ms[1],
                "upper_quartile_ms": found.ms[2], "peak_mib": found.peak_mib,
                "reserved_mib": found.reserved_mib, "exact_gflop": per_image * batch_size / 1e9,
                "exact_tflops": speed / 1e12, "share_of_matmul": speed / peaks[way.precision],
            }  # fmt: skip
    free(device)
