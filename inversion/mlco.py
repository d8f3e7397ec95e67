"""Minimum Loss Combinatorial Optimisation, the main contribution of E2EGI (2023).

Several groups of candidates are inverted from different seeds. Image by image the group whose
copy lowers the gradient loss enters a consensus, which pulls every group on; at the end the
consensus alone is refined.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor

from inversion.combine import Combination, InterruptedSearchError, combine
from inversion.objective import Objective
from inversion.optimise import Outcome, Reconstruction, lowest, reconstruct
from inversion.restarts import exchange
from inversion.settings import Loop, MLCOSchedule
from utils.shard import ALONE, Shard


def mlco(
    objective: Objective,
    method: Callable,
    x_seeds: Sequence[Tensor],
    loop: Loop,
    *,
    generators: Sequence[Generator],
    on_step: Callable,
    schedule: MLCOSchedule,
    memory: int = 4 * 2**30,
    on_round: Callable[[int, Combination], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    seeds: Shard = ALONE,
) -> Outcome:
    """Run the three stages; one rate and weight schedule, that of `loop`, runs through all.

    x_seeds: S starts (B, C, H, W), which may lie on the CPU while the generators are on a GPU:
    each seed then visits the device only while it is optimised. Every seed keeps its
    optimiser's state through the rounds; a round starts from what the part before returned.
    Langevin noise ends with the rounds. The final stage starts from the newest consensus with a
    fresh optimiser. A seed whose loss is not finite is left where it was best, and still
    combined. on_step(index, step, losses, rate): index None for the final stage; a true answer
    ends the run with the best of seeds and consensus so far. on_round(iterations, combination):
    called with every consensus. memory, should_stop: see `combine`. seeds: processes that run
    whole seeds in turn; combinations and the final stage every one computes.

    The result's `runs` are the seeds; its final reconstruction is the refined consensus.
    """
    initial, rounds, final = schedule.spans(loop.steps)
    runs: list[Reconstruction | None] = [None] * len(x_seeds)
    consensus: Combination | None = None
    for span in [initial, *rounds]:
        toward = consensus.x.to(generators[0].device) if consensus is not None else None
        pixel_gradient = partial(method, objective.toward(toward))
        for index, generator in enumerate(generators):
            before = runs[index]
            if not seeds.owns(index) or (before is not None and before.stopped is not None):
                continue
            run = reconstruct(
                pixel_gradient,
                (x_seeds[index] if before is None else before.x).to(generator.device),
                loop,
                generator=generator,
                on_step=partial(on_step, index),
                span=span,
                optimiser_state=None if before is None else before.optimiser_state,
                shard=objective.shard,
            )
            runs[index] = _stored(run, 0 if before is None else before.steps, x_seeds[index].device)
            if run.stopped == "interrupted":
                break
        if seeds.size > 1:
            runs = exchange(runs, x_seeds, seeds)
        if any(run is not None and run.stopped == "interrupted" for run in runs):
            return _interrupted(objective, runs, consensus)
        found = _combined(objective, [run.x for run in runs], seeds, memory, should_stop)
        if found is None:
            return _interrupted(objective, runs, consensus)
        consensus = found
        if on_round is not None:
            on_round(span.stop, consensus)

    end = reconstruct(
        partial(method, objective),
        consensus.x.to(generators[0].device),
        replace(loop, noise=0.0),
        on_step=partial(on_step, None),
        span=final,
        shard=objective.shard,
    )
    return Outcome(end, tuple(runs), None, sum(run.steps for run in runs) + end.steps)


def _combined(objective, x_seeds, seeds: Shard, memory, should_stop) -> Combination | None:
    """The combination, None when it was interrupted.

    Processes that share out seeds all compute it; should rounding differ, the first one's counts.
    """
    try:
        found = combine(objective, x_seeds, memory=memory, should_stop=should_stop)
    except InterruptedSearchError:
        found = None
    if seeds.size == 1:
        return found
    found = seeds.objects(None if found is None else replace(found, x=None))[0]
    if found is None:
        return None
    return replace(found, x=torch.stack([x_seeds[s][i] for i, s in enumerate(found.choice)]))


def _stored(run: Reconstruction, steps_before: int, device: torch.device) -> Reconstruction:
    """The run so far, kept on `device`."""
    state = _moved(run.optimiser_state, device)
    return replace(run, x=run.x.to(device), steps=run.steps + steps_before, optimiser_state=state)


def _moved(value, device):
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(v, device) for key, v in value.items()}
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    return value


def _interrupted(objective, runs, consensus) -> Outcome:
    """The best of what there is when the run was stopped during its seeds."""
    started = [run for run in runs if run is not None]
    chosen = lowest([run.losses.gradient for run in started])
    final = replace(started[chosen], stopped="interrupted")
    if consensus is not None and not consensus.loss > final.losses.gradient:
        x = objective.own(consensus.x.to(objective.y.device))
        losses = objective.toward(None)(x).floats()
        final, chosen = Reconstruction(consensus.x, losses, 0, "interrupted"), None
    return Outcome(final, tuple(started), chosen, sum(run.steps for run in started))
