"""Optimises images: one loop from initial images to a reconstruction."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from inversion.objective import NO_LOSSES, Losses
from inversion.readings import CRITERION, WRONG, Columns, row_of
from inversion.settings import Loop
from inversion.step_graph import StepGraph
from utils.journal import reading
from utils.shard import ALONE, Shard
from utils.tensor_files import map_tensors


def _adam(x: Tensor, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([x], lr=lr)


def _lbfgs(x: Tensor, lr: float) -> torch.optim.Optimizer:
    """Take one L-BFGS direction per step, with a strong-Wolfe search of up to 25 evaluations.

    The tolerances are 0: a cosine distance can be small enough to meet the defaults at once.
    """
    return torch.optim.LBFGS(
        [x],
        lr=lr,
        max_iter=1,
        max_eval=26,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )


#: name in `inversion.settings.OPTIMISERS` → function(x, lr) → optimiser over the images.
OPTIMISERS = {"Adam": _adam, "LBFGS": _lbfgs}
#: Those that see the objective divided by its value at the start. The first step of L-BFGS is the
#: derivative itself: for losses near 1e-5 it moves the images so little that float32 shows no
#: difference in the loss, and the line search gives up.
NORMALISED = {"LBFGS"}
#: What a process wishes after an iteration; the largest wish counts for all.
GO_ON, SAVE, STOP = range(3)
#: (x, progress) → losses at `x` and the derivative there; the progress may be a scalar tensor.
BoundPixelGradient = Callable[[Tensor, Any], tuple[Losses[Tensor], Tensor]]


@dataclass(frozen=True)
class Reconstruction:
    """Holds the images that an optimisation arrived at, with their losses."""

    #: (B, C, H, W), normalised.
    x: Tensor
    #: The losses of exactly these images.
    losses: Losses[float]
    #: Iterations done.
    steps: int
    #: None when all iterations ran, "not finite" when a loss or derivative was not finite,
    #: "interrupted" when `on_step` asked to stop.
    stopped: str | None = None
    #: What `reconstruct` goes on from; None after a loss that was not finite.
    optimiser_state: dict | None = field(default=None, repr=False)
    #: At which iteration what was not finite, in words; None where all was.
    reason: str | None = None


@dataclass(frozen=True)
class Moment:
    """Holds all that decides the rest of a loop, between two of its iterations."""

    #: The iteration that comes next.
    step: int
    #: (B, C, H, W): the images, and the best ones so far with their losses.
    x: Tensor
    best_x: Tensor
    best: Losses[float]
    #: As in `Reconstruction.optimiser_state`, of the whole batch.
    optimiser_state: dict
    #: State of the generator of the Langevin noise; None without one.
    noise: Tensor | None


@dataclass(frozen=True)
class Saving:
    """Says when a loop's moments are saved, and how."""

    #: Asked whenever losses were read whether to save; a true answer on one process counts for all.
    due: Callable[[], bool]
    #: Called with the moment, whole, on every process; also when the loop is asked to stop.
    save: Callable[[Moment], None]


@dataclass(frozen=True)
class Outcome:
    """Holds the result of a strategy over several seeds."""

    #: The reconstruction.
    final: Reconstruction
    #: One per seed, with the steps of all its parts; fewer than seeds when interrupted.
    runs: tuple[Reconstruction, ...]
    #: Index of the run that became `final`; None if `final` combines several runs.
    chosen: int | None
    #: Iterations of all seeds and stages together.
    iterations: int


def lowest(losses: Sequence[float]) -> int:
    """Return the index of the lowest loss; one that is not finite counts as the highest."""
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return finite.index(min(finite))


