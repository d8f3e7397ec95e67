"""Minimum Loss Combinatorial Optimisation, the main contribution of E2EGI (2023).

The batch is reconstructed from several seeds. For each image, the seed whose version lowers the
gradient loss is taken into a consensus, towards which all seeds are then pulled. At the end the
consensus alone is refined.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from inversion.combine import Combination, InterruptedSearchError, combine
from inversion.objective import Objective
from inversion.optimise import (
    Moment,
    Outcome,
    Reconstruction,
    go_on_drawing,
    lowest,
    reconstruct,
)
from inversion.pixel_gradient import PixelGradient
from inversion.restarts import Restarts, at_home, run_own_seeds
from inversion.saved import (
    SavedSeed,
    combination_from,
    plain_combination,
    plain_seed,
    seed_from,
)
from utils.errors import StateError
from utils.journal import reading


def mlco(objective: Objective, pixel_gradient: PixelGradient, restarts: Restarts) -> Outcome:
    """Run the three stages; one rate and weight schedule, that of the loop, runs through all.

    Every seed keeps its optimiser's state through the rounds; a round starts from what the part
    before returned. Langevin noise ends with the rounds. The final stage starts from the newest
    consensus with a fresh optimiser. A seed whose loss is not finite is left where it was best,
    and still combined. An interruption ends the run with the best of seeds and consensus so far.
    With several processes for whole seeds, every one computes combinations and the final stage.
    The journal keeps every seed, the newest consensus and the final stage.

    The result's `runs` are the seeds; its final reconstruction is the refined consensus.
    """
    initial, rounds, final = restarts.schedule.spans(restarts.loop.steps)
    device = restarts.generators[0].device
    spans = [initial, *rounds]
    saved = _Saved.of(restarts, spans)
    restarts.seed_shard.any(False)  # all have recalled it before one of them saves
    runs, consensus = saved.runs, saved.consensus
    for number, span in enumerate(spans[saved.spans :], saved.spans + 1):
        pull = None if consensus is None else consensus.x.to(device)
        runs = run_own_seeds(
            objective.with_consensus(pull),
            pixel_gradient,
            restarts,
            span=span,
            before=runs,
            keep_states=True,
            goes_on=number == saved.spans + 1,
        )
        if any(run.stopped == "interrupted" for run in runs):
            return _interrupted(objective, runs, consensus)
        combination = _combined(objective, [run.x for run in runs], restarts)
        if combination is None:
            return _interrupted(objective, runs, consensus)
        consensus = combination
        if restarts.on_round is not None:
            restarts.on_round(span.stop, consensus)
        _note_consensus(restarts, number, consensus)

    assert consensus is not None  # there always is an initial stage
    if saved.final is not None and saved.final.run is not None:
        end = saved.final.run
    else:
        end = _refined(objective, pixel_gradient, restarts, consensus.x.to(device), final, saved)
    return Outcome(end, tuple(runs), None, sum(run.steps for run in runs) + end.steps)


@dataclass(frozen=True)
class _Saved:
    """Holds how far a killed run had come."""

    #: Number of spans that all seeds had ended and that were combined.
    spans: int
    #: The seeds' runs at the end of these spans.
    runs: list[Reconstruction]
    #: What they were combined to.
    consensus: Combination | None
    #: How far the final stage had come.
    final: SavedSeed | None

    @classmethod
    def of(cls, restarts: Restarts, spans: Sequence[range]) -> "_Saved":
        """Recall it, all at once: later saves replace what is recalled."""
        fact = restarts.journal.recall("consensus")
        if fact is None:
            return cls(0, [], None, None)
        with reading("consensus"):
            done, x = int(fact["spans"]), fact["x"]
            if not 0 < done <= len(spans):
                raise ValueError("of other stages")
        consensus = combination_from(fact, x, restarts.starts, "consensus")
        end = spans[done - 1].stop
        runs = [_run_until(restarts, index, end) for index in range(len(restarts.starts))]
        final = restarts.journal.recall("final")
        if final is not None:
            final = seed_from(final, restarts.starts[0], restarts.loop.steps, "final")
        return cls(done, runs, consensus, final)


def _run_until(restarts: Restarts, index: int, end: int) -> Reconstruction:
    """Return the run of a seed at the end of the span that stops at iteration `end`.

    Of a seed that was saved in the next span, from where it goes on, only the best until then.
    """
    seed = restarts.saved_seed(index)
    if seed is None:
        raise StateError(f"the saved state lacks seed-{index}; start the run anew")
    device = restarts.starts[index].device
    if seed.moment is not None:
        best = seed.moment.best_x.to(device)
        return Reconstruction(best, seed.moment.best, seed.steps, None)
    assert seed.run is not None  # `seed_from` saw to it
    if seed.span[1] > end:
        return Reconstruction(seed.run.x.to(device), seed.run.losses, seed.steps, None)
    go_on_drawing(restarts.generators[index], seed.noise, end)
    return at_home(seed.run, device, keep_states=True)


def _note_consensus(restarts: Restarts, spans: int, consensus: Combination) -> None:
    """Note what the first `spans` spans were combined to."""

    def plain() -> dict:
        return {"spans": spans, "x": consensus.x.cpu(), **plain_combination(consensus)}

    restarts.journal_of_all.note("consensus", plain, order=spans)
    if restarts.seed_shard.size > 1:
        restarts.journal.save()
        restarts.seed_shard.any(False)  # saved before another process goes on from it


def _refined(
    objective: Objective,
    pixel_gradient: PixelGradient,
    restarts: Restarts,
    x: Tensor,
    span: range,
    saved: _Saved,
) -> Reconstruction:
    """Refine the consensus `x` alone, from where it was saved."""
    ends, journal = (span.start, span.stop), restarts.journal_of_all

    def save(moment: Moment) -> None:
        now = SavedSeed(ends, 0, moment, None)
        journal.note("final", partial(plain_seed, now), order=moment.step)
        journal.save()

    end = reconstruct(
        partial(pixel_gradient, objective),
        x,
        replace(restarts.loop, noise=0.0),
        on_step=partial(restarts.on_step, None),
        span=span,
        batch_shard=objective.batch_shard,
        since=None if saved.final is None else saved.final.moment,
        saving=restarts.saving(save, journal),
    )
    if end.stopped != "interrupted":
        done = SavedSeed(ends, 0, None, replace(end, optimiser_state=None))
        journal.note("final", partial(plain_seed, done), order=span.stop)
    return end


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
    x = consensus.x.to(objective.y.device)
    losses = objective.with_consensus(None).value(x).floats()
    final = Reconstruction(consensus.x, losses, 0, "interrupted")
    return Outcome(final, tuple(runs), None, iterations)
