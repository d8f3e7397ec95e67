"""Matches activations: images whose values inside the network are the recovered ones.

With BatchNorm as a known affine map, images do not interact in the network's front and only first
derivatives are needed, unlike for the matching of gradients.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from inversion.layerwise.front import Front
from inversion.layerwise.stages import keep, memory_of, note, restore, same_kind, take_steps
from utils.journal import FORGETFUL, Journal, reading

#: L-BFGS steps between two looks at the residual.
_CHUNK = 10
#: A squared relative residual that float64 cannot improve.
_EXACT = 1e-29
#: Weight, beside the squared relative residual, of the mean square by which pixels leave the box.
_OUTSIDE = 1.0
#: L-BFGS ends where that many steps lower the squared residual by a smaller share than this.
_STALLED = 1e-3


@dataclass(frozen=True)
class Matched:
    """Holds the images that a matching of activations arrived at."""

    #: (B, C, H, W) of float64, normalised, inside the box.
    images: Tensor
    #: (B,) of float64: the root of each image's squared relative residual, that of these images.
    residual: Tensor


@dataclass(frozen=True)
class Matching:
    """Says how images are matched to activations."""

    adam_steps: int
    #: First rate of Adam, which falls to 0 as a cosine.
    rate: float
    #: At most, for every image.
    lbfgs_steps: int


def match_activations(
    front: Front,
    targets: Mapping[str, Tensor],
    low: Tensor,
    high: Tensor,
    start: Tensor,
    how: Matching,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    journal: Journal = FORGETFUL,
) -> Matched:
    """Find images (B, C, H, W) whose tensors `front` are the `targets`, from `start` on.

    Each image has its own loss, Σ over `targets` of ‖front(x) − t‖² / ‖t‖². First Adam in float32,
    clamped to the box of `low` and `high` (C, 1, 1); then L-BFGS in float64 for each image by
    itself, which ends early where ten steps no longer help, with a penalty outside of the box
    instead of the clamp. Where the tensors determine the image, the second stage makes it exact.
    An image whose residual it does not lower stays as Adam left it.

    targets: name → (B, …), names of the front. should_stop: asked between steps; true ends the
    matching with what there is, of every image no worse than its start. journal: where the matching
    is saved on its way, and from where a killed one goes on.

    Raises ValueError for a target that the front does not compute, StateError where what the
    journal recalls does not fit.
    """
    problem = Problem(front, targets)
    box = low.double().to(start.device), high.double().to(start.device)
    begun = start.detach().double().clamp(*box)
    x = begun
    if how.adam_steps:
        x = _adam(problem, start.detach().clone(), (low, high), how, should_stop, journal)
        x = x.double().clamp(*box)
        if should_stop():  # Adam may have been at work, which goes astray before it arrives
            x = nearer(problem, begun, x)
    if how.lbfgs_steps:
        found = [
            _lbfgs(problem.of(i), x[i : i + 1], box, how.lbfgs_steps, should_stop, journal, i)
            for i in range(len(x))
        ]
        x = nearer(problem, x, torch.cat(found).clamp(*box))
    with torch.no_grad():
        return Matched(x, problem.losses(x).sqrt())


@dataclass(frozen=True)
class Whitening:
    """Holds a distance between activations in which they vary alike in all directions."""

    #: (C,): the mean of every channel over public images.
    mean: Tensor
    #: (C, C): the inverse root of the channels' covariance there.
    weights: Tensor

    def of(self, difference: Tensor) -> Tensor:
        """Return a difference of activations (B, C, h, w) in units of their spread."""
        return torch.einsum("ij,njhw->nihw", self.weights.to(difference), difference)


class Problem:
    """Compares images with targets: one loss per image.

    The loss is Σ over `targets` of ‖W (front(x) − t)‖² / ‖W (t − mean)‖², W and mean being those
    of `whitened`; without one, W is the identity and the mean 0.

    Raises ValueError for a target that the front does not compute, and for none at all.
    """

    def __init__(
        self,
        front: Front,
        targets: Mapping[str, Tensor],
        whitened: Mapping[str, Whitening] = MappingProxyType({}),
    ):
        missing = [name for name in targets if name not in front.names]
        if missing or not targets:
            raise ValueError(f"the front does not compute {', '.join(missing) or 'any target'}")
        self.front, self.targets, self.whitened = front, targets, whitened
        self.scale = {}
        for name, target in targets.items():
            value = target.double()
            if name in whitened:
                value = whitened[name].of(value - whitened[name].mean.to(value)[:, None, None])
            self.scale[name] = 1 / _squares(value).clamp_min(1e-300)

    def of(self, i: int) -> "Problem":
        """Return the problem of image i alone."""
        own = {name: t[i : i + 1] for name, t in self.targets.items()}
        return Problem(self.front, own, self.whitened)

    def losses(self, x: Tensor) -> Tensor:
        """Return the squared relative residuals (B,), with derivatives, in the type of `x`."""
        found, total = self.front(x), x.new_zeros(len(x))
        for name, target in self.targets.items():
            gap = found[name] - target.to(x)
            if name in self.whitened:
                gap = self.whitened[name].of(gap)
            total = total + _squares(gap) * self.scale[name].to(x)
        return total


@torch.no_grad()
def nearer(problem: Problem, x: Tensor, other: Tensor) -> Tensor:
    """Return, per image, the other one (B, C, H, W) where its loss is below that of x, else x."""
    better = problem.losses(other) < problem.losses(x)
    return torch.where(better[:, None, None, None], other, x)


def _squares(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(1)


def _adam(
    problem: Problem,
    x: Tensor,
    box: tuple[Tensor, Tensor],
    how: Matching,
    should_stop: Callable[[], bool],
    journal: Journal,
) -> Tensor:
    x = x.float().requires_grad_()
    low, high = (value.to(x) for value in box)
    optimiser = torch.optim.Adam([x], lr=how.rate)

    def take(step: int) -> None:
        progress = step / how.adam_steps
        optimiser.param_groups[0]["lr"] = how.rate * (1 + math.cos(math.pi * progress)) / 2
        (x.grad,) = torch.autograd.grad(problem.losses(x).sum(), x)
        optimiser.step()
        with torch.no_grad():
            x.clamp_(low, high)

    take_steps(optimiser, how.adam_steps, take, should_stop, journal, "adam")
    return x.detach()


def _lbfgs(
    problem: Problem,
    x: Tensor,
    box: tuple[Tensor, Tensor],
    steps: int,
    should_stop: Callable[[], bool],
    journal: Journal,
    number: int,
) -> Tensor:
    """Improve one image (1, C, H, W) of float64, number `number` of the batch."""
    x = x.detach().clone().requires_grad_()

    def penalised() -> Tensor:
        outside = (x - x.clamp(*box)).square().mean()
        return problem.losses(x).sum() + _OUTSIDE * outside

    with torch.no_grad():
        loss = penalised()
    scale = 1 / loss.clamp_min(_EXACT)
    optimiser = torch.optim.LBFGS(
        [x],
        max_iter=_CHUNK,
        history_size=30,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Any:  # torch says float, and its optimisers pass on any type
        loss = penalised()
        (x.grad,) = torch.autograd.grad(loss * scale, x)
        return loss.detach() * scale

    first, name = 0, f"lbfgs-{number}"
    saved = journal.recall(name)
    if saved is not None:
        with reading("the matching of activations"), torch.no_grad():
            first = range(steps + 1)[int(saved["done"])]
            x.copy_(same_kind(saved["x"], x))
            loss, scale = (same_kind(saved[value], loss) for value in ("loss", "scale"))
            restore(optimiser, saved["optimiser"])

    def now(done: int) -> dict:
        memory = memory_of(optimiser) if done < steps else {}
        return {"done": done, "x": x.detach(), "loss": loss, "scale": scale, "optimiser": memory}

    for done in range(first, steps, _CHUNK):
        if loss <= _EXACT:
            break
        stop = should_stop()
        keep(journal, name, partial(now, done), stop=stop and done > 0)
        if stop:
            return x.detach()
        optimiser.param_groups[0]["max_iter"] = min(_CHUNK, steps - done)
        optimiser.step(closure)
        with torch.no_grad():
            latest = penalised()
        if not latest < loss * (1 - _STALLED):  # or not finite
            break
        loss = latest
    note(journal, name, now(steps))
    return x.detach()
