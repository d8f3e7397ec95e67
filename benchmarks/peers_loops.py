"""Makes one attack ready to run by the loops of several projects, behind one interface.

Those of Geiping et al. (2020) and of E2EGI are written here from their equations in the plain way:
the whole loss is differentiated by one `backward()`, the network's parameters included. This
project's runs as it is. benchmarks/peers_breaching.py has breaching's.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inversion.objective import Losses, Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import PIXEL_GRADIENTS
from inversion.settings import PRIOR_ONLY, Loop
from models.batchnorm import truncated_derivative
from models.gradient import gradient_mode

#: Called once in every iteration of a loop, always at the same point of it.
Mark = Callable[[], None]
#: Ending of the names of this project's methods with the client's statistics forced.
FORCED = "+forced"


@dataclass(frozen=True)
class Attack:
    """Holds what every method is given: the same task and settings."""

    #: Returns the network, the client's gradient, labels and weights (the cosine distance and TV),
    #: in a copy of its own; takes bn_grad and bn_coupling as `Objective` does.
    objective: Callable[..., Objective]
    #: (C, H, W) of the images.
    shape: tuple[int, int, int]
    #: Mean and standard deviation of the images' normalisation, (C, 1, 1) each.
    normalisation: tuple[Tensor, Tensor]
    #: Weight of the TV prior.
    tv: float
    #: First step size of sign Adam; it falls along a cosine to min(1e-3, lr).
    lr: float
    #: Whether the images are clamped to valid colours after every step.
    boxed: bool
    dtype: torch.dtype = torch.float32

    def loop(self, steps: int) -> Loop:
        """Return the settings of a loop of `steps` iterations."""
        mean, std = self.normalisation
        box = (-mean / std, (1 - mean) / std) if self.boxed else None
        return Loop(steps, self.lr, signed=True, box=box)

    def boxed_start(self, start: Tensor) -> Tensor:
        """Return a start as this project takes it: clamped to valid colours if the images are."""
        box = self.loop(1).box
        return start if box is None else start.clamp(*(side.to(start) for side in box))


@dataclass(frozen=True)
class Method:
    """Holds one method, ready for one attack."""

    #: The network that it evaluates, on which evaluations are counted.
    model: nn.Module
    #: The objective whose loss it computes, but for what `unlike` adds.
    objective: Objective
    #: run(start, steps, mark) → the iterate after `steps` iterations, (B, C, H, W).
    run: Callable[[Tensor, int, Mark], Tensor]
    #: derivative(x) → the loss at `x`, and its derivative by `x`.
    derivative: Callable[[Tensor], tuple[Tensor, Tensor]]
    #: What it computes otherwise than this project, in words.
    note: str = ""
    #: unlike(x) → the part of its loss that `objective` has not; None where there is none.
    unlike: Callable[[Tensor], Tensor] | None = None


def inversefed(attack: Attack) -> Method:
    """Make Geiping et al.'s loop (2020, eq. 4) ready: 1 − cos plus α TV, signs into Adam.

    The three sums of the cosine run over all parameters on the graph, and the target's is summed
    anew in every iteration. The step size follows this benchmark's cosine in place of the paper's
    three drops.
    """
    objective = attack.objective()

    def distance(x: Tensor) -> Tensor:
        product = square = target_square = x.new_zeros(())
        for g, t in zip(_gradient(objective, x), objective.target_gradient, strict=True):
            product = product + (g * t).sum()
            square = square + g.pow(2).sum()
            target_square = target_square + t.pow(2).sum()
        return 1 - product / square.sqrt() / target_square.sqrt()

    return _port(attack, objective, distance)


def original(attack: Attack, *, truncated: bool = False) -> Method:
    """Make E2EGI's loop ready: 1 − ⟨g, g*⟩ / (‖g‖ ‖g*‖) plus TV, and the best iterate is kept.

    The distance of every iterate is read to keep the best, as `--min-grads-loss` does; scored is
    the last one, as of every method. truncated: BatchNorm's second derivative as the original has
    it in train mode; otherwise it is exact, so that all methods compute the same derivative.
    """
    objective = attack.objective(bn_grad="detached" if truncated else "exact")
    lowest = float("inf")
    best = torch.empty(0)

    def distance(x: Tensor) -> Tensor:
        nonlocal lowest, best
        gradient, target = _gradient(objective, x), objective.target_gradient
        product = sum((g * t).sum() for g, t in zip(gradient, target, strict=True))
        norms = [
            torch.stack([part.norm() for part in whole]).norm() for whole in (gradient, target)
        ]
        value = 1 - product / (norms[0] * norms[1])
        if value.item() < lowest:
            lowest, best = value.item(), x.detach().clone()
        return value

    note = "" if truncated else "BatchNorm's second derivative is exact, the original's truncated"
    return _port(attack, objective, distance, truncated=truncated, note=note)


def _gradient(objective: Objective, x: Tensor) -> tuple[Tensor, ...]:
    """Return the gradient of the candidate by every parameter, on the graph."""
    loss = F.cross_entropy(objective.model(x), objective.y)
    return torch.autograd.grad(loss, list(objective.model.parameters()), create_graph=True)


def total_variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours, across plus down."""
    across = (x[..., :, 1:] - x[..., :, :-1]).abs().mean()
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
    return across + down


