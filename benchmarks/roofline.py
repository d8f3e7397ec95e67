"""Compares a step of the attack with what the machine could do at best, and says what fills it.

    python -m benchmarks.roofline --csv docs/rows/roofline.csv

One step of `plain`, the slow twin, and of `exact` is taken apart into torch's operations. Counted
are the floating-point operations of convolutions and matrix products, by torch's own table, and the
bytes of all tensors that operations read and write, views and repeated entries left out. The table
counts what torch runs, inside derivatives written by hand as well; it knows no other operations
than these, whose arithmetic is small. Beside it stands a count by hand, from the layers' shapes: a
layer takes part in seven products of its own size in an exact step, a first layer in five of them,
as nothing asks for the derivative of the loss by the images. The plain step has two more per layer,
and one more in a first layer, for the derivatives by the weights that it drops. Torch's second
derivative of a convolution with a stride computes more taps than the kernel has, so `plain` lies
above the count by hand. Where a layer has taps that meet only padding, `exact` leaves these out and
stays below it.

The machine's peaks are the best of a few products of square matrices and copies of memory much
larger than its caches, measured in every round beside the steps. The bound of a step is the sum
over its operations of the larger of both times, arithmetic at one peak and bytes at the other. A
step may beat it where caches hold what an operation reads; arithmetic alone bounds it always.

--csv FILE.csv has a row per round and method. FILE_kinds.csv has the time of operations by kind, as
torch's profiler sees it, with its own cost: compare shares, and whole steps by the rounds.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.setting import photo_objective
from inversion.objective import Objective
from inversion.pixel_gradient import PIXEL_GRADIENTS
from inversion.restarts import initial_images
from utils.console import table
from utils.files import write_csv

METHODS = ("plain", "exact")
#: Products of a layer's own size in one step, and of the first layer's.
PRODUCTS = {"plain": (9, 6), "exact": (7, 5)}
#: Side of the matrices, and float32 numbers of the copies, by which the peaks are measured.
MATRIX, COPIED = 1024, 2**26
#: Words of functions that normalise: what they call counts as normalisation, products apart.
NORMALISING = ("_Normalise", "_Derivative", "batch_norm", "BatchNorm")
#: Kind → words of the names of its operations; the first kind with such a word counts.
KINDS = {
    "convolutions and matrix products": (
        "conv", "aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "_slow_",
    ),
    "copies": (
        "copy", "clone", "contiguous", "im2col", "col2im", "aten::cat", "fill", "zero", "empty",
        "constant_pad", "aten::index",
    ),
    "reductions": ("aten::sum", "aten::mean", "norm", "aten::var", "aten::dot", "softmax", "pool"),
    "element-wise": (
        "aten::add", "aten::mul", "aten::sub", "aten::div", "aten::neg", "sqrt", "relu",
        "threshold",
        "sigmoid", "aten::sign", "aten::abs", "aten::pow", "addc", "aten::where", "aten::gt",
        "clamp", "aten::ge", "aten::le", "aten::exp", "square", "lerp", "sgn", "foreach",
    ),
}  # fmt: skip
NORMALISATION, OTHER, OUTSIDE = "normalisation", "other operations", "between operations"
HEADER = [
    "network", "px", "B", "mode", "method", "round", "ms", "GFLOP", "GFLOP by hand", "MiB moved",
    "operations", "matrix product GFLOP/s", "copy GB/s", "arithmetic ms", "bytes ms", "bound ms",
]  # fmt: skip
KIND_HEADER = ["network", "px", "B", "mode", "method", "kind", "ms", "share"]


@dataclass(frozen=True)
class Setting:
    """Names what is attacked."""

    arch: str
    #: Side of the images in pixels.
    size: int
    batch: int
    train_mode: bool = True

    @property
    def columns(self) -> list:
        """The first columns of a row."""
        return [self.arch, self.size, self.batch, "train" if self.train_mode else "eval"]


SETTINGS = {
    "lenet": Setting("lenet", 32, 8),
    "resnet18": Setting("resnet18", 32, 8),
    "resnet18-eval": Setting("resnet18", 32, 8, train_mode=False),
    "resnet50": Setting("resnet50", 64, 4),
}


class Operations(TorchDispatchMode):
    """Counts, for every operation within this context, its arithmetic and the bytes it moves."""

    def __init__(self) -> None:
        super().__init__()
        #: Floating-point operations and bytes, per operation.
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and take note of it."""
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if _is_view(function):
            return out
        formula = flop_registry.get(function._overloadpacket)
        arithmetic = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        read = 0 if "empty" in str(function) else sum(map(_bytes, _tensors([args, kwargs])))
        self.found.append((arithmetic, read + sum(map(_bytes, _tensors([out])))))
        return out


def _is_view(function) -> bool:
    """Tell whether an operation makes nothing but another view of its input."""
    returns = function._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )


