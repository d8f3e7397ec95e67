"""Restarts the optimisation: random starts, their noise, and runs shared out over processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator, Tensor

from inversion.combine import Combination
from inversion.objective import NO_LOSSES, Losses, Objective
from inversion.optimise import Moment, Reconstruction, Saving, go_on_drawing, reconstruct
from inversion.pixel_gradient import PixelGradient
from inversion.saved import SavedSeed, moved, plain_seed, seed_from
from inversion.settings import Loop, MLCOSchedule
from utils.journal import FORGETFUL, Journal, read_only, reading
from utils.shard import ALONE, Shard
from utils.streams import stream


@dataclass(frozen=True)
class Restarts:
    """Holds what every strategy over several seeds takes beside the objective."""

    #: S tensors (B, C, H, W). They may lie on the CPU while the generators are on a GPU: each seed
    #: then visits the GPU only while it is optimised.
    starts: Sequence[Tensor]
    #: One per start, for its Langevin noise, on the device to work on.
    generators: Sequence[Generator]
    #: Settings of each seed's optimisation.
    loop: Loop
    #: Called for every iteration, once its losses are read, as on_step(index, step, losses, rate),
    #: with the index of the seed, or None in MLCO's final stage; a true answer ends this seed and
    #: all later ones.
    on_step: Callable[[int | None, int, Losses[float], float], bool | None] = lambda *_: False
    #: The stages of MLCO.
    schedule: MLCOSchedule = MLCOSchedule()
    #: Bytes that the per-sample gradients of a combination may take.
    combine_memory: int = 4 * 2**30
    #: Processes that run whole seeds in turn; every one returns the same.
    seed_shard: Shard = ALONE
    #: Called as on_round(iterations done per seed, combination) with every consensus of MLCO.
    on_round: Callable[[int, Combination], None] | None = None
    #: Asked during a combination, which takes long with many images; true interrupts it.
    should_stop: Callable[[], bool] = lambda: False
    #: Where seeds and combinations are saved, and taken from when a killed run goes on.
    journal: Journal = FORGETFUL

    @property
    def journal_of_all(self) -> Journal:
        """The journal for what every process computes alike; one of them saves it."""
        return self.journal if self.seed_shard.is_main else read_only(self.journal)

    def saving(self, save: Callable[[Moment], None], journal: Journal) -> Saving | None:
        """Return how `save` is called when the journal is due; None where nothing is saved."""
        return None if self.journal is FORGETFUL else Saving(journal.due, save)

    def saved_seed(self, index: int) -> SavedSeed | None:
        """Return how far seed number `index` had come when it was saved, None if it was not."""
        name = f"seed-{index}"
        found = self.journal.recall(name)
        if found is None:
            return None
        return seed_from(found, self.starts[index], self.loop.steps, name)


def initial_images(
    seed: int, batch_size: int, image_shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """Draw the start of a seed: (B, C, H, W), N(0, 1) in normalised units, on the CPU.

    It depends on the seed and the shape alone, so it is the same on every device.
    """
    generator = Generator().manual_seed(seed)
    return torch.randn(batch_size, *image_shape, generator=generator).to(dtype)


def noise_generator(seed: int, device: torch.device) -> Generator:
    """Return the source of a seed's Langevin noise, on `device`.

    It is another stream than the seed's start, and than the noise of a client with that seed.
    """
    return stream("Langevin noise", seed, device)


def run_own_seeds(
    objective: Objective,
    pixel_gradient: PixelGradient,
    restarts: Restarts,
    *,
    span: range | None = None,
    before: Sequence[Reconstruction | None] = (),
    keep_states: bool = False,
    goes_on: bool = True,
) -> list[Reconstruction]:
    """Improve the seeds of this process one after the other, and exchange the runs.

    span: as in `reconstruct`. before: the seeds' runs until `span`, to go on from; none at the
    first span. One that ended early stays as it is. keep_states: keep the optimisers' states, so
    that a later span can go on; images and states are kept where the starts are.

    A seed is saved in the journal under its number, and with `goes_on` taken from there as far as
    it had come. Only the first span of a run may go on: from then on what was saved is replaced.

    Returns one run per seed, with the steps of all its spans. After an interruption one process
    alone leaves out seeds that never started.
    """
    span = range(restarts.loop.length) if span is None else span
    runs: list[Reconstruction | None] = [*before] or [None] * len(restarts.starts)
    for index in range(len(restarts.starts)):
        last = runs[index]
        if not restarts.seed_shard.owns(index) or (last is not None and last.stopped is not None):
            continue
        run = _run_seed(
            objective, pixel_gradient, restarts, index, span, last, keep_states=keep_states,
            goes_on=goes_on,
        )  # fmt: skip
        runs[index] = run
        if run.stopped == "interrupted":
            break
    if restarts.seed_shard.size > 1:
        # what a process goes on from must be there once another one has gone on
        restarts.journal.save()
        return exchange(runs, restarts.starts, restarts.seed_shard)
    return [run for run in runs if run is not None]


def _run_seed(
    objective: Objective,
    pixel_gradient: PixelGradient,
    restarts: Restarts,
    index: int,
    span: range,
    last: Reconstruction | None,
    *,
    keep_states: bool,
    goes_on: bool,
) -> Reconstruction:
    """Improve one seed for a span of iterations, from its run before or from where it was saved."""
    start, generator = restarts.starts[index], restarts.generators[index]
    saved = restarts.saved_seed(index) if goes_on else None
    moment, steps = None, 0 if last is None else last.steps
    objective = objective.afresh()
    if saved is not None and saved.span == (span.start, span.stop):
        if saved.run is not None:
            go_on_drawing(generator, saved.noise, span.stop)
            return at_home(saved.run, start.device, keep_states=keep_states)
        moment, steps = saved.moment, saved.steps
        if objective.place is not None and saved.place is not None:
            with reading("the surrogate's place"):
                objective.place.go_on(saved.place)

    def save(moment: Moment) -> None:
        place = None if objective.place is None else objective.place.state()
        now = SavedSeed((span.start, span.stop), steps, moment, None, place=place)
        restarts.journal.note(f"seed-{index}", partial(plain_seed, now), order=2 * moment.step)
        restarts.journal.save()

    run = reconstruct(
        partial(pixel_gradient, objective),
        (start if last is None else last.x).to(generator.device),
        restarts.loop,
        generator=generator,
        on_step=partial(restarts.on_step, index),
        span=span,
        optimiser_state=None if last is None else last.optimiser_state,
        batch_shard=objective.batch_shard,
        since=moment,
        saving=restarts.saving(save, restarts.journal),
    )
    run = at_home(replace(run, steps=run.steps + steps), start.device, keep_states=keep_states)
    if run.stopped != "interrupted":
        noise = generator.get_state()
        end = SavedSeed((span.start, span.stop), steps, None, run, noise=noise)
        # above a moment after the last iteration, which another process's manifest may name
        restarts.journal.note(f"seed-{index}", partial(plain_seed, end), order=2 * span.stop + 1)
    return run


def at_home(run: Reconstruction, device: torch.device, *, keep_states: bool) -> Reconstruction:
    """Return a run whose images, and whose optimiser's state if it is kept, are on `device`."""
    state = moved(run.optimiser_state, device) if keep_states else None
    return replace(run, x=run.x.to(device), optimiser_state=state)


def exchange(
    runs: Sequence[Reconstruction | None], starts: Sequence[Tensor], seed_shard: Shard
) -> list[Reconstruction]:
    """Return all seeds' runs on every process, each of which ran its own of them in turn.

    runs: one per seed, None where another process ran it. A seed that nobody started, after an
    interruption, gets its start `starts[index]` with NaN losses. Optimisers' states stay where
    they are. Every process must call it.
    """
    own = {i: run for i, run in enumerate(runs) if run is not None and seed_shard.owns(i)}
    small = {
        i: replace(run, x=torch.empty(0), optimiser_state=None)  # all but the images
        for i, run in own.items()
    }
    described = {i: run for part in seed_shard.objects(small) for i, run in part.items()}
    whole = []
    for index, start in enumerate(starts):
        if index not in described:
            whole.append(Reconstruction(start, NO_LOSSES, 0, "interrupted"))
            continue
        x = own[index].x if index in own else torch.zeros_like(start)
        x = seed_shard.sum(x.to(seed_shard.device)).to(start.device)  # one seed at a time
        whole.append(own.get(index) or replace(described[index], x=x))
    return whole
