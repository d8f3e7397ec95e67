"""Runs one trial of a hyper-parameter search: the attack on a simulated client, then its score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from inversion.objective import Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import pixel_gradient_of
from inversion.restarts import initial_images, noise_generator
from inversion.settings import AttackSettings
from models.target import GroundTruth, Target
from utils.device import forbid_tensorfloat32
from utils.matching import assign


@dataclass(frozen=True)
class Problem:
    """Holds the attack that trials run: a simulated client with the truth, and the settings.

    A trial attacks with one seed, the first of the settings.
    """

    #: The attacked network of the simulated client.
    model: nn.Module
    #: What the simulated client sent.
    target: Target
    #: Its images, by which trials are scored.
    truth: GroundTruth
    #: (B,) labels that the attack goes by.
    y: Tensor
    #: The attack, with some value for every searched parameter. Its iterations are those that the
    #: rate schedule is made for; a trial may end earlier.
    settings: AttackSettings
    #: Where the BN prior pulls to, "running" or "batch", as in `Objective`.
    bn_source: str = "running"
    #: Where trials compute.
    device: str = "cpu"

    def trial_settings(self, values: Mapping[str, float]) -> AttackSettings:
        """Return the attack with the searched parameters, names in RANGES, at these values.

        A trial returns its last images, not the best ones: their error is what a later report
        goes on from.
        """
        settings = self.settings.with_values(values)
        return replace(settings, loop=replace(settings.loop, keep_best=False))

    def objective(self, settings: AttackSettings) -> Objective:
        """Return the objective of a trial."""
        return Objective(
            self.model.to(torch.device(self.device)),
            self.target,
            self.y,
            settings.weights,
            distance_name=settings.distance,
            bn_source=self.bn_source,
            bn_grad=settings.bn_grad,
            bn_coupling=settings.bn_coupling,
        )


def image_error(x: Tensor, problem: Problem) -> float:
    """Return the mean squared error of normalised images `x` (B, C, H, W) against the truth.

    It is taken in [0, 1] colours, after the best one-to-one pairing.
    """
    from utils.metrics import mse  # seconds, which an attack without a search does not need

    mean, std = problem.target.mean, problem.target.std
    found, true = ((v.cpu() * std + mean).clamp(0, 1) for v in (x, problem.truth.x))
    return mse(found[assign(found, true)], true).mean().item()


def run_trial(
    values: Mapping[str, float],
    problem: Problem,
    reports: Sequence[int],
    report: Callable[[dict, dict], None],
    state: dict | None = None,
) -> None:
    """Run the attack with the searched parameters at `values`, and report after some iterations.

    reports: numbers of iterations, ascending, after which report(figures, state) is called;
    figures are floats, and `state` is what a later call goes on from.

    Raises FloatingPointError when a loss is not finite.
    """
    forbid_tensorfloat32()  # as in the attack
    device = torch.device(problem.device)
    settings = problem.trial_settings(values)
    loop = settings.loop_in(problem.target.box)
    pixel_gradient = partial(pixel_gradient_of(settings), problem.objective(settings))
    generator = noise_generator(settings.first_seed, device)
    x, done, optimiser_state = _start(problem, settings.first_seed).to(device), 0, None
    if state is not None:
        x, done, optimiser_state = state["x"].to(device), state["done"], state["optimiser"]
        generator.set_state(state["generator"])
    begun = done
    for end in reports:
        if end <= done:
            continue
        run = reconstruct(
            pixel_gradient,
            x,
            loop,
            generator=generator,
            span=range(done, end),
            optimiser_state=optimiser_state,
        )
        if run.stopped is not None:
            raise FloatingPointError(run.reason)
        x, done, optimiser_state = run.x, end, run.optimiser_state
        figures = {
            "mse": image_error(x, problem),
            "gradient_loss": run.losses.gradient,
            "iterations": done,
            "begun_at": begun,
        }
        now = {"x": x.cpu(), "done": done, "optimiser": optimiser_state}
        report(figures, now | {"generator": generator.get_state()})


def _start(problem: Problem, seed: int) -> Tensor:
    target = problem.target
    return initial_images(seed, target.batch_size, target.image_shape, target.gradient[0].dtype)
