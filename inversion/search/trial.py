"""One trial of a hyper-parameter search: the attack on a simulated client, scored by its images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from inversion.objective import Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import PIXEL_GRADIENTS
from inversion.restarts import initial_images, noise_generator
from inversion.settings import PRIORS, Loop, Weights
from models.target import GroundTruth, Target
from utils.matching import assign
from utils.metrics import mse


@dataclass(frozen=True)
class Problem:
    """The attack that trials run: a simulated client with the truth, and all that is not searched.

    y: (B,) labels that the attack goes by. loop.steps: iterations that the rate schedule is made
    for. bn_source and the like as in `Objective`. device: where trials compute.
    """

    model: nn.Module
    target: Target
    truth: GroundTruth
    y: Tensor
    weights: Weights
    loop: Loop
    pixel_gradient: str = "exact"
    distance: str = "sim"
    bn_source: str = "running"
    bn_grad: str = "exact"
    seed: int = 0
    device: str = "cpu"

    def with_settings(self, settings: Mapping[str, float]) -> tuple[Weights, Loop]:
        """Weights and loop of a trial with the searched parameters at these values."""
        priors = {name: value for name, value in settings.items() if name in PRIORS}
        weights = replace(
            self.weights,
            gradient=settings.get("grads_weight", self.weights.gradient),
            priors={**self.weights.priors, **priors},
        )
        loop = replace(
            self.loop,
            lr=settings.get("lr", self.loop.lr),
            steps=int(settings.get("epochs", self.loop.steps)),
            keep_best=False,
        )
        return weights, loop


def image_error(x: Tensor, problem: Problem) -> float:
    """Mean squared error of normalised images against the truth, in [0, 1] colours, paired by the
    best assignment."""
    mean, std = problem.target.mean, problem.target.std
    found, true = ((v.cpu() * std + mean).clamp(0, 1) for v in (x, problem.truth.x))
    return mse(found[assign(found, true)], true).mean().item()


def run_trial(
    settings: Mapping[str, float],
    problem: Problem,
    reports: Sequence[int],
    report: Callable[[dict, dict], None],
    state: dict | None = None,
) -> None:
    """Run the attack with `settings`, from `state` on, and report after the given iterations.

    report(figures, state): figures are floats, `state` is what a later call goes on from.

    Raises FloatingPointError when a loss is not finite.
    """
    torch.backends.cudnn.allow_tf32 = False  # as in the attack (utils.cli.choose_device)
    device = torch.device(problem.device)
    weights, loop = problem.with_settings(settings)
    target = problem.target
    objective = Objective(
        problem.model.to(device),
        target,
        problem.y,
        weights,
        distance=problem.distance,
        bn_source=problem.bn_source,
        bn_grad=problem.bn_grad,
    )
    generator = noise_generator(problem.seed, device)
    dtype = target.gradient[0].dtype
    x = initial_images(problem.seed, target.batch_size, target.image_shape, dtype).to(device)
    done, optimiser_state = 0, None
    if state is not None:
        x, done, optimiser_state = state["x"].to(device), state["done"], state["optimiser"]
        generator.set_state(state["generator"])
    begun = done
    for end in reports:
        if end <= done:
            continue
        run = reconstruct(
            partial(PIXEL_GRADIENTS[problem.pixel_gradient], objective),
            x,
            loop,
            generator=generator,
            span=range(done, end),
            optimiser_state=optimiser_state,
        )
        if run.stopped is not None:
            raise FloatingPointError(f"a loss was not finite after {done + run.steps} iterations")
        x, done, optimiser_state = run.x, end, run.optimiser_state
        report(
            {
                "mse": image_error(x, problem),
                "gradient_loss": run.losses.gradient,
                "iterations": done,
                "begun_at": begun,
            },
            {
                "x": x.cpu(),
                "done": done,
                "optimiser": optimiser_state,
                "generator": generator.get_state(),
            },
        )
