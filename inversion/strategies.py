"""Strategies: how several seeds become one reconstruction.

Each takes the objective, a function of inversion/pixel_gradient.py and `Restarts`, and returns an
`Outcome`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from inversion.mlco import mlco
from inversion.objective import Objective
from inversion.optimise import Outcome, lowest
from inversion.pixel_gradient import PixelGradient
from inversion.restarts import Restarts, run_own_seeds
from utils.matching import assign


def best(objective: Objective, pixel_gradient: PixelGradient, restarts: Restarts) -> Outcome:
    """Run every start on its own and choose the one with the lowest gradient loss.

    Without a gradient loss (`prior_only`) the lowest total decides.
    """
    runs = run_own_seeds(objective, pixel_gradient, restarts)
    chosen = lowest([run.losses.criterion for run in runs])
    return Outcome(runs[chosen], tuple(runs), chosen, sum(run.steps for run in runs))


def mean(objective: Objective, pixel_gradient: PixelGradient, restarts: Restarts) -> Outcome:
    """Average the images of all seeds, position by position: a control that costs nothing.

    Images of one label may come in any order, so within a label every seed is first paired with
    the best one by least squares.
    """
    outcome = best(objective, pixel_gradient, restarts)
    reference = outcome.final.x
    total = torch.zeros_like(reference)
    started = [run for run in outcome.runs if run.steps] or [outcome.final]
    for run in started:
        total += _paired(run.x, reference, objective.y.to(reference.device))
    x = total / len(started)
    losses = objective.value(x.to(objective.y.device), 1.0).floats()
    final = replace(outcome.final, x=x, losses=losses, optimiser_state=None)
    return replace(outcome, final=final, chosen=None)


def _paired(x: Tensor, reference: Tensor, y: Tensor) -> Tensor:
    """Return `x` with the images of every label in the order that suits `reference` best."""
    order = torch.arange(len(x), device=x.device)
    for label in y.unique():
        places = (y == label).nonzero().flatten()
        order[places] = places[assign(x[places], reference[places])]
    return x[order]


#: name in `inversion.settings.STRATEGIES` → strategy.
STRATEGIES: dict[str, Callable[[Objective, PixelGradient, Restarts], Outcome]] = {
    "best": best,
    "mean": mean,
    "mlco": mlco,
}
