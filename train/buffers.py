"""Batch statistics of BatchNorm out of its running statistics before and after one step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.batchnorm import BATCHNORM_TYPES
from models.build import without_wrapper
from models.gradient import gradient_mode
from utils.errors import InputError

#: A variance below 0 by more than this share of the running one is no rounding.
ROUNDING = 1e-4
Statistics = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def batch_statistics_from(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    steps: int,
    momentum: float,
    batch_size: int,
    image_shape: tuple[int, int, int],
    *,
    train_mode: bool,
) -> tuple[Statistics | None, str]:
    """Undo the update of every BatchNorm layer's running statistics by one forward pass.

    torch sets r₁ = (1 − m) r₀ + m s, with the batch's mean for s, and its variance by n − 1 of the
    n = B · H · W values per channel. So s = (r₁ − (1 − m) r₀) / m, and the biased variance is
    (n − 1) / n times s. momentum: m, or 0 for the cumulative average, whose m is 1 / (number of
    passes). before, after: the state dicts; train_mode: whether BatchNorm used its batch.

    Returns means and biased variances in the order of `batchnorm_layers`, None where they do not
    follow, and a line that says what was found.

    Raises InputError where a variance comes out below 0: the momentum is another.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BATCHNORM_TYPES)}
    names = [without_wrapper(f"{name}.running_") for name in layers]
    if not layers:
        return None, ""
    if not train_mode:
        return None, "BatchNorm in eval mode: no batch statistics"
    if any(f"{name}{kind}" not in after for name in names for kind in ("mean", "var")):
        return None, "batch statistics: the running statistics were not sent"
    if steps > 1:
        return None, f"batch statistics: those of {steps} local steps are mixed, none is known"
    if all(torch.equal(before[f"{n}mean"], after[f"{n}mean"]) for n in names):
        return None, "batch statistics: the running statistics are unchanged, none is known"
    counts = values_per_channel(model, layers, batch_size, image_shape)
    means, variances = [], []
    for name, n in zip(names, counts, strict=True):
        m = momentum or 1 / (int(before.get(f"{name[:-8]}num_batches_tracked", 0)) + 1)
        mean, var = (
            (after[f"{name}{kind}"].double() - (1 - m) * before[f"{name}{kind}"].double()) / m
            for kind in ("mean", "var")
        )
        var = var * (n - 1) / n
        if (var < -ROUNDING * before[f"{name}var"].double().abs() / m).any():
            raise InputError(
                f"AFTER: the batch variance at {name[:-9]} would be below 0: BatchNorm's momentum "
                f"is not {m:g}; give --bn-momentum"
            )
        kind = before[f"{name}mean"].dtype
        means.append(mean.to(kind))
        variances.append(var.clamp(min=0).to(kind))
    found = f"batch statistics of {len(layers)} BatchNorm layers from their running ones"
    return (tuple(means), tuple(variances)), found


def values_per_channel(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch_size: int,
    image_shape: tuple[int, int, int],
) -> list[int]:
    """Return n = B · H · W of every BatchNorm layer's input, by a forward pass of blank images."""
    found: dict[nn.Module, int] = {}

    def note(layer: nn.Module, args: tuple) -> None:
        found[layer] = batch_size * math.prod(args[0].shape[2:])

    handles = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        like = next(model.parameters())
        with gradient_mode(model, False), torch.no_grad():
            model(torch.zeros(1, *image_shape, dtype=like.dtype, device=like.device))
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(layer, batch_size) for layer in layers.values()]