def _tensors(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [tensor for each in tree for tensor in _tensors(each)]
    return []


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's entries; entries that share memory count once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 and length else length
    return count * tensor.element_size()


def operations_of(step: Callable[[], object]) -> list[tuple[int, int]]:
    """Return arithmetic and bytes of every operation of a step."""
    step()  # whatever is done once
    with Operations() as counter:
        step()
    return counter.found


def counted_by_hand(model: nn.Module, x: Tensor, method: str) -> int:
    """Return the floating-point operations of a step from the shapes of its layers.

    Layers that stand at the images count as first ones; every layer must be used once.
    """
    products: list[tuple[int, bool]] = []

    def note(layer: nn.Module, args: tuple, y: Tensor) -> None:
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        per_output = layer.weight[0].numel()
        products.append((2 * y.numel() * per_output, args[0].data_ptr() == x.data_ptr()))

    hooks = [
        layer.register_forward_hook(note)
        for layer in model.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    each, first = PRODUCTS[method]
    return sum((first if is_first else each) * product for product, is_first in products)


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def peaks(matrices: Sequence[Tensor], memory: Sequence[Tensor]) -> tuple[float, float]:
    """Return floating-point operations per second of a matrix product, bytes per second of a copy.

    Of either the best of a few calls counts.
    """
    a, b, product = matrices
    source, copy = memory
    multiply = min(seconds(lambda: torch.mm(a, b, out=product)) for _ in range(3))
    move = min(seconds(lambda: copy.copy_(source)) for _ in range(2))
    return 2 * len(a) ** 3 / multiply, 2 * source.nbytes / move


def bound_seconds(
    operations: Sequence[tuple[int, int]], arithmetic: float, bandwidth: float
) -> float:
    """Return the least time of a step, by the slower of both limits for every operation."""
    return sum(max(flop / arithmetic, moved / bandwidth) for flop, moved in operations)


def kind_of(names: Sequence[str]) -> str:
    """Return the kind of an operation, from its name and then those of its callers."""
    own = names[0]
    products = "convolutions and matrix products"
    if any(word in own for word in KINDS[products]):
        return products
    if any(word in name for name in names for word in NORMALISING):
        return NORMALISATION
    return next((k for k, words in KINDS.items() if any(w in own for w in words)), OTHER)


def kinds(step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return the ms of a step by kind, as the profiler sees them, with what no operation took."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        whole = 1e6 * (time.perf_counter() - begin)
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if not event.name.startswith("aten::"):
            continue
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        found[kind_of(names)] += event.self_cpu_time_total
    found[OUTSIDE] = max(whole - sum(found.values()), 0.0)
    return {kind: value / repeats / 1e3 for kind, value in found.items()}


def steps_of(objective: Objective, x: Tensor) -> dict[str, Callable[[], object]]:
    """Return method → a function that takes one step."""

    def step(method: str) -> Callable[[], object]:
        def run() -> None:
            losses, derivative = PIXEL_GRADIENTS[method](objective, x, 0.0)
            losses.floats()
            derivative.sum().item()

        return run

    return {method: step(method) for method in METHODS}


def measure(setting: Setting, rounds: int, profiled: int) -> tuple[list[list], list[list]]:
    """Return the rows of the rounds, and those of the kinds, of one setting."""
    objective = photo_objective(
        setting.arch, setting.size, setting.batch, train_mode=setting.train_mode
    )
    x = initial_images(0, setting.batch, (3, setting.size, setting.size), torch.float32)
    steps = steps_of(objective, x)
    operations = {method: operations_of(step) for method, step in steps.items()}
    sums = {name: [sum(column) for column in zip(*found, strict=True)]
            for name, found in operations.items()}  # fmt: skip
    by_hand = {method: counted_by_hand(objective.model, x, method) for method in METHODS}
    matrices = [torch.randn(MATRIX, MATRIX) for _ in range(3)]
    memory = [torch.zeros(COPIED), torch.ones(COPIED)]
    peaks(matrices, memory)
    rows = []
    for number in range(rounds):
        taken = {method: seconds(step) for method, step in steps.items()}
        arithmetic, bandwidth = peaks(matrices, memory)
        for method in METHODS:
            flop, moved = sums[method]
            bound = bound_seconds(operations[method], arithmetic, bandwidth)
            rows.append(
                [*setting.columns, method, number, 1e3 * taken[method], flop / 1e9]
                + [by_hand[method] / 1e9, moved / 2**20, len(operations[method])]
                + [arithmetic / 1e9, bandwidth / 1e9]
                + [1e3 * flop / arithmetic, 1e3 * moved / bandwidth, 1e3 * bound]
            )
    of_kinds = []
    for method, step in steps.items():
        found = kinds(step, profiled)
        whole = sum(found.values())
        of_kinds += [
            [*setting.columns, method, kind, ms, ms / whole]
            for kind, ms in sorted(found.items(), key=lambda pair: -pair[1])
        ]
    return rows, of_kinds


def summary(rows: Sequence[Sequence]) -> str:
    """Return the medians of the rounds as a table."""
    shown = []
    for key in dict.fromkeys(tuple(row[:5]) for row in rows):
        own = [row for row in rows if tuple(row[:5]) == key]
        middle = [
            statistics.median(values) for values in zip(*(row[6:] for row in own), strict=True)
        ]
        share = statistics.median(row[15] / row[6] for row in own)
        shown.append([*key, *middle, f"{share:.0%}"])
    return table([*HEADER[:5], *HEADER[6:], "bound / ms"], shown)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=11, help="rounds that are timed")
    parser.add_argument("--profiled", type=int, default=5, help="steps that are profiled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", help="file for the rows of the rounds")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows: list[list] = []
    of_kinds: list[list] = []
    for name in args.settings:
        found = measure(SETTINGS[name], args.rounds, args.profiled)
        rows, of_kinds = rows + found[0], of_kinds + found[1]
        print(summary(found[0]), table(KIND_HEADER, found[1]), sep="\n", flush=True)
    if args.csv:
        write_csv(HEADER, rows, args.csv)
        file = Path(args.csv)
        write_csv(KIND_HEADER, of_kinds, file.with_stem(f"{file.stem}_kinds"))


if __name__ == "__main__":
    main()
