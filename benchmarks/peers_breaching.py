"""Runs the attacker of breaching 0.1.2 (github.com/JonasGeiping/breaching) on the attack at hand.

breaching is no requirement of this project. It goes into a folder of its own, with the packages
that it needs beside those of the project, and Python is told of the folder:

    pip install --no-deps --target FOLDER breaching==0.1.2 hydra-core==1.3.8 omegaconf==2.4.0 \\
        antlr4-python3-runtime==4.9.3
    PYTHONPATH=FOLDER python -m benchmarks.peers

What runs is its `OptimizationBasedAttacker` with its configuration "invertinggradients": its
objective `CosineSimilarity`, its regulariser `TotalVariation`, its loop. Three settings are made
equal to this project's: the step size falls along a cosine, as its "cosine-decay" does, but to
min(1e-3, lr) instead of 0; TV is weighted so that a difference of neighbours counts the same (its
mean is over all pixels, this project's over all differences); and the starts are given. One thing
stays other: its TV also counts how far the last row and the last column are from 0. "breaching-tv"
is the same attacker with the TV of all others, to tell what this does to the images.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers_loops import Attack, Mark, Method, total_variation

#: The version whose code the adaptation was written for.
VERSION = "0.1.2"
NOTE = "its TV also counts how far the last row and column are from 0"


def missing() -> str | None:
    """Return in words why breaching cannot be run; None if it can."""
    if importlib.util.find_spec("breaching") is None:
        return (
            f"breaching is not installed; benchmarks/peers_breaching.py says how (pip, {VERSION})"
        )
    found = importlib.metadata.version("breaching")
    if found != VERSION:
        return f"breaching {found} is installed, not {VERSION}, for which the benchmark was written"
    try:
        with _quiet():
            import breaching  # noqa: F401
    except ImportError as error:
        return f"breaching is installed, but does not import: {error}"
    return None


@contextlib.contextmanager
def _quiet():
    """Keep from the reader what breaching and its packages print and warn of while they load."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _configuration(attack: Attack) -> Any:
    """Return breaching's own configuration with this benchmark's settings."""
    import breaching

    height, width = attack.shape[1:]
    if height != width:
        raise ValueError("one weight of TV makes both directions equal only in square images")
    with _quiet():
        settings = breaching.get_attack_config("invertinggradients")
    settings.optim.step_size = attack.lr
    settings.optim.step_size_decay = "cosine-decay"
    settings.optim.boxed = attack.boxed
    settings.regularization.total_variation.scale = attack.tv * width / (width - 1)
    settings.impl.dtype = str(attack.dtype).removeprefix("torch.")
    return settings


class _EqualTV(nn.Module):
    """Stands in for breaching's regulariser: the TV of all other methods."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def initialize(self, *_) -> None:
        """Do nothing; breaching calls it before a run."""

    def forward(self, x: Tensor, *_) -> Tensor:
        """Return the weighted TV of the candidate."""
        return self.weight * total_variation(x)


def breaching_method(attack: Attack, *, equal_tv: bool = False) -> Method:
    """Make breaching's attacker ready. equal_tv: with the TV of all others in place of its own."""
    with _quiet():
        import breaching
    objective = attack.objective()
    model, train_mode = objective.model, objective.loss.train_mode
    mean, std = attack.normalisation
    settings = _configuration(attack)
    images = SimpleNamespace(
        shape=attack.shape, mean=mean.flatten().tolist(), std=std.flatten().tolist(),
        modality="vision",
    )  # fmt: skip
    buffers = None if train_mode else list(model.buffers())  # without them it trains
    payload = [{"parameters": list(model.parameters()), "buffers": buffers, "metadata": images}]
    sent = {"num_data_points": len(objective.y), "labels": objective.y, "local_hyperparams": None}
    shared = [{"gradients": objective.target_gradient, "buffers": None, "metadata": sent}]
    setup = {"device": objective.y.device, "dtype": attack.dtype}
    with _quiet():
        attacker: Any = breaching.attacks.prepare_attack(
            model, torch.nn.CrossEntropyLoss(), settings, setup
        )
        models, labels, stats = attacker.prepare_attack(payload, shared)
    if equal_tv:
        attacker.regularizers = [_EqualTV(attack.tv)]
    own_optimiser, own_objective = attacker._init_optimizer, attacker._compute_objective

    def init_optimiser(candidate):
        optimiser, scheduler = own_optimiser(candidate)
        scheduler.eta_min = attack.loop(1).rate(1)
        return optimiser, scheduler

    attacker._init_optimizer = init_optimiser

    def run(start: Tensor, steps: int, mark: Mark) -> Tensor:
        last: list[Tensor] = []

        def compute_objective(candidate, *rest):
            last[:] = [candidate]
            mark()
            return own_objective(candidate, *rest)

        attacker._compute_objective = compute_objective
        attacker.cfg.optim.max_iterations = steps
        attacker._run_trial(models, shared, labels, stats, 0, attack.boxed_start(start))
        return last[0].detach()

    def derivative(x: Tensor) -> tuple[Tensor, Tensor]:
        for regulariser in attacker.regularizers:
            regulariser.initialize(models, shared, labels)
        attacker.objective.initialize(attacker.loss_fn, attacker.cfg.impl, None)
        attacker.cfg.optim.signed = None
        candidate = x.detach().clone().requires_grad_()
        optimiser, _ = attacker._init_optimizer([candidate])
        loss = own_objective(candidate, labels, models, optimiser, shared, 0)()
        attacker.cfg.optim.signed = "hard"
        assert candidate.grad is not None
        return loss.detach().squeeze(), candidate.grad

    def border(x: Tensor) -> Tensor:
        """Return what its TV counts of the last row and column, as it is weighted."""
        pixels, scale = x.numel(), settings.regularization.total_variation.scale
        return scale * (x[..., -1, :].abs().sum() + x[..., :, -1].abs().sum()) / pixels

    if equal_tv:
        return Method(models[0], objective, run, derivative, "its TV is replaced by the others'")
    return Method(models[0], objective, run, derivative, NOTE, border)
