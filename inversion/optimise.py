"""The optimisation loop: from initial images to a reconstruction."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from inversion.objective import Losses
from inversion.settings import Loop
from utils.shard import ALONE, Shard


def _adam(x: Tensor, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([x], lr=lr)


def _lbfgs(x: Tensor, lr: float) -> torch.optim.Optimizer:
    """One L-BFGS direction a step, with a strong-Wolfe line search of up to 25 evaluations.

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


#: `--optim`: name → optimiser over the images.
OPTIMISERS = {"Adam": _adam, "LBFGS": _lbfgs}
#: Those that see the objective divided by its value at the start. The first step of L-BFGS is the
#: derivative itself: for losses near 1e-5 it moves the images so little that float32 shows no
#: difference in the loss, and the line search gives up.
NORMALISED = {"LBFGS"}


@dataclass(frozen=True)
class Reconstruction:
    """x: (B, C, H, W) images. losses: of exactly these images (floats). steps: iterations done.

    stopped: None when all iterations ran, "not finite" when a loss was not, "interrupted" when
    `on_step` asked to stop. optimiser_state: to go on from.
    """

    x: Tensor
    losses: Losses
    steps: int
    stopped: str | None = None
    optimiser_state: dict | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Outcome:
    """What a strategy over several seeds returns.

    final: the reconstruction. runs: one a seed, with the steps of all its parts; fewer than
    seeds when interrupted. chosen: index of the run that is the final one, None where no single
    one is. iterations: of all seeds and stages together.
    """

    final: Reconstruction
    runs: tuple[Reconstruction, ...]
    chosen: int | None
    iterations: int


def lowest(losses: Sequence[float]) -> int:
    """Index of the lowest loss; one that is not finite counts as the highest."""
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return finite.index(min(finite))


class _NotFiniteError(Exception):
    pass


def reconstruct(
    pixel_gradient: Callable[[Tensor, float], tuple[Losses, Tensor]],
    x_init: Tensor,
    loop: Loop,
    *,
    generator: Generator | None = None,
    on_step: Callable[[int, Losses, float], bool | None] | None = None,
    span: range | None = None,
    optimiser_state: dict | None = None,
    shard: Shard = ALONE,
) -> Reconstruction:
    """Improve the images `x_init` (B, C, H, W) for `loop.steps` iterations.

    With `span` only for those of the loop's iterations, at their rates and weights; with the
    `optimiser_state` of the part before, parts in a row are one run.

    pixel_gradient(x, progress): losses at `x` and the derivative (inversion/pixel_gradient.py,
    with the objective bound). generator: source of the Langevin noise, on the device of
    `x_init`. on_step(step, losses, rate): called after every iteration with the losses before
    its update, as floats; a true answer ends the loop.

    shard: with several processes each is given the whole `x_init` and improves its part of it;
    noise is drawn for the whole batch, all end the loop together, and the result is whole. Only
    the optimiser's state is this process's own.

    Every loss is paired with the images it was computed at. A loss that is not finite ends the
    loop and returns the best images until then, `x_init` with NaN losses if there were none.
    """
    x = _boxed(shard.split(x_init.detach()).clone(), loop.box).requires_grad_()
    optimiser = OPTIMISERS[loop.optimiser](x, loop.lr)
    scale = None if loop.optimiser in NORMALISED else 1.0
    if optimiser_state is not None:
        optimiser.load_state_dict(optimiser_state["optimiser"])
        scale = optimiser_state["scale"]
    span = range(loop.steps) if span is None else span
    latest = None
    best_x, best = x.detach().clone(), Losses(math.nan, math.nan, {})

    def evaluate(progress: float) -> Tensor:
        nonlocal latest, best_x, best, scale
        losses, derivative = pixel_gradient(x.detach(), progress)
        latest = losses.floats()
        if shard.any(not (math.isfinite(latest.total) and bool(derivative.sum().isfinite()))):
            raise _NotFiniteError
        if not latest.gradient >= best.gradient:  # true for the NaN of the start as well
            best_x, best = x.detach().clone(), latest
        if scale is None:
            scale = 1 / abs(latest.total or 1.0)
        x.grad = derivative.sign() if loop.signed else derivative * scale
        return losses.total * scale

    step, done, stopped = span.start, 0, None
    try:
        for step in span:
            rate = loop.rate(step)
            optimiser.param_groups[0]["lr"] = rate
            first = []

            def closure(first=first, step=step):
                total = evaluate(loop.progress(step))
                first.append(latest)
                return total

            optimiser.step(closure)
            with torch.no_grad():
                if loop.noise:
                    noise = torch.randn(
                        x_init.shape, dtype=x.dtype, device=x.device, generator=generator
                    )
                    x.add_(shard.split(noise), alpha=rate * loop.noise)
                x.copy_(_boxed(x, loop.box))
            done += 1
            if shard.any(on_step is not None and on_step(step, first[0], rate)):
                stopped = "interrupted"
                break
        evaluate(loop.progress(step))
    except _NotFiniteError:
        return Reconstruction(shard.gather(best_x, len(x_init)), best, done, "not finite")
    state = {"optimiser": optimiser.state_dict(), "scale": scale}
    if loop.keep_best:
        return Reconstruction(shard.gather(best_x, len(x_init)), best, done, stopped, state)
    latest_x = shard.gather(x.detach().clone(), len(x_init))
    return Reconstruction(latest_x, latest, done, stopped, state)


def _boxed(x: Tensor, box: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if box is None else x.clamp(*(bound.to(x) for bound in box))
