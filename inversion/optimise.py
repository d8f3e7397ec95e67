"""The optimisation loop: from initial images to a reconstruction."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from inversion.objective import Losses


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
class Loop:
    """Settings of one optimisation.

    steps ≥ 1 iterations; lr > 0, the first step size, which falls along a cosine to
    min(1e-3, lr). signed: step along the sign of the derivative. box: (low, high), each
    (C, 1, 1), to which the images are clamped after every step. keep_best: return the iterate
    with the lowest gradient loss instead of the last. noise ≥ 0: after every step
    rate · noise · N(0, 1) is added (Langevin dynamics, Welling & Teh, 2011).
    """

    steps: int
    lr: float
    optimiser: str = "Adam"
    signed: bool = False
    box: tuple[Tensor, Tensor] | None = None
    keep_best: bool = False
    noise: float = 0.0

    def __post_init__(self):
        if self.steps < 1 or self.lr <= 0:
            raise ValueError(f"steps {self.steps} and lr {self.lr} must be positive")
        if self.signed and self.optimiser == "LBFGS":
            raise ValueError("L-BFGS needs the derivative itself, not its sign")

    def rate(self, step: int) -> float:
        """Step size at iteration `step` of 0 … steps − 1."""
        low = min(1e-3, self.lr)
        return low + (self.lr - low) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def progress(self, step: int) -> float:
        """Share of the run done at iteration `step`: 0 at the first, 1 at the last."""
        return step / max(1, self.steps - 1)


@dataclass(frozen=True)
class Reconstruction:
    """x: (B, C, H, W) images. losses: of exactly these images (floats). steps: iterations done.

    stopped: None when all iterations ran, "not finite" when a loss was not, "interrupted" when
    `on_step` asked to stop.
    """

    x: Tensor
    losses: Losses
    steps: int
    stopped: str | None = None


class _NotFiniteError(Exception):
    pass


def reconstruct(
    pixel_gradient: Callable[[Tensor, float], tuple[Losses, Tensor]],
    x_init: Tensor,
    loop: Loop,
    *,
    generator: Generator | None = None,
    on_step: Callable[[int, Losses, float], bool | None] | None = None,
) -> Reconstruction:
    """Improve the images `x_init` (B, C, H, W) for `loop.steps` iterations.

    pixel_gradient(x, progress): losses at `x` and the derivative (inversion/pixel_gradient.py,
    with the objective bound). generator: source of the Langevin noise, on the device of
    `x_init`. on_step(step, losses, rate): called after every iteration with the losses before
    its update, as floats; a true answer ends the loop.

    Every loss is paired with the images it was computed at. A loss that is not finite ends the
    loop and returns the best images until then, `x_init` with NaN losses if there were none.
    """
    x = _boxed(x_init.detach().clone(), loop.box).requires_grad_()
    optimiser = OPTIMISERS[loop.optimiser](x, loop.lr)
    latest = None
    scale = None if loop.optimiser in NORMALISED else 1.0
    best_x, best = x.detach().clone(), Losses(math.nan, math.nan, {})

    def evaluate(progress: float) -> Tensor:
        nonlocal latest, best_x, best, scale
        losses, derivative = pixel_gradient(x.detach(), progress)
        latest = losses.floats()
        if not (math.isfinite(latest.total) and bool(torch.isfinite(derivative).all())):
            raise _NotFiniteError
        if not latest.gradient >= best.gradient:  # true for the NaN of the start as well
            best_x, best = x.detach().clone(), latest
        if scale is None:
            scale = 1 / abs(latest.total or 1.0)
        x.grad = derivative.sign() if loop.signed else derivative * scale
        return losses.total * scale

    step, stopped = 0, None
    try:
        for step in range(loop.steps):
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
                        x.shape, dtype=x.dtype, device=x.device, generator=generator
                    )
                    x.add_(noise, alpha=rate * loop.noise)
                x.copy_(_boxed(x, loop.box))
            if on_step is not None and on_step(step, first[0], rate):
                stopped = "interrupted"
                break
        step += 1
        evaluate(loop.progress(step - 1))
    except _NotFiniteError:
        return Reconstruction(best_x, best, step, "not finite")
    if loop.keep_best:
        return Reconstruction(best_x, best, step, stopped)
    return Reconstruction(x.detach().clone(), latest, step, stopped)


def _boxed(x: Tensor, box: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if box is None else x.clamp(*(bound.to(x) for bound in box))
