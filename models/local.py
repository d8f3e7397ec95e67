"""A client's local steps: plain SGD from the weights it was sent, and the update they make."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.gradient import ClientLoss, batch_gradient, trainable_parameters


@dataclass(frozen=True)
class LocalSteps:
    """Says how a client stepped from the weights it was sent to those that it sent back."""

    #: Number of steps T, ≥ 1.
    steps: int
    #: Step size of plain SGD, > 0.
    lr: float
    #: Images per step; None for the whole batch.
    batch: int | None = None
    #: Passes over the batch that the steps make up; None where only the steps were counted.
    epochs: int | None = None

    def parts(self, batch_size: int) -> Iterator[slice]:
        """Yield the mini-batch of every step, as a slice of the batch.

        The batch is cut into ceil(B / b) consecutive mini-batches, of which the last may be
        smaller; the steps take them in turn, and begin anew after the last.
        """
        size = batch_size if self.batch is None else min(self.batch, batch_size)
        count = math.ceil(batch_size / size)
        for step in range(self.steps):
            place = step % count
            yield slice(place * size, min((place + 1) * size, batch_size))


@contextmanager
def replaced_parameters(model: nn.Module, values: Mapping[str, Tensor]):
    """Within this context parameters of the model are these tensors, which may be on a graph.

    values: name of a parameter → tensor of its shape that requires a gradient. Modules and modes
    are left alone, so that `batch_gradient` takes the gradient by these tensors.
    """
    places = []
    for name in values:
        path, _, leaf = name.rpartition(".")
        places.append((model.get_submodule(path)._parameters, leaf, name))
    own = [registered[leaf] for registered, leaf, _ in places]
    try:
        for registered, leaf, name in places:
            registered[leaf] = values[name]
        yield
    finally:
        for (registered, leaf, _), parameter in zip(places, own, strict=True):
            registered[leaf] = parameter


def local_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: ClientLoss,
    local: LocalSteps,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Compute the mean of the gradients along the local steps, (w₀ − w_T) / (lr · T).

    x: (B, C, H, W) normalised images, y: (B,), in the order of the mini-batches (`parts`). Every
    step takes `batch_gradient` of its mini-batch at the weights of the step before:
    w_{t+1} = w_t − lr · g_t. Returns one tensor per trainable parameter, in the model's order. The
    model's weights and buffers are left as they were. create_graph: keep the graph of all steps,
    so that the result can be differentiated by `x`.
    """
    start = trainable_parameters(model)
    weights: dict[str, Tensor] = dict(start)
    total: tuple[Tensor, ...] | None = None
    for step, part in enumerate(local.parts(len(x))):
        with replaced_parameters(model, weights):
            gradient = batch_gradient(model, x[part], y[part], loss, create_graph=create_graph)
        total = gradient if total is None else tuple(map(torch.add, total, gradient))
        if step + 1 == local.steps:
            break
        with torch.set_grad_enabled(create_graph):
            pairs = zip(weights.items(), gradient, strict=True)
            weights = {name: w - local.lr * g for (name, w), g in pairs}
        if not create_graph:
            weights = {name: w.requires_grad_() for name, w in weights.items()}
    assert total is not None  # there is one step at least
    return total if local.steps == 1 else tuple(g / local.steps for g in total)
