"""Compares one attack by this project's and other projects' loops: time, memory, images.

    PYTHONPATH=FOLDER python -m benchmarks.peers --csv docs/rows/peers.csv

FOLDER holds breaching, which is no requirement of this project; benchmarks/peers_breaching.py says
how to make it. Without breaching, its rows say that it is missing, and the others are measured.

All methods get the same network (random weights), gradient, labels, starts, iterations and
settings: the cosine distance with TV, signs into Adam, a step size that falls along a cosine. They
are

- breaching: its own attacker (benchmarks/peers_breaching.py); breaching-tv has the others' TV;
- inversefed and original: the loops of Geiping et al. (2020) and of E2EGI, written from their
  equations (benchmarks/peers_loops.py); original-truncated has the original's second derivative of
  BatchNorm in train mode, which is another one;
- this project's, by the name of the pixel gradient; with "+forced" the client's statistics are
  forced (`--bn-coupling forced`), which is another function of the images.

Before anything is timed, the derivative of every method is computed in float64 at the same images,
of the distance alone and with TV, and compared with the plain one; a method that differs ends the
benchmark. Then methods take
turns, a few iterations each. A step is the time between the same point of one iteration and of the
next, all that the loop does included; beside it stands the process's CPU time between the same
points, which a busy machine disturbs less. Evaluations of the network are counted by a hook on its
first convolution, over a whole run. Memory is that of two iterations in a process of its own.
Images are those after --iterations of each method, and after as many as fit the time that the first
method takes for them, by the median ratio of their steps; scored is the last iterate.

--csv FILE.csv has a row per network and method; FILE_rounds.csv the raw times; FILE_images.csv the
images' scores. Machines are noisy: quote the ratios, which are of neighbours in time.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers_breaching import breaching_method, missing
from benchmarks.peers_loops import EXACT, FORCED, OWN, Attack, Method, inversefed, original, own
from benchmarks.peers_memory import (
    allocated_above_start,
    costliest,
    in_a_fresh_process,
    resident_above_start,
)
from benchmarks.setting import photo_objective
from inversion.pixel_gradient import plain
from inversion.restarts import initial_images
from inversion.settings import Weights
from train.datasets import DATASETS
from train.photos import photo_batch
from utils.console import table
from utils.errors import FaultError, InputError
from utils.files import write_csv
from utils.images import denormalise
from utils.matching import assign
from utils.metrics import baselines, psnr

SPEC = DATASETS["photos"]
#: The peer whose time others are compared with, and the one whose loop is the reference.
BREACHING = "breaching"
METHODS: dict[str, Callable[[Attack], Method]] = {
    BREACHING: breaching_method,
    f"{BREACHING}-tv": functools.partial(breaching_method, equal_tv=True),
    "inversefed": inversefed,
    "original": original,
    "original-truncated": functools.partial(original, truncated=True),
    **{name: functools.partial(own, name=name) for name in OWN},
}
DEFAULT = [BREACHING, "inversefed", "original", "exact"]
#: What a derivative in float64 may differ from the plain one by, of its norm: rounding gives at
#: most 4e-13 on the networks below.
TOLERANCE = 1e-10
#: Methods whose derivative need not be exact: how far it is off is written, but is no fault.
APPROXIMATE = [name for name in OWN if name.removesuffix(FORCED) not in EXACT]


@dataclass(frozen=True)
class Setting:
    """Names what is attacked, and for how many iterations."""

    arch: str
    #: Side of the images in pixels.
    size: int
    batch_size: int
    iterations: int


SETTINGS = {
    "lenet": Setting("lenet", 32, 8, 400),
    "resnet18": Setting("resnet18", 32, 8, 60),
    "resnet50": Setting("resnet50", 64, 4, 30),
}
#: Pixels and images of the small attack that loads code before memory is measured.
WARM_UP = (32, 2)
#: Columns that say what was attacked, and those of each file.
TASK = ["network", "px", "B", "mode", "box"]
METHOD_HEADER = [
    *TASK, "method", "rounds",
    "ms per step", "lower quartile", "upper quartile",
    "ratio to breaching", "lower quartile of ratio", "upper quartile of ratio",
    "cpu ratio to breaching", "lower quartile of cpu ratio", "upper quartile of cpu ratio",
    "evaluations", "iterations", "peak resident MiB", "peak allocated MiB",
    "cosine of distance's derivative", "its scale", "its relative difference",
    "relative difference with TV", "relative difference of loss", "note",
]  # fmt: skip
#: Columns that are written, but not printed.
DETAILS = [
    "rounds", "lower quartile", "upper quartile", "lower quartile of cpu ratio",
    "upper quartile of cpu ratio", "its scale", "relative difference of loss", "note",
]  # fmt: skip
ROUND_HEADER = [*TASK, "round", "method", "ms per step", "cpu ms per step"]
IMAGE_HEADER = [
    *TASK, "start", "method", "equal", "iterations", "seconds", "psnr", "distance",
    "grey psnr", "mean colour psnr",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Holds what is the same for all settings."""

    methods: Sequence[str]
    #: TV's weight and the first step size.
    tv: float
    lr: float
    train_mode: bool
    boxed: bool
    rounds: int
    #: Iterations of a method's turn in a round; all steps but the first one's start are timed.
    turn: int
    #: Number of starts from which images are reconstructed.
    starts: int
    memory: bool
    threads: int = 1

    def task(self, setting: Setting) -> list:
        """Return the values of the columns TASK."""
        mode = "train" if self.train_mode else "eval"
        return [setting.arch, setting.size, setting.batch_size, mode, "on" if self.boxed else "off"]


