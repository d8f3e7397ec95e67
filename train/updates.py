"""An update of a real client, the weights before and after its local steps, made a gradient of.

train/update_files.py reads the files. What a step of the client's optimiser
did to the gradient is undone here where that is exact, and refused where it is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import checking
from models.build import load_weights, misfits, some, without_wrapper
from models.comparing import float64_norm
from models.gradient import Update
from models.local import LocalSteps
from models.pretrained import with_own_names
from train.buffers import batch_statistics_from
from train.local import local_steps
from train.update_settings import LocalSettings, check_optimiser
from utils.errors import InputError, one_line

#: Ends of the names of BatchNorm's buffers.
COUNTER, RUNNING = "num_batches_tracked", ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class ImportedUpdate:
    """Holds the gradient that an update amounts to, and what is known of it."""

    #: The (mean) gradient of what was trained, and BatchNorm's batch statistics where they follow.
    update: Update
    #: Names of the parameters that were trained, in the model's order.
    trainable: tuple[str, ...]
    #: How the client stepped; None for one step, whose gradient is exact.
    local: LocalSteps | None
    #: Rounding error of the gradient relative to its norm: that of the weights over the step size.
    resolution: float
    #: What to tell the reader, a line each.
    remarks: tuple[str, ...]


def gradient_from_update(
    model: nn.Module,
    before: Mapping | Sequence,
    after: Mapping | Sequence,
    how: LocalSettings,
    *,
    batch_size: int,
    image_shape: tuple[int, int, int],
    train_mode: bool = True,
    difference: bool = False,
    bn_momentum: float = 0.1,
) -> ImportedUpdate:
    """Make the gradient g = (w_before − w_after) / (lr · T) of a client's update.

    model: the network. It is left with the weights `before`, and its parameters require a gradient
    where they were trained. before, after: tensors or arrays, by name or in the order of the
    model's state dict (`named_tensors`); `after` may hold fewer, which are then what was sent.
    how: the client's optimiser. One step from a fresh state is undone exactly: with momentum the
    first step is the gradient's, with Nesterov's (1 + μ) times it, and weight decay λ is taken off,
    g = (w₀ − w₁) / lr − λ w₀. Several steps are taken of plain SGD alone.
    batch_size, image_shape: B and (C, H, W) of the client's images. difference: whether `after`
    holds after minus before. bn_momentum: of BatchNorm's running statistics, 0 for a cumulative
    average (train/buffers.py).

    Parameters whose entries are all unchanged were not trained and are left out.

    Raises InputError for tensors that are not the network's, for an optimiser that cannot be
    undone, and where nothing was trained.
    """
    check_optimiser(how)
    state = named_tensors(before, model, "BEFORE")
    _set_weights(model, state, train_mode)
    start = {without_wrapper(k): v.detach().clone() for k, v in model.state_dict().items()}
    sent = named_tensors(after, model, "AFTER")
    _check_fits(sent, start)
    end = {
        name: start[name] + value.to(start[name].dtype) if difference else value
        for name, value in sent.items()
    }
    changes = {name: _change(start[name], sent[name], difference) for name in sent}
    _check_counters(changes, how.steps)
    parameters = {without_wrapper(name): p for name, p in model.named_parameters()}
    trainable = tuple(name for name in parameters if name in changes and changes[name].any())
    if not trainable:
        raise InputError("AFTER: no parameter differs from BEFORE: nothing was trained")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    gradient = tuple(_undone(start[name], changes[name], how) for name in trainable)
    statistics, remark = batch_statistics_from(
        model, start, end, how.steps, bn_momentum, batch_size, image_shape, train_mode=train_mode,
    )  # fmt: skip
    resolution = _resolution(gradient, [end[name] for name in trainable], how)
    remarks = [*_left_out(parameters, sent, trainable), remark]
    local = local_steps(how)
    means, variances = statistics or (None, None)
    kind = gradient_type(start[name] for name in trainable)
    update = Update(tuple(g.to(kind) for g in gradient), means, variances)
    return ImportedUpdate(update, trainable, local, resolution, tuple(filter(None, remarks)))


def gradient_type(weights) -> torch.dtype:
    """Return the type of a gradient of these weights: theirs, float32 at least."""
    kind = torch.float32
    for value in weights:
        kind = torch.promote_types(kind, value.dtype)
    return kind


def named_tensors(values: Mapping | Sequence, model: nn.Module, what: str) -> dict[str, Tensor]:
    """Give tensors or arrays the names of the model's state dict.

    values: by name, with or without what wrappers prepend; or a list in the order of the state
    dict, with all entries, without BatchNorm's counters (num_batches_tracked), or with the
    parameters alone. what: their name in a message.

    Raises InputError where they are no tensors of numbers, or a list is of another length.
    """
    own = [without_wrapper(name) for name in model.state_dict()]
    if isinstance(values, Mapping):
        named = {without_wrapper(str(name)): value for name, value in values.items()}
        if not named:
            raise InputError(f"{what}: holds no tensors")
        named, _ = with_own_names(named, own)
    else:
        orders = (
            own,
            [name for name in own if not name.endswith(COUNTER)],
            [without_wrapper(name) for name, _ in model.named_parameters()],
        )
        names = next((order for order in orders if len(order) == len(values)), None)
        if names is None:
            lengths = ", ".join(str(n) for n in sorted({len(order) for order in orders}))
            raise InputError(
                f"{what}: a list of {len(values)} arrays for a network of {lengths} (whole state "
                "dict, or parameters alone); give the arrays by name"
            )
        named = dict(zip(names, values, strict=True))
    return {name: _tensor(value, f"{what}: {some([name])}") for name, value in named.items()}


def _tensor(value, what: str) -> Tensor:
    """Return a finite tensor on the CPU; raise InputError, naming `what`, for anything else."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
        checking.check_tensor(tensor, what, checking.ANY, attached=True)
        if tensor.is_floating_point():
            checking.check_finite(tensor, what)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        text = one_line(error)
        raise InputError(text if text.startswith(what) else f"{what}: {text}"[:200]) from error
    return tensor.detach()