def _port(
    attack: Attack,
    objective: Objective,
    distance: Callable[[Tensor], Tensor],
    *,
    truncated: bool = False,
    note: str = "",
) -> Method:
    """Put the plain loop around a distance, which is given the candidate."""
    model = objective.model

    def mode() -> ExitStack:
        stack = ExitStack()
        if truncated:
            stack.enter_context(truncated_derivative(model))
        stack.enter_context(gradient_mode(model, objective.loss.train_mode))
        return stack

    def backward(x: Tensor) -> Tensor:
        x.grad = None
        model.zero_grad()
        loss = distance(x) + attack.tv * total_variation(x)
        loss.backward()
        return loss.detach()

    def run(start: Tensor, steps: int, mark: Mark) -> Tensor:
        loop = attack.loop(steps)
        x = attack.boxed_start(start).detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([x], lr=attack.lr)
        with mode():
            for step in range(steps):
                optimiser.param_groups[0]["lr"] = loop.rate(step)
                backward(x)
                assert x.grad is not None
                x.grad.sign_()
                optimiser.step()
                if loop.box is not None:
                    low, high = loop.box
                    x.data = torch.max(torch.min(x.data, high.to(x)), low.to(x))
                mark()
        return x.detach()

    def derivative(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().clone().requires_grad_()
        with mode():
            loss = backward(x)
        assert x.grad is not None
        return loss, x.grad

    return Method(model, objective, run, derivative, note)


def own(attack: Attack, name: str) -> Method:
    """Make this project's loop ready, by a name of `OWN`."""
    pixel_gradient = PIXEL_GRADIENTS[name.removesuffix(FORCED)]
    forced = name.endswith(FORCED)
    objective = attack.objective(bn_coupling="forced" if forced else "exact")

    def bound(x: Tensor, progress: float = 0.0) -> tuple[Losses[Tensor], Tensor]:
        return pixel_gradient(objective, x, progress)

    def run(start: Tensor, steps: int, mark: Mark) -> Tensor:
        marks = itertools.repeat(mark, steps)

        def marked(x: Tensor, progress: float) -> tuple[Losses[Tensor], Tensor]:
            next(marks, lambda: None)()  # the loop may evaluate the images once more at its end
            return bound(x, progress)

        return reconstruct(marked, start, attack.loop(steps)).x

    def derivative(x: Tensor) -> tuple[Tensor, Tensor]:
        losses, slope = bound(x)
        return losses.total, slope

    note = "statistics forced: another function of the images" if forced else ""
    return Method(objective.model, objective, run, derivative, note)


#: Pixel gradients that are the plain one to rounding; others approximate it.
EXACT = ("exact", "plain")
#: Names of this project's methods: pixel gradients, each also with the statistics forced.
OWN = [
    name + ending for name in PIXEL_GRADIENTS if name != PRIOR_ONLY for ending in ("", FORCED)
]  # fmt: skip
