"""Minimum Loss Combinatorial Optimisation, the main contribution of E2EGI (2023).

The batch is reconstructed from several seeds. For each image, the seed whose version lowers the
gradient loss is taken into a consensus, towards which all seeds are then pulled. At the end the
consensus alone is refined.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from inversion.combine import Combination, InterruptedSearchError, combine
from inversion.objective import Objective
from inversion.optimise import Outcome, Reconstruction, lowest, reconstruct
from inversion.pixel_gradient import PixelGradient
from inversion.restarts import Restarts, run_own_seeds


def mlco(objective: Objective, pixel_gradient: PixelGradient, restarts: Restarts) -> Outcome:
    """Run the three stages; one rate and weight schedule, that of the loop, runs through all.

    Every seed keeps its optimiser's state through the rounds; a round starts from what the part
    before returned. Langevin noise ends with the rounds. The final stage starts from the newest
    consensus with a fresh optimiser. A seed whose loss is not finite is left where it was best,
    and still combined. An interruption ends the run with the best of seeds and consensus so far.
    With several processes for whole seeds, every one computes combinations and the final stage.

    The result's `runs` are the seeds; its final reconstruction is the refined consensus.
    """
    initial, rounds, final = restarts.schedule.spans(restarts.loop.steps)
    device = restarts.generators[0].device
    runs: list[Reconstruction] = []
    consensus: Combination | None = None
    for span in [initial, *rounds]:
        pull = None if consensus is None else consensus.x.to(device)
        runs = run_own_seeds(
            objective.with_consensus(pull),
            pixel_gradient,
            restarts,
            span=span,
            before=runs,
            keep_states=True,
        )
        if any(run.stopped == "interrupted" for run in runs):
            return _interrupted(objective, runs, consensus)
        combination = _combined(objective, [run.x for run in runs], restarts)
        if combination is None:
            return _interrupted(objective, runs, consensus)
        consensus = combination
        if restarts.on_round is not None:
            restarts.on_round(span.stop, consensus)

    assert consensus is not None  # there always is an initial stage
    end = reconstruct(
        partial(pixel_gradient, objective),
        consensus.x.to(device),
        replace(restarts.loop, noise=0.0),
        on_step=partial(restarts.on_step, None),
        span=final,
        batch_shard=objective.batch_shard,
    )
    return Outcome(end, tuple(runs), None, sum(run.steps for run in runs) + end.steps)


def _combined(
    objective: Objective, x_seeds: Sequence[Tensor], restarts: Restarts
) -> Combination | None:
    """Combine the seeds' images; None if that was interrupted.

    Processes that share out seeds all compute it; should rounding differ, the first one's counts.
    """
    found: Combination | None = None
    with contextlib.suppress(InterruptedSearchError):
        found = combine(
            objective, x_seeds, memory=restarts.combine_memory, should_stop=restarts.should_stop
        )
    shard = restarts.seed_shard
    if shard.size == 1:
        return found
    found = shard.objects(None if found is None else replace(found, x=torch.empty(0)))[0]
    if found is None:
        return None
    return replace(found, x=torch.stack([x_seeds[s][i] for i, s in enumerate(found.choice)]))


def _interrupted(
    objective: Objective, runs: Sequence[Reconstruction], consensus: Combination | None
) -> Outcome:
    """Return the best of what there is when the run was stopped during its seeds."""
    chosen = lowest([run.losses.criterion for run in runs])
    final = replace(runs[chosen], stopped="interrupted")
    iterations = sum(run.steps for run in runs)
    if consensus is None or consensus.loss > final.losses.criterion:
        return Outcome(final, tuple(runs), chosen, iterations)
    x = objective.local_part(consensus.x.to(objective.y.device))
    losses = objective.with_consensus(None)(x).floats()
    final = Reconstruction(consensus.x, losses, 0, "interrupted")
    return Outcome(final, tuple(runs), None, iterations)