def _set_weights(model: nn.Module, state: dict[str, Tensor], train_mode: bool) -> None:
    """Load BEFORE; what BatchNorm does not use in train mode may be missing of it."""
    own = {without_wrapper(name): value for name, value in model.state_dict().items()}
    ends = RUNNING if train_mode else (COUNTER,)
    problems = misfits(state, own, [name for name in own if name.endswith(ends)])
    if problems:
        raise InputError(f"BEFORE: does not fit the network: {problems}")
    model.to(gradient_type(value for value in state.values() if value.is_floating_point()))
    values = model.state_dict()
    load_weights(model, {k: state.get(without_wrapper(k), value) for k, value in values.items()})


def _check_fits(sent: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    problems = misfits(sent, own, list(own))
    if problems:
        raise InputError(f"AFTER: does not fit the network: {problems}")


def _change(start: Tensor, sent: Tensor, difference: bool) -> Tensor:
    """Return after − before in float64."""
    return sent.double() if difference else sent.double() - start.double()


def _check_counters(changes: Mapping[str, Tensor], steps: int) -> None:
    """Refuse a number of steps that BatchNorm's counters contradict."""
    for name, change in changes.items():
        counted = int(change) if name.endswith(COUNTER) and change.numel() == 1 else 0
        if counted not in (0, steps):
            raise InputError(
                f"AFTER: {name} counts {counted} forward passes in train mode, not {steps}; give "
                f"--local-steps {counted}"
            )


def _undone(start: Tensor, change: Tensor, how: LocalSettings) -> Tensor:
    """Return the (mean) gradient in float64 of a parameter that changed so."""
    step = -change / (how.lr * how.steps)
    if how.optimiser == "nesterov":
        assert how.momentum is not None  # check_optimiser has asked
        step = step / (1 + how.momentum)
    return step - how.weight_decay * start.double()


def _resolution(gradient: Sequence[Tensor], ends: Sequence[Tensor], how: LocalSettings) -> float:
    """Estimate the rounding error of the gradient, relative to its norm.

    A weight w_after is rounded to eps · |w|, which the division by lr · T magnifies.
    """
    rounded = sum((torch.finfo(w.dtype).eps * w.double()).square().sum().item() for w in ends)
    size = float64_norm(gradient)
    least = torch.finfo(gradient_type(ends)).eps
    if not size:
        return 1.0
    return min(1.0, max(least, rounded**0.5 / (how.lr * how.steps * size)))


def _left_out(parameters, sent, trainable) -> list[str]:
    """Name the parameters that were not sent, and those that were not trained."""
    missing = [name for name in parameters if name not in sent]
    frozen = [name for name in parameters if name in sent and name not in trainable]
    lines = []
    if missing:
        lines.append(f"not sent: {some(missing)}; the attack goes by the other tensors")
    if frozen:
        lines.append(f"not trained (unchanged): {some(frozen)}; left out")
    return lines
