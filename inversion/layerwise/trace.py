"""Traces the attacked network for the walk."""

import copy
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.least_squares import memory_of_system
from inversion.layerwise.network import MAX_MEMORY, Network
from inversion.layerwise.operations import OPERATIONS
from models.batchnorm import batchnorm_layers, set_statistics
from models.graph import operation_name, traced_tensors


def network_of(
    model: nn.Module,
    batch_size: int,
    image_shape: tuple[int, int, int],
    gradient: Mapping[str, Tensor],
    *,
    train_mode: bool,
    statistics: Sequence[tuple[Tensor, Tensor]] | None,
    accuracy: Mapping[str, Accuracy],
    max_memory: int = MAX_MEMORY,
    partial: Collection[str] = (),
) -> Network:
    """Trace a network for an attack on its gradient.

    gradient, accuracy: by the parameters' names. statistics: (mean, biased variance) of the batch
    at every BatchNorm layer, in the model's order; needed in train mode. max_memory: bytes that a
    dense system may take. partial: parameters of whose gradients only a part was sent; they are not
    among those given.

    Raises ValueError, in one line, where torch.fx cannot trace the network or where the attack
    lacks the batch statistics.
    """
    nodes = traced_tensors(model, batch_size, image_shape)
    for node in nodes:
        node.meta["tensor_users"] = [user for user in nodes if node in user.meta["inputs"]]
    twin = copy.deepcopy(model).double().eval()
    layers = batchnorm_layers(twin)
    if train_mode and layers:
        if statistics is None:
            raise ValueError(
                "in train mode the walk needs the batch's BatchNorm statistics, which the client "
                "did not send"
            )
        for layer, (mean, var) in zip(layers, statistics, strict=True):
            set_statistics(layer, mean.double(), var.double())
    if any(layer.running_mean is None for layer in layers):
        raise ValueError("a BatchNorm layer keeps no running statistics")
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return Network(
        nodes=nodes,
        twin=twin,
        gradient={name: g.double() for name, g in gradient.items()},
        train_mode=train_mode and bool(layers),
        accuracy=dict(accuracy),
        operations=OPERATIONS,
        max_memory=max_memory,
        partial=frozenset(partial),
    )


def largest_system(
    model: nn.Module, batch_size: int, image_shape: tuple[int, int, int]
) -> tuple[int, int, str]:
    """Return equations, unknowns and layer of the largest dense system that the walk may meet.

    Of a convolution: B·H·W numbers per input channel and O·k² equations for them.

    Raises ValueError, in one line, where torch.fx cannot trace the network.
    """
    found = []
    for node in traced_tensors(model, batch_size, image_shape):
        if operation_name(node) == "conv2d":
            kernel = node.meta["module"].weight[:, 0].numel()
            columns = node.meta["inputs"][0].meta["value"][:, 0].numel()
            found.append((kernel, columns, str(node.target)))
    return max(found, key=lambda system: memory_of_system(*system[:2]), default=(0, 0, "none"))
