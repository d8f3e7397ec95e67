"""Writes what a run must keep as plain values and tensors, and reads it back with checks.

What is read comes from a file: names, types and shapes are compared with the run that goes on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inversion.combine import Combination
from inversion.objective import Losses
from inversion.optimise import Moment, Reconstruction
from utils.journal import reading
from utils.tensor_files import map_tensors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class SavedSeed:
    """Holds how far a seed had come: within a span of iterations, or at a span's end."""

    #: The span, as (start, stop).
    span: tuple[int, int]
    #: Iterations of the spans before.
    steps: int
    #: Where the loop was; None once the span has ended.
    moment: Moment | None
    #: The run at the span's end, with the steps of all spans; None before.
    run: Reconstruction | None
    #: State of the surrogate's place at the moment; None without one.
    place: dict | None = None
    #: State of the generator of the Langevin noise at the span's end; None before.
    noise: Tensor | None = None


def _plain_losses(losses: Losses[float]) -> dict:
    terms = dict(losses.terms)
    return {
        "total": losses.total, "gradient": losses.gradient, "terms": terms, "alpha": losses.alpha,
    }  # fmt: skip


def _losses(saved: dict) -> Losses[float]:
    terms = {str(name): float(value) for name, value in saved["terms"].items()}
    gradient, alpha = (
        None if saved[name] is None else float(saved[name]) for name in ("gradient", "alpha")
    )
    return Losses(float(saved["total"]), gradient, terms, alpha)


def _images(saved: Any, like: Tensor) -> Tensor:
    """Return saved images after checking that they are of the shape and type of `like`."""
    if not isinstance(saved, Tensor) or saved.shape != like.shape or saved.dtype != like.dtype:
        raise ValueError("images of another shape or type")
    return saved


def plain_seed(seed: SavedSeed) -> dict:
    """Return a seed as plain values and tensors on the CPU."""
    run, moment = seed.run, seed.moment
    return {
        "span": list(seed.span),
        "steps": seed.steps,
        "place": moved(seed.place, CPU),
        "noise": seed.noise,
        "moment": moment and {
            "step": moment.step, "x": moment.x.cpu(), "best_x": moment.best_x.cpu(),
            "best": _plain_losses(moment.best), "noise": moment.noise,
            "optimiser_state": moved(moment.optimiser_state, CPU),
        },
        "run": run and {
            "x": run.x.cpu(), "losses": _plain_losses(run.losses), "steps": run.steps,
            "stopped": run.stopped, "reason": run.reason,
            "optimiser_state": moved(run.optimiser_state, CPU),
        },
    }  # fmt: skip


def seed_from(saved: Any, start: Tensor, steps: int, what: str) -> SavedSeed:
    """Read a seed back.

    start: (B, C, H, W), as the seed's start. steps: iterations of the whole loop. Raises StateError
    where it does not fit.
    """
    with reading(what):
        first, last = (int(n) for n in saved["span"])
        if not 0 <= first <= last <= steps:
            raise ValueError("a span outside the loop")
        moment, run = saved["moment"], saved["run"]
        if moment is not None:
            if not first <= moment["step"] <= last:
                raise ValueError("a moment outside its span")
            _check_state(moment["optimiser_state"], start)
            moment = Moment(
                int(moment["step"]), _images(moment["x"], start), _images(moment["best_x"], start),
                _losses(moment["best"]), dict(moment["optimiser_state"]), moment["noise"],
            )  # fmt: skip
        if run is not None:
            if run["optimiser_state"] is not None:
                _check_state(run["optimiser_state"], start)
            run = Reconstruction(
                _images(run["x"], start), _losses(run["losses"]), int(run["steps"]),
                None if run["stopped"] is None else str(run["stopped"]), run["optimiser_state"],
                None if run["reason"] is None else str(run["reason"]),
            )  # fmt: skip
        if (moment is None) == (run is None):
            raise ValueError("neither a moment nor an end")
        return SavedSeed(
            (first, last), int(saved["steps"]), moment, run, saved["place"], saved["noise"]
        )


def _check_state(state: Any, start: Tensor) -> None:
    """Raise for an optimiser's state of which a tensor is neither a number nor one per pixel."""

    def check(tensor: Tensor) -> None:
        if tensor.numel() not in (1, start.numel()):
            raise ValueError("a tensor of another size")
        if tensor.dim() == start.dim() and tensor.shape != start.shape:
            raise ValueError("a tensor of another shape")

    map_tensors(check, state["optimiser"])


def plain_combination(found: Combination) -> dict:
    """Return a combination as plain values, without its images."""
    return {
        "choice": list(found.choice), "loss": found.loss, "seed_losses": list(found.seed_losses),
        "image_gradients": found.image_gradients,
    }  # fmt: skip


def combination_from(saved: Any, x: Any, starts: Sequence[Tensor], what: str) -> Combination:
    """Read a combination back, with its images `x`; starts: of all seeds. Raises StateError."""
    with reading(what):
        choice = tuple(int(seed) for seed in saved["choice"])
        losses = tuple(float(loss) for loss in saved["seed_losses"])
        if len(choice) != len(starts[0]) or len(losses) != len(starts):
            raise ValueError("of another number of images or seeds")
        if not all(0 <= seed < len(starts) for seed in choice) or math.isinf(saved["loss"]):
            raise ValueError("of seeds that there are not")
        return Combination(
            _images(x, starts[0]).to(starts[0].device), choice, float(saved["loss"]), losses,
            int(saved["image_gradients"]),
        )  # fmt: skip


def moved(value: Any, device: torch.device) -> Any:
    """Return a state, nested in dicts and lists, with all its tensors on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), value)