def reconstruct(
    pixel_gradient: BoundPixelGradient,
    x_init: Tensor,
    loop: Loop,
    *,
    generator: Generator | None = None,
    on_step: Callable[[int, Losses[float], float], bool | None] | None = None,
    span: range | None = None,
    optimiser_state: dict | None = None,
    batch_shard: Shard = ALONE,
    since: Moment | None = None,
    saving: Saving | None = None,
) -> Reconstruction:
    """Improve the images `x_init` (B, C, H, W) for `loop.length` iterations.

    pixel_gradient(x, progress): a function of inversion/pixel_gradient.py with the objective
    bound. generator: source of the Langevin noise, on the device of `x_init`. on_step(step,
    losses, rate): called for every iteration with the losses before its update, as soon as they
    are read (`Loop.read_every`); a true answer then ends the loop. span: only those of the loop's
    iterations, at their rates and weights; with the `optimiser_state` of the part before, parts in
    a row are one run.

    batch_shard: with several processes each is given the whole `x_init` and improves its part of
    it; noise is drawn for the whole batch, all end the loop together, and the result is whole.

    since: a moment of an earlier, killed call with the same arguments, to go on from as if it had
    not been killed. saving: when and how moments of this call are saved.

    Every loss is paired with the images it was computed at. A loss that is not finite ends the
    loop and returns the best images until then, `x_init` with NaN losses if there were none.
    """
    run = Run(pixel_gradient, x_init, loop, batch_shard, optimiser_state)
    span = range(loop.length) if span is None else span
    begin, stopped, reason = span.start, None, None
    if since is not None:
        begin = since.step
        run.go_on(since, generator)
    step, done = max(span.start, begin - 1), begin - span.start
    at_once = batch_shard.size == 1 and loop.optimiser == "Adam"  # others must know every loss
    pace = _Pace(loop.read_every if at_once else 1)
    while begin < span.stop and stopped is None:
        steps = range(begin, min(begin + pace.length, span.stop))
        with pace:
            before = run.improve(steps, generator)
        wish = GO_ON
        if saving is not None and saving.due():
            wish = SAVE
        for step, losses in zip(steps, before, strict=False):
            done += 1
            if on_step is not None and on_step(step, losses, loop.rate(step)):
                wish = STOP
        if len(before) < len(steps):
            step = steps[len(before)]
            stopped, reason = "not finite", f"at iteration {step} {run.not_finite}"
            break
        wish, begin = batch_shard.largest(wish), steps.stop
        if wish != GO_ON and saving is not None:
            saving.save(run.moment(begin, generator))
        if wish == STOP:
            stopped = "interrupted"
    if stopped != "not finite" and not run.finish(loop.progress(step)):
        stopped, reason = "not finite", f"after iteration {step} {run.not_finite}"
    best = loop.keep_best or stopped == "not finite"
    x, losses = (run.best_x, run.best) if best else (run.x.detach().clone(), run.latest)
    state = None if stopped == "not finite" else run.state()
    return Reconstruction(batch_shard.gather(x, len(x_init)), losses, done, stopped, state, reason)


class _Pace:
    """Says after how many iterations the losses are read: about once a second, or more often.

    A wish to stop or to save and a line of progress wait for the next reading. Used as a context
    around the iterations and their reading, it measures them.
    """

    #: Seconds between two readings.
    SECONDS = 1.0

    def __init__(self, most: int):
        self.most, self.length = most, 1
        self._begun = 0.0

    def __enter__(self):
        self._begun = time.perf_counter()

    def __exit__(self, *exc):
        share = self.SECONDS / max(time.perf_counter() - self._begun, 1e-9)
        self.length = max(1, min(self.most, int(self.length * min(share, 2.0))))


class _NotFiniteError(Exception):
    """Leaves the line search of an optimiser at a loss that is not finite."""


