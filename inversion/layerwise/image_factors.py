"""Finds the factor of every image that a convolution's own gradient leaves open."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.kinds import BATCHNORMS, RELUS, StoppedError, geometry_of
from inversion.layerwise.least_squares import least_norm
from inversion.layerwise.network import Network
from inversion.layerwise.solve import solve_tensor
from models.graph import operation_name, place


def scale_by_means(network: Network, node: fx.Node, inputs: Tensor) -> Tensor:
    """Return the factors (B, 1, 1, 1) with which the outputs have the batch's means."""
    users = network.users(node)
    if len(users) != 1 or operation_name(users[0]) not in BATCHNORMS:
        raise StoppedError(f"{place(node)}: no BatchNorm says the means of its outputs")
    module = network.module(node)
    z = F.conv2d(inputs, module.weight, padding=1).mean((2, 3)) / len(inputs)
    mean = network.affine(users[0]).mean
    if module.bias is not None:
        mean = mean - module.bias
    return least_norm(z.mT, mean[:, None]).view(-1, 1, 1, 1)


def weighted_before(network: Network, source: fx.Node) -> fx.Node | None:
    """Return the convolution that a tensor is made by, with a BatchNorm and a ReLU at most."""
    node = source
    while operation_name(node) in RELUS | BATCHNORMS:
        (node,) = network.inputs(node)
    return node if operation_name(node) == "conv2d" and len(network.users(node)) == 1 else None


def solve_lower(network: Network, below: fx.Node, lower: fx.Node, *, coupled: bool) -> Tensor:
    """Solve the convolution before for its input (B, I, H, W).

    In eval mode by its gradient alone, since its outputs are known only up to the images' factors.
    """
    use = network.use(below)
    network.check_memory([use], lower)
    if not coupled:
        use = replace(use, known=torch.zeros_like(use.known))
    empty = network.empty(lower)
    near = {use.relu: network.raw[use.relu]} if use.relu in network.raw else {}
    solved = solve_tensor(
        [use], list(empty.shape), (empty, empty), rectified=network.rectified(lower), near=near
    )
    if use.relu in solved.masks:
        source = next(node for node in network.nodes if node.name == use.relu)
        network.values[source] = network.values[source] * solved.masks[use.relu]
    return solved.value


def affine_before(network: Network, below: fx.Node) -> tuple[Tensor, Tensor]:
    """Return scale and shift (O,) between a convolution's w∗u and the ReLU of its output."""
    (behind,) = network.users(below)
    return network.affine_behind(below, behind if operation_name(behind) in BATCHNORMS else None)


def scale_by_shift(
    network: Network, below: fx.Node, source: fx.Node, value: Tensor, affine: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the factors a (B, 1, 1, 1) with a x = scale · w∗(a u) + shift wherever x > 0.

    x: the source's values, u: value; both up to the factors. affine: scale and shift (O,).
    """
    geometry, (scale, shift) = geometry_of(network.module(below), str(below.target)), affine
    z = geometry.forward(value, network.module(below).weight) * per_channel(scale)
    x = network.values[source]
    on = (x > 0).to(x)
    left, right = ((x - z) * on).flatten(1), (per_channel(shift) * on).flatten(1)
    return ((left * right).sum(1) / left.square().sum(1)).view(-1, 1, 1, 1)
