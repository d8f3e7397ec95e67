"""Saves how far the making of images has come, and goes on from there.

What is read comes from a file: its types and shapes are compared with what is at work.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor

from inversion.saved import CPU, moved
from utils.journal import Journal, reading

#: What an optimiser remembers that has as many numbers as the images; all else is single numbers.
VECTORS = frozenset({"exp_avg", "exp_avg_sq", "d", "prev_flat_grad", "old_dirs", "old_stps"})
#: All that Adam and L-BFGS remember.
MEMORIES = (
    {"step", "exp_avg", "exp_avg_sq"},
    {"func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad",
     "prev_loss", "al"},
)  # fmt: skip


def note(journal: Journal, name: str, content: dict) -> None:
    """Let the journal's next save write a copy of `content` as it is now."""
    now = copy.deepcopy(moved(content, CPU))
    journal.note(name, lambda: now)


def keep(journal: Journal, name: str, make: Callable[[], dict], *, stop: bool) -> None:
    """Save make() at once, if a save is due or the run is to stop."""
    if stop or journal.due():
        note(journal, name, make())
        journal.save()


def same_kind(saved: Any, like: Tensor, shape: Size | None = None) -> Tensor:
    """Return a saved tensor on the device of `like`, after checking its type and shape.

    shape: that of `like`, where nobody says. Raises ValueError where they differ.
    """
    right = isinstance(saved, Tensor) and saved.dtype == like.dtype
    if not right or saved.shape != (like.shape if shape is None else shape):
        raise ValueError("of another type or shape")
    return saved.to(like.device)


def memory_of(optimiser: torch.optim.Optimizer) -> dict:
    """Return what an optimiser of one tensor remembers; nothing before its first step."""
    return optimiser.state_dict()["state"].get(0, {})


def restore(optimiser: torch.optim.Optimizer, saved: dict) -> None:
    """Let an optimiser of one tensor remember what `memory_of` another one returned.

    Raises ValueError where that is not what such an optimiser remembers.
    """
    (group,) = optimiser.param_groups
    (parameter,) = group["params"]
    flat = isinstance(optimiser, torch.optim.LBFGS)
    vector = Size([parameter.numel()]) if flat else parameter.shape

    def right(name: str, value: Any) -> bool:
        if isinstance(value, list):
            return all(right(name, entry) for entry in value)
        if isinstance(value, Tensor):
            alike = value.dtype == parameter.dtype
            return alike and value.shape == (vector if name in VECTORS else Size([]))
        return name not in VECTORS and (value is None or type(value) in (int, float))

    if saved and (
        saved.keys() != MEMORIES[flat] or not all(right(*entry) for entry in saved.items())
    ):
        raise ValueError("no memory of such an optimiser")
    state = {0: saved} if saved else {}
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def take_steps(
    optimiser: torch.optim.Optimizer,
    steps: int,
    take: Callable[[int], None],
    should_stop: Callable[[], bool],
    journal: Journal,
    name: str,
) -> bool:
    """Let an optimiser of one tensor take the steps 0, 1, … by `take`; tell whether it took all.

    They are saved on their way as `name`, and begin where the journal says that they were.
    should_stop: asked before every step; true saves and ends them.
    """
    ((parameter,),) = (group["params"] for group in optimiser.param_groups)
    first, saved = 0, journal.recall(name)
    if saved is not None:
        with reading("the matching of activations"), torch.no_grad():
            first = range(steps + 1)[int(saved["step"])]
            parameter.copy_(same_kind(saved["x"], parameter))
            restore(optimiser, saved["optimiser"])

    def now(step: int) -> dict:
        memory = memory_of(optimiser) if step < steps else {}
        return {"step": step, "x": parameter.detach(), "optimiser": memory}

    for step in range(first, steps):
        stop = should_stop()
        keep(journal, name, partial(now, step), stop=stop)
        if stop:
            return False
        take(step)
    note(journal, name, now(steps))
    return True