def attack_of(setting: Setting, options: Options, dtype: torch.dtype = torch.float32) -> Attack:
    """Return the attack that all methods run."""
    objective = functools.partial(
        photo_objective, setting.arch, setting.size, setting.batch_size,
        weights=Weights(priors={"tv": options.tv}), train_mode=options.train_mode, dtype=dtype,
    )  # fmt: skip
    shape = (3, setting.size, setting.size)
    return Attack(
        objective, shape, SPEC.normalisation, options.tv, options.lr, options.boxed, dtype
    )


def start_of(setting: Setting, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the start number `seed`, the same for all methods."""
    return initial_images(seed, setting.batch_size, (3, setting.size, setting.size), dtype)


def usable(setting: Setting, options: Options) -> dict[str, str]:
    """Map the names of the methods to the reason why they cannot run here; "" for those that can.

    Every reason is printed.
    """
    reasons = {}
    for name in options.methods:
        reason = (missing() or "") if name.startswith(BREACHING) else ""
        if not reason:
            try:
                METHODS[name](attack_of(setting, options))
            except InputError as error:
                reason = str(error)
        reasons[name] = reason
        if reason:
            print(f"{setting.arch}: {name} is left out: {reason}", flush=True)
    return reasons


# Whether all compute the same ------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Says how a method's loss and derivative at the same images compare with the plain ones."""

    #: Cosine with the plain derivative, and ‖derivative‖ / ‖plain‖; what the method computes
    #: otherwise is included.
    cosine: float
    scale: float
    #: ‖derivative − plain‖ / ‖plain‖, where the plain one has what the method computes otherwise.
    difference: float
    #: (loss − plain loss) / |plain loss|, likewise.
    loss: float


def agreement(method: Method, x: Tensor) -> Agreement:
    """Compare a method with the plain derivative of its objective at the images `x`.

    Raises FaultError where there is nothing to compare: a derivative that is zero or not finite.
    """
    loss, derivative = method.derivative(x)
    losses, reference = plain(method.objective, x)
    for each in (derivative, reference):
        if not 0 < torch.linalg.vector_norm(each) < float("inf"):
            raise FaultError("a derivative is zero or not finite: there is nothing to compare")
    cosine = torch.nn.functional.cosine_similarity(derivative.flatten(), reference.flatten(), dim=0)
    scale = torch.linalg.vector_norm(derivative) / torch.linalg.vector_norm(reference)
    expected = losses.total
    if method.unlike is not None:
        x = x.detach().clone().requires_grad_()
        added = method.unlike(x)
        expected = expected + added.detach()
        reference = reference + torch.autograd.grad(added, x)[0]
    difference = torch.linalg.vector_norm(derivative - reference)
    relative = difference / torch.linalg.vector_norm(reference)
    return Agreement(
        cosine.item(),
        scale.item(),
        relative.item(),
        (loss - expected).item() / abs(expected.item()),
    )


def checked(
    setting: Setting, options: Options, names: Sequence[str]
) -> dict[str, tuple[Agreement, Agreement]]:
    """Compare every method with the plain derivative in float64: the distance alone, and with TV.

    The distance is looked at alone because its derivative can be far smaller than that of TV.

    Raises FaultError where a method that should be exact differs by more than rounding.
    """
    x = start_of(setting, 0, torch.float64)
    parts = {"distance": dataclasses.replace(options, tv=0.0), "whole loss": options}
    found = {}
    for name in names:
        both = []
        for part, of in parts.items():
            both.append(agreement(METHODS[name](attack_of(setting, of, torch.float64)), x))
            difference = both[-1].difference
            if name not in APPROXIMATE and not difference <= TOLERANCE:
                raise FaultError(
                    f"{setting.arch}: the derivative of {name} by the {part} differs from the "
                    f"plain one by {difference:.1e} of its norm, more than {TOLERANCE:.0e}"
                )
        found[name] = (both[0], both[1])
    return found


# Time and evaluations --------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Holds what one step took, in ms."""

    wall: float
    #: The process's CPU time, of all its threads.
    cpu: float


def turn(method: Method, start: Tensor, iterations: int) -> Step:
    """Return the median time of the steps of `iterations` iterations."""
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    method.run(start, iterations, mark)
    if len(marks) != iterations:
        raise FaultError(f"{len(marks)} marks in {iterations} iterations")
    wall, cpu = (
        1e3 * statistics.median(after - before for before, after in itertools.pairwise(clock))
        for clock in zip(*marks, strict=True)
    )
    return Step(wall, cpu)


def rounds(methods: dict[str, Method], start: Tensor, options: Options) -> dict[str, list[Step]]:
    """Return what a step of every method took, per round; in a round all take their turn."""
    for method in methods.values():
        turn(method, start, options.turn)  # warm-up
    steps: dict[str, list[Step]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, method in methods.items():
            steps[name].append(turn(method, start, options.turn))
    return steps


def ratios(steps: Sequence[Step], others: Sequence[Step], clock: str) -> list[float]:
    """Return the ratios of two methods' steps, of the same rounds, by one clock of `Step`."""
    pairs = zip(steps, others, strict=True)
    return [getattr(one, clock) / getattr(other, clock) for one, other in pairs]


class Evaluations:
    """Counts how often a network is evaluated, by a hook on its first convolution."""

    def __init__(self, model: nn.Module):
        """Look for the convolution; raises StopIteration where there is none."""
        self.first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
        self.count = 0

    def __enter__(self) -> "Evaluations":
        self.hook = self.first.register_forward_hook(self._add)
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()

    def _add(self, *_) -> None:
        self.count += 1


def quartiles(values: Sequence[float]) -> list[float]:
    """Return median, lower and upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


# Memory, in a process of its own ---------------------------------------------------------------


def memory(setting: Setting, options: Options, name: str) -> tuple[float | None, float]:
    """Return the peak of resident memory and of torch's allocations of two iterations, in MiB."""
    torch.set_num_threads(options.threads)

    def steps(of: Setting) -> Callable[[], object]:
        method, start = METHODS[name](attack_of(of, options)), start_of(of, 0)
        return lambda: method.run(start, 2, lambda: None)

    small = Setting(setting.arch, *WARM_UP, 2)
    steps(small)()  # loads what is loaded once; what it takes is given back
    gc.collect()
    measured = steps(setting)
    return resident_above_start(measured), allocated_above_start(measured)


# Images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Holds what a run made, and at what cost."""

    iterations: int
    seconds: float
    evaluations: int
    psnr: float
    #: Gradient distance, of the exact objective.
    distance: float


def reconstructed(method: Method, setting: Setting, seed: int, iterations: int) -> Images:
    """Run a method from start number `seed` and score its last iterate."""
    with Evaluations(method.model) as evaluations:
        begin = time.perf_counter()
        x = method.run(start_of(setting, seed), iterations, lambda: None)
        seconds = time.perf_counter() - begin
        count = evaluations.count
    if count < iterations:
        raise FaultError(f"{count} evaluations counted in {iterations} iterations: not all seen")
    true, y = photo_batch(setting.batch_size, 1, setting.size, seed=0)
    images = denormalise(x, *SPEC.normalisation)
    score = psnr(images[assign(images, true, y, y)], true).mean().item()
    return Images(iterations, seconds, count, score, method.objective.gradient_distance(x))


def image_rows(
    methods: dict[str, Method], steps: dict[str, list[Step]], setting: Setting, options: Options
) -> tuple[list[list], dict[str, Images]]:
    """Return the rows of the images, and every method's first run of equal iterations.

    The time is that of the first method's iterations.
    """
    first = steps[next(iter(methods))]
    true, _ = photo_batch(setting.batch_size, 1, setting.size, seed=0)
    flat = [psnr(images, true).mean().item() for images in baselines(true).values()]
    rows, firsts = [], {}
    for seed in range(options.starts):
        for name, method in methods.items():
            for equal in ("iterations", "time"):
                count = setting.iterations
                if equal == "time":
                    share = statistics.median(ratios(first, steps[name], "wall"))
                    count = max(1, round(count * share))
                if equal == "iterations" or count != setting.iterations:
                    run = reconstructed(method, setting, seed, count)
                if equal == "iterations" and seed == 0:
                    firsts[name] = run
                rows.append(
                    [*options.task(setting), seed, name, equal, run.iterations, run.seconds]
                    + [run.psnr, run.distance, *flat]
                )
    return rows, firsts


# All of it -------------------------------------------------------------------------------------


def measure(setting: Setting, options: Options) -> tuple[list[list], list[list], list[list]]:
    """Return the rows of the methods, of the rounds and of the images of one setting."""
    reasons = usable(setting, options)
    names = [name for name, reason in reasons.items() if not reason]
    agreements = checked(setting, options, names)
    methods = {name: METHODS[name](attack_of(setting, options)) for name in names}
    steps = rounds(methods, start_of(setting, 0), options)
    images, firsts = image_rows(methods, steps, setting, options)
    task = options.task(setting)
    rows = []
    for name, reason in reasons.items():
        if reason:
            blank = len(METHOD_HEADER) - len(task) - 2
            rows.append([*task, name, *[""] * blank, f"left out: {reason}"])
            continue
        times: list = quartiles([step.wall for step in steps[name]])
        for clock in ("wall", "cpu"):
            if BREACHING in steps:
                times += quartiles(ratios(steps[name], steps[BREACHING], clock))
            else:
                times += [""] * 3
        taken = (None, None)
        if options.memory:
            taken = in_a_fresh_process(memory, setting, options, name)
        run, (alone, with_tv) = firsts[name], agreements[name]
        rows.append(
            [*task, name, options.rounds, *times, run.evaluations, run.iterations, *taken]
            + [alone.cosine, alone.scale, alone.difference, with_tv.difference, with_tv.loss]
            + [methods[name].note]
        )
    raw = [
        [*task, number, name, step.wall, step.cpu]
        for name, taken_by in steps.items()
        for number, step in enumerate(taken_by)
    ]
    return rows, raw, images


def print_profile(setting: Setting, options: Options, count: int) -> None:
    """Print the operators that take most of one step, per method."""
    for name, reason in usable(setting, options).items():
        if reason:
            continue
        method, start = METHODS[name](attack_of(setting, options)), start_of(setting, 0)
        method.run(start, 2, lambda: None)
        found = costliest(functools.partial(method.run, start, 3, lambda: None), count)
        print(f"{setting.arch}, {name}: three iterations")
        shown = [[key, calls, f"{100 * share:.1f} %"] for key, calls, share in found]
        print(table(["operator", "calls", "time"], shown), flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of this benchmark's flags."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    flags.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT)
    flags.add_argument("--eval-mode", action="store_true", help="BatchNorm by running statistics")
    flags.add_argument("--boxed", action="store_true", help="clamp images to valid colours")
    flags.add_argument("--tv", type=float, default=0.01, help="weight of the TV prior")
    flags.add_argument("--lr", type=float, default=0.1, help="first step size")
    flags.add_argument("--iterations", type=int, help="instead of the settings' own numbers")
    flags.add_argument("--rounds", type=int, default=9, help="rounds that are timed")
    flags.add_argument("--turn", type=int, default=3, help="iterations of a turn in a round")
    flags.add_argument("--starts", type=int, default=1, help="number of starts for the images")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--no-memory", action="store_true", help="measure no memory")
    flags.add_argument("--profile", type=int, metavar="N", help="print N operators, and stop")
    flags.add_argument("--csv", help="file for the rows of the methods")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    flags = parser()
    args = flags.parse_args(argv)
    if args.turn < 2 or args.rounds < 1:
        flags.error("a turn takes two iterations or more, and one round or more is timed")
    torch.set_num_threads(args.threads)
    options = Options(
        args.methods, args.tv, args.lr, not args.eval_mode, args.boxed, args.rounds, args.turn,
        args.starts, not args.no_memory, args.threads,
    )  # fmt: skip
    rows: list[list] = []
    raw: list[list] = []
    images: list[list] = []
    for name in args.settings:
        setting = SETTINGS[name]
        if args.iterations is not None:
            setting = Setting(setting.arch, setting.size, setting.batch_size, args.iterations)
        if args.profile is not None:
            print_profile(setting, options, args.profile)
            continue
        of_methods, of_rounds, of_images = measure(setting, options)
        rows, raw, images = rows + of_methods, raw + of_rounds, images + of_images
        report(rows, raw, images, args.csv)


def report(methods: list[list], raw: list[list], images: list[list], path: str | None) -> None:
    """Print what was measured until now, and write it if a file is named."""
    for header, rows, hidden in ((METHOD_HEADER, methods, DETAILS), (IMAGE_HEADER, images, ())):
        shown = [number for number, name in enumerate(header) if name not in hidden]
        print(
            table([header[i] for i in shown], [[row[i] for i in shown] for row in rows]), flush=True
        )
    if path is not None:
        write_csv(METHOD_HEADER, methods, path)
        file = Path(path)
        write_csv(ROUND_HEADER, raw, file.with_stem(f"{file.stem}_rounds"))
        write_csv(IMAGE_HEADER, images, file.with_stem(f"{file.stem}_images"))


if __name__ == "__main__":
    main()
