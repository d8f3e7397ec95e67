"""Says what an attack will do, and what time and memory it will take."""

import itertools
import math
import statistics
import time
from dataclasses import replace
from functools import partial

from inversion.audit.attack import own_seeds, refusing_graphs
from inversion.audit.inputs import Case
from inversion.audit.settings import Settings
from inversion.audit.updates import update_lines, update_model_of
from inversion.combine import combination_method
from inversion.layerwise.attack import target_network
from inversion.layerwise.least_squares import memory_of_system
from inversion.layerwise.trace import largest_system
from inversion.optimise import reconstruct
from inversion.pixel_gradient import pixel_gradient_of
from inversion.restarts import noise_generator
from inversion.settings import FINITE_DIFFERENCES, AttackSettings
from inversion.step_graph import WARM_UPS
from models.gradient import trainable_parameters
from utils.console import duration
from utils.device import device_name, peak_memory_mib
from utils.errors import FaultError


def plan(settings: AttackSettings, case: Case, *, shuffled: bool) -> str:
    """Describe what will be done."""
    lines = []
    if settings.method != "matching":
        lines.append(f"plan: solve the gradient layer by layer, {_setting(case)}")
    if settings.method != "layerwise":
        lines += _matching_lines(settings, case)
    lines += update_lines(update_model_of(settings, case.target), case.target)
    lines += _protection_lines(case)
    if shuffled:
        lines.append("what was sent is shuffled: there is nothing to find in it")
    return "\n      ".join(lines)


def _setting(case: Case) -> str:
    """Describe the batch and the network."""
    target = case.target
    parameters = sum(p.numel() for p in trainable_parameters(case.objective.model).values())
    return (
        f"{target.batch_size} images {target.image_shape}, {target.network} with {parameters:,} "
        f"parameters in {'train' if target.train_mode else 'eval'} mode, "
        f"{device_name(case.device)}"
    )


def _matching_lines(settings: AttackSettings, case: Case) -> list[str]:
    """Describe the iterations, the objective, and what they are shared out over."""
    target, num_seeds = case.target, settings.num_seeds
    stages, lines = f"{num_seeds} seed(s) x {settings.loop.steps:,}", []
    if settings.forms_consensus:
        initial, rounds, final = settings.schedule.spans(settings.loop.steps)
        lengths = " + ".join(f"{len(r):,}" for r in rounds) or "none"
        method, why = combination_method(case.objective, num_seeds, settings.combine_memory)
        stages = (
            f"{num_seeds} seed(s) x ({len(initial):,} initial + "
            f"{final.start - len(initial):,} in {len(rounds)} rounds) + {len(final):,} final"
        )
        lines += [f"rounds: {lengths}", f"combination: {method} ({why})"]
    lines.insert(
        0,
        f"plan: {stages} = {settings.total_iterations(num_seeds):,} iterations, {_setting(case)}",
    )
    lines.append(
        f"{settings.distance} gradient distance, priors: "
        f"{', '.join(settings.prior_names) or 'none'}; BN statistics: "
        f"{case.bn_source or 'not used'}"
    )
    if settings.pixel_gradient == FINITE_DIFFERENCES:
        lines.append(
            "derivative: finite differences of the gradient, which are not exact (weights moved by "
            f"{settings.difference_step:g} of their norm)"
        )
    if settings.precision != "float32":
        lines.append(f"the network's passes are computed in {settings.precision}")
    if settings.loop.cuda_graph:
        lines.append("every iteration is one CUDA graph")
    if case.processes.size > 1:
        lines.append(f"{case.processes.size} processes, each with a part of the {settings.shared}")
    if case.memory is not None:
        lines.append(case.memory.line)
    if num_seeds > 1:
        numbers = num_seeds * target.batch_size * math.prod(target.image_shape)
        size = numbers * target.gradient[0].element_size() / 2**20
        home = "cpu, by --offload-seeds" if settings.offload_seeds else case.device.type
        lines.append(f"images of all seeds: {size:,.1f} MiB, kept on {home}")
    return lines


def _protection_lines(case: Case) -> list[str]:
    protection = case.target.protection
    if protection is None:
        return []
    first, *rest = case.guarantee
    return [f"the client's protection: {protection.description}; {first}", *rest]


def layerwise_estimate(case: Case, max_memory: int) -> str:
    """Tell the size of the largest dense system that solving layer by layer may meet."""
    target, model = case.target, case.objective.model
    try:
        target_network(model, target)
        rows, columns, name = largest_system(model, target.batch_size, target.image_shape)
    except ValueError as error:
        return f"estimate: the gradient cannot be solved layer by layer: {error}"
    return (
        f"estimate: the largest dense system has {rows:,} × {columns:,} numbers ({name}) and takes "
        f"about {memory_of_system(rows, columns) / 2**20:,.0f} MiB; the walk ends where one takes "
        f"more than the {max_memory / 2**20:,.0f} MiB of --max-memory, or before"
    )


def estimate(settings: Settings, case: Case) -> str:
    """Tell what time and memory the plan will take."""
    lines = []
    if settings.attack.method != "matching":
        lines.append(layerwise_estimate(case, settings.attack.max_memory))
    if settings.attack.method != "layerwise":
        beside = ", where that does not determine the images" if lines else ""
        lines.append(_matching_estimate(settings, case, beside))
    return "\n".join(lines)


def _matching_estimate(settings: Settings, case: Case, beside: str) -> str:
    """Measure two steps of the loop, and tell the time and memory that matching will take.

    beside: when it will run, in words.
    """
    attack, scoring = settings.attack, settings.scoring
    seconds = measured_step(attack, case)
    total = seconds * attack.total_iterations(own_seeds(attack, case.processes))
    left_out = ["combinations"] if attack.forms_consensus else []
    left_out += ["controls"] if scoring.metric and scoring.controls is not False else []
    left_out += ["--GInfoR"] if scoring.information else []
    not_counted = f", {' and '.join(left_out)} not counted" if left_out else ""
    return (
        f"estimate{beside}: {seconds * 1e3:.1f} ms per iteration, {duration(total)} in "
        f"all{not_counted}, peak memory {peak_memory_mib(case.device):.0f} MiB"
    )


def measured_step(attack: AttackSettings, case: Case, steps: int = 2) -> float:
    """Return the seconds of one step of the loop: the median of `steps` after those that warm up.

    Raises FaultError where a loss is not finite.
    """
    times = [time.perf_counter()]

    def note_time(*_) -> bool:
        times.append(time.perf_counter())
        return False

    loop = attack.loop_in(case.target.box)
    warm_ups = WARM_UPS + 1 if loop.cuda_graph else 1
    steps += warm_ups - 1
    with refusing_graphs():
        found = reconstruct(
            partial(pixel_gradient_of(attack), case.objective),
            case.start(attack.first_seed).to(case.device),
            replace(loop, steps=max(steps, loop.steps)),
            generator=noise_generator(attack.first_seed, case.device),
            on_step=note_time,
            span=range(steps),
            batch_shard=case.objective.batch_shard,
        )
    if len(times) <= steps:
        raise FaultError(f"the first steps fail: {found.reason}; see --lr and the weights")
    taken = [end - begin for begin, end in itertools.pairwise(times)]
    return statistics.median(taken[warm_ups:])
