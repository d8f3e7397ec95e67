"""How several seeds become one reconstruction."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor

from inversion.mlco import mlco
from inversion.objective import Objective
from inversion.optimise import Outcome, Reconstruction, lowest, reconstruct
from inversion.restarts import exchange
from inversion.settings import Loop
from utils.matching import assign
from utils.shard import ALONE, Shard


def best(
    objective: Objective,
    method: Callable,
    x_seeds: Sequence[Tensor],
    loop: Loop,
    *,
    generators: Sequence[Generator],
    on_step: Callable,
    seeds: Shard = ALONE,
) -> Outcome:
    """Run every start on its own and choose the one with the lowest gradient loss.

    method: a function of PIXEL_GRADIENTS. x_seeds: S starts (B, C, H, W). generators: one a
    seed, for the Langevin noise, on the device to work on. on_step(index, step, losses, rate):
    as in `reconstruct`, with the index of the seed; a true answer ends this seed and all later
    ones. seeds: processes that run whole seeds in turn, each on its own; all return the same.
    """
    runs: list[Reconstruction | None] = [None] * len(x_seeds)
    for index, (x_init, generator) in enumerate(zip(x_seeds, generators, strict=True)):
        if not seeds.owns(index):
            continue
        run = reconstruct(
            partial(method, objective),
            x_init.to(generator.device),
            loop,
            generator=generator,
            on_step=partial(on_step, index),
            shard=objective.shard,
        )
        runs[index] = replace(run, x=run.x.to(x_init.device), optimiser_state=None)
        if run.stopped == "interrupted":
            break
    if seeds.size > 1:
        runs = exchange(runs, x_seeds, seeds)
    runs = [run for run in runs if run is not None]
    chosen = lowest([run.losses.gradient for run in runs])
    return Outcome(runs[chosen], tuple(runs), chosen, sum(run.steps for run in runs))


def mean(objective: Objective, method: Callable, x_seeds: Sequence[Tensor], loop: Loop, **options):
    """The mean of all seeds' images, position by position: a control that costs nothing.

    Runs as `best` does, whose arguments it takes. Images of one label may come in any order, so
    within a label every seed is paired with the best one by least squares before averaging.
    """
    outcome = best(objective, method, x_seeds, loop, **options)
    reference = outcome.final.x
    total = torch.zeros_like(reference)
    started = [run for run in outcome.runs if run.steps] or [outcome.final]
    for run in started:
        total += _paired(run.x, reference, objective.y.to(reference.device))
    x = total / len(started)
    losses = objective(objective.own(x.to(objective.y.device)), 1.0).floats()
    final = Reconstruction(x, losses, outcome.final.steps, outcome.final.stopped)
    return replace(outcome, final=final, chosen=None)


def _paired(x: Tensor, reference: Tensor, y: Tensor) -> Tensor:
    """`x` with the images of every label in the order that suits `reference` best."""
    order = torch.arange(len(x), device=x.device)
    for label in y.unique():
        places = (y == label).nonzero().flatten()
        order[places] = places[assign(x[places], reference[places])]
    return x[order]


#: How several seeds become one reconstruction: name → strategy.
STRATEGIES = {"best": best, "mean": mean, "mlco": mlco}