class Run:
    """Carries out one optimisation: holds this process's images, their losses, the best so far.

    All of it stays on the device and is computed there, until `_read` reads it: also which images
    are the best, and that nothing counts after a loss that was not finite.
    """

    def __init__(
        self,
        pixel_gradient: BoundPixelGradient,
        x_init: Tensor,
        loop: Loop,
        shard: Shard,
        state: dict | None,
    ):
        self.pixel_gradient, self.loop, self.shard = pixel_gradient, loop, shard
        self.shape = x_init.shape
        #: Lowest and highest colours, where the images are.
        self.box = None if loop.box is None else tuple(bound.to(x_init) for bound in loop.box)
        self.x = _boxed(shard.split(x_init.detach()).clone(), self.box).requires_grad_()
        self.optimiser = OPTIMISERS[loop.optimiser](self.x, loop.lr)
        #: Factor of the objective as the optimiser sees it; None until the first evaluation.
        self.scale = None if loop.optimiser in NORMALISED else 1.0
        if state is not None:
            self._load(state["optimiser"])
            self.scale = state["scale"]
        #: Losses at the last evaluation that was read.
        self.latest = NO_LOSSES
        #: What was not finite at the first evaluation where something was not, in words.
        self.not_finite: str | None = None
        #: As they were last read.
        self.best_x, self.best = self.x.detach().clone(), NO_LOSSES
        #: Whether all was finite until now.
        self._fine = torch.ones((), dtype=torch.bool, device=self.x.device)
        #: The row of the best images, and what rows hold; None until the first evaluation.
        self._best_row: Tensor | None = None
        self._columns: Columns | None = None
        self._graph: StepGraph | None = None

    def improve(self, steps: range, generator: Generator | None) -> list[Losses[float]]:
        """Do the iterations `steps`; return the losses before the update of each.

        There are fewer where one is not finite: those before it.
        """
        if self.loop.optimiser == "Adam":
            rows = (self._replayed if self.loop.cuda_graph else self._computed)(steps, generator)
            return [losses for losses in self._read(rows) if losses is not None]
        (step,) = steps
        return self._searched(step)

    def finish(self, progress: float) -> bool:
        """Compute the losses at the images as they are; tell whether all is finite."""
        self._graph = None  # its memory serves this evaluation
        row, _, _ = self._evaluate(progress)
        return self._read([row])[0] is not None

    def _evaluate(self, progress: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute losses and derivative at the images, and whether these are the best ones so far.

        Returns the row of it, the total, and the direction to step along: 0 after anything that
        was not finite.
        """
        losses, derivative = self.pixel_gradient(self.x.detach(), progress)
        row = row_of(losses, derivative, self.shard)
        if self._columns is None or self._best_row is None:
            self._columns = Columns.of(losses)
            self._best_row = row.new_tensor(self._columns.row(self.best))
        self._fine.logical_and_(row[WRONG] == 0)
        # true for the NaN of the start too
        better = self._fine & ~(row[CRITERION] >= self._best_row[CRITERION])
        self.best_x.copy_(torch.where(better, self.x.detach(), self.best_x))
        self._best_row.copy_(torch.where(better, row, self._best_row))
        direction = derivative.sign() if self.loop.signed else derivative
        return row, losses.total, direction.masked_fill(~self._fine, 0.0)

    def _read(self, rows: Sequence[Tensor]) -> list[Losses[float] | None]:
        """Read what the evaluations of `rows` gave, by one transfer from the device.

        Returns their losses up to the first one at which something is not finite, None there.
        """
        assert self._columns is not None
        assert self._best_row is not None
        *values, best = torch.stack([*rows, self._best_row]).tolist()
        self.best = self._columns.best(best)
        found: list[Losses[float] | None] = []
        for row in values:
            evaluation = self._columns.evaluation(row)
            self.latest = evaluation.losses
            self.not_finite = evaluation.not_finite(self.x.numel())
            if self.not_finite is not None:
                return [*found, None]
            found.append(self.latest)
        return found

    def _computed(self, steps: range, generator: Generator | None) -> list[Tensor]:
        """Do iterations one operation after the other; return their rows."""
        rows = []
        for step in steps:
            rate = self.loop.rate(step)
            row, _, self.x.grad = self._evaluate(self.loop.progress(step))
            rows.append(row)
            self.optimiser.param_groups[0]["lr"] = rate
            self.optimiser.step()
            self._project(rate, generator)
        return rows

    def _replayed(self, steps: range, generator: Generator | None) -> Sequence[Tensor]:
        """Do iterations by one graph of all their operations; return their rows."""
        if self._graph is None:
            self._graph = StepGraph(self.optimiser, self._evaluate, self.loop.read_every)
        self._graph.prepare([(self.loop.progress(step), self.loop.rate(step)) for step in steps])
        for step in steps:
            self._graph.step()
            self._project(self.loop.rate(step), generator)
        return self._graph.rows(len(steps))

    def _searched(self, step: int) -> list[Losses[float]]:
        """Do one iteration of an optimiser that evaluates several times, each time read."""
        before: list[Losses[float]] = []

        def closure() -> Any:  # torch says float, and its optimisers pass on any type
            row, total, direction = self._evaluate(self.loop.progress(step))
            if self._read([row]) == [None]:
                raise _NotFiniteError
            before.append(self.latest)
            if self.scale is None:
                self.scale = 1 / abs(self.latest.total or 1.0)
            self.x.grad = direction * self.scale
            return total * self.scale

        self.optimiser.param_groups[0]["lr"] = self.loop.rate(step)
        try:
            self.optimiser.step(closure)
        except _NotFiniteError:
            return []
        self._project(self.loop.rate(step), None)
        return before[:1]

    @torch.no_grad()
    def _project(self, rate: float, generator: Generator | None) -> None:
        """Add the Langevin noise, and clamp the images to the box."""
        if self.loop.noise:
            noise = torch.randn(
                self.shape, dtype=self.x.dtype, device=self.x.device, generator=generator
            )
            self.x.add_(self.shard.split(noise), alpha=rate * self.loop.noise)
        if self.box is not None:
            self.x.copy_(_boxed(self.x, self.box))

    def state(self) -> dict:
        """Return what another run goes on from, of the whole batch."""
        return {"optimiser": self._whole(self.optimiser.state_dict()), "scale": self.scale}

    def moment(self, step: int, generator: Generator | None) -> Moment:
        """Return all that decides the iterations from `step` on, of the whole batch."""
        return Moment(
            step,
            self._whole(self.x.detach()),
            self._whole(self.best_x),
            self.best,
            self.state(),
            None if generator is None else generator.get_state(),
        )

    def go_on(self, moment: Moment, generator: Generator | None) -> None:
        """Take the place of the run that `moment` was taken of."""
        with torch.no_grad():
            self.x.copy_(self.shard.split(moment.x))
        self.best_x, self.best = self._part(moment.best_x.to(self.x)), moment.best
        with reading("the optimiser's state"):
            self._load(moment.optimiser_state["optimiser"])
            self.scale = moment.optimiser_state["scale"]
            if generator is not None:
                go_on_drawing(generator, moment.noise, moment.step)

    def _load(self, state: dict) -> None:
        """Let the optimiser go on from a state of the whole batch."""
        self.optimiser.load_state_dict(self._part(state))
        for held in self.optimiser.state.values():
            if "step" in held:  # which the optimiser reads at every step
                held["step"] = held["step"].cpu()

    def _whole(self, state: Any) -> Any:
        """Return a state in which this process's part of the images is the whole batch."""

        def whole(tensor: Tensor) -> Tensor:
            own = tensor.dim() == len(self.shape) and tensor.shape[1:] == self.shape[1:]
            return self.shard.gather(tensor, self.shape[0]).clone() if own else tensor.clone()

        return map_tensors(whole, state)

    def _part(self, state: Any) -> Any:
        """Return a state in which the whole batch is this process's part of it."""

        def part(tensor: Tensor) -> Tensor:
            return self.shard.split(tensor).clone() if tensor.shape == self.shape else tensor

        return map_tensors(part, state)


def go_on_drawing(generator: Generator, state: Tensor | None, step: int) -> None:
    """Let a generator go on from a saved `state`; None leaves it as it is.

    A state of another kind of device, whose random numbers are others, cannot be taken: numbers
    that depend on `step` follow instead, none of which was drawn before.
    """
    if state is None:
        return
    with reading("the generator of the noise"):
        if state.shape == generator.get_state().shape:
            generator.set_state(state)
        else:
            generator.manual_seed(generator.initial_seed() + step)


def _boxed(x: Tensor, box: tuple[Tensor, ...] | None) -> Tensor:
    if box is None:
        return x
    low, high = box
    return x.clamp(low, high)
