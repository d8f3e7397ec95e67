"""Optimises images: one loop from initial images to a reconstruction."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from inversion.objective import NO_LOSSES, Losses, first_not_finite
from inversion.settings import Loop
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
#: (x, progress) → losses at `x` and the derivative there.
BoundPixelGradient = Callable[[Tensor, float], tuple[Losses[Tensor], Tensor]]


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

    #: Asked after every iteration whether to save; a true answer on one process counts for all.
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
    losses, rate): called after every iteration with the losses before its update; a true answer
    ends the loop. span: only those of the loop's iterations, at their rates and weights; with
    the `optimiser_state` of the part before, parts in a row are one run.

    batch_shard: with several processes each is given the whole `x_init` and improves its part of
    it; noise is drawn for the whole batch, all end the loop together, and the result is whole.

    since: a moment of an earlier, killed call with the same arguments, to go on from as if it had
    not been killed. saving: when and how moments of this call are saved.

    Every loss is paired with the images it was computed at. A loss that is not finite ends the
    loop and returns the best images until then, `x_init` with NaN losses if there were none.
    """
    run = _Run(pixel_gradient, x_init, loop, batch_shard, optimiser_state)
    span = range(loop.length) if span is None else span
    begin, stopped, reason = span.start, None, None
    if since is not None:
        begin = since.step
        run.go_on(since, generator)
    step, done = max(span.start, begin - 1), begin - span.start
    for step in range(begin, span.stop):
        rate = loop.rate(step)
        before = run.improve(loop.progress(step), rate, generator)
        if before is None:
            stopped, reason = "not finite", f"at iteration {step} {run.not_finite}"
            break
        done += 1
        wish = GO_ON
        if saving is not None and saving.due():
            wish = SAVE
        if on_step is not None and on_step(step, before, rate):
            wish = STOP
        wish = batch_shard.largest(wish)
        if wish != GO_ON and saving is not None:
            saving.save(run.moment(step + 1, generator))
        if wish == STOP:
            stopped = "interrupted"
            break
    if stopped != "not finite" and not run.evaluate(loop.progress(step)):
        stopped, reason = "not finite", f"after iteration {step} {run.not_finite}"
    best = loop.keep_best or stopped == "not finite"
    x, losses = (run.best_x, run.best) if best else (run.x.detach().clone(), run.latest)
    state = None if stopped == "not finite" else run.state()
    return Reconstruction(batch_shard.gather(x, len(x_init)), losses, done, stopped, state, reason)


class _NotFiniteError(Exception):
    """Leaves the line search of an optimiser at a loss that is not finite."""


class _Run:
    """Carries out one optimisation: holds this process's images, their losses, the best so far."""

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
        self.x = _boxed(shard.split(x_init.detach()).clone(), loop.box).requires_grad_()
        self.optimiser = OPTIMISERS[loop.optimiser](self.x, loop.lr)
        #: Factor of the objective as the optimiser sees it; None until the first evaluation.
        self.scale = None if loop.optimiser in NORMALISED else 1.0
        if state is not None:
            self.optimiser.load_state_dict(self._part(state["optimiser"]))
            self.scale = state["scale"]
        #: Losses at the last evaluation, and the total there as the optimiser sees it.
        self.latest, self.scaled_total = NO_LOSSES, self.x.new_zeros(())
        #: What was not finite at the last evaluation, in words; None where all was.
        self.not_finite: str | None = None
        self.best_x, self.best = self.x.detach().clone(), NO_LOSSES

    def evaluate(self, progress: float) -> bool:
        """Compute losses and derivative at the images; false where one is not finite."""
        losses, derivative = self.pixel_gradient(self.x.detach(), progress)
        self.latest = losses.floats()
        self.not_finite = first_not_finite(self.latest, derivative)
        if self.shard.any(self.not_finite is not None):
            self.not_finite = self.not_finite or "the derivative of other images is not finite"
            return False
        if not self.latest.criterion >= self.best.criterion:  # true for the NaN of the start too
            self.best_x, self.best = self.x.detach().clone(), self.latest
        if self.scale is None:
            self.scale = 1 / abs(self.latest.total or 1.0)
        self.x.grad = derivative.sign() if self.loop.signed else derivative * self.scale
        self.scaled_total = losses.total * self.scale
        return True

    def improve(
        self, progress: float, rate: float, generator: Generator | None
    ) -> Losses[float] | None:
        """Do one iteration; return the losses before its update, None where one is not finite."""
        before: list[Losses[float]] = []

        def closure() -> Any:  # torch says float, and its optimisers pass on any type
            if not self.evaluate(progress):
                raise _NotFiniteError
            before.append(self.latest)
            return self.scaled_total

        self.optimiser.param_groups[0]["lr"] = rate
        try:
            self.optimiser.step(closure)
        except _NotFiniteError:
            return None
        with torch.no_grad():
            self._project(rate, generator)
        return before[0]

    def _project(self, rate: float, generator: Generator | None) -> None:
        """Add the Langevin noise, and clamp the images to the box."""
        if self.loop.noise:
            noise = torch.randn(
                self.shape, dtype=self.x.dtype, device=self.x.device, generator=generator
            )
            self.x.add_(self.shard.split(noise), alpha=rate * self.loop.noise)
        self.x.copy_(_boxed(self.x, self.loop.box))

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
            self.optimiser.load_state_dict(self._part(moment.optimiser_state["optimiser"]))
            self.scale = moment.optimiser_state["scale"]
            if generator is not None:
                go_on_drawing(generator, moment.noise, moment.step)

    def _whole(self, state: Any) -> Any:
        """Return a state in which this process's part of the images is the whole batch."""

        def whole(tensor: Tensor) -> Tensor:
            own = tensor.dim() == len(self.shape) and tensor.shape[1:] == self.shape[1:]
            return self.shard.gather(tensor, self.shape[0]).clone() if own else tensor

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


def _boxed(x: Tensor, box: tuple[Tensor, Tensor] | None) -> Tensor:
    if box is None:
        return x
    low, high = box
    return x.clamp(low.to(x), high.to(x))
