"""Says per operation how an attacker walks back through it: OPERATIONS.

A rule says how ∂L/∂output becomes ∂L/∂input, and what a known output says about the input.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.kinds import (
    ADDITIONS,
    AVERAGES,
    BATCHNORMS,
    COPIES,
    MAXIMA,
    RELUS,
    WEIGHTED,
    StoppedError,
    geometry_of,
    is_maximum,
    pair,
)
from inversion.layerwise.masks import CLEAR
from inversion.layerwise.network import Known, Network, Operation
from models.graph import operation_name, place


def _same(network: Network, node: fx.Node, source: fx.Node) -> Tensor:
    return network.signal(node).reshape(network.shape(source))


def _same_known(network: Network, node: fx.Node, source: fx.Node) -> Known:
    mask, value = network.known(node)
    return mask.reshape(network.shape(source)), value.reshape(network.shape(source))


def _nothing(network: Network, node: fx.Node, source: fx.Node) -> None:
    return None


def _weighted_backward(network: Network, node: fx.Node, source: fx.Node) -> Tensor:
    module, d = network.module(node), network.signal(node)
    if isinstance(module, nn.Linear):
        return d @ module.weight
    geometry = geometry_of(module, str(node.target))
    return geometry.backward(d, module.weight, network.shape(source))


def _batchnorm_backward(network: Network, node: fx.Node, source: fx.Node) -> Tensor:
    layer = network.batchnorm(node)
    z = network.value(source) if layer.coupled else None
    if layer.coupled and z is None:
        raise StoppedError(f"{place(node)}: its backward pass needs its input, which is not known")
    return layer.signal(network.signal(node), z)


def _batchnorm_invert(network: Network, node: fx.Node, source: fx.Node) -> Known:
    mask, value = network.known(node)
    layer = network.affine(node)  # a channel that it scales by 0 says nothing
    return mask * per_channel(layer.scale != 0), layer.input_of(value)


def _relu_backward(network: Network, node: fx.Node, source: fx.Node) -> Tensor:
    return network.signal(node) * network.mask(node)


def _relu_invert(network: Network, node: fx.Node, source: fx.Node) -> Known:
    mask, value = network.known(node)
    threshold = 0.0
    if node.name in network.raw:  # near it the value may be a zero's, or a mask be wrong
        threshold = CLEAR * network.raw[node.name][1]
    return mask * (value > threshold), value


def _monotone(
    derivative: Callable[[Tensor, float], Tensor], inverse: Callable[[Tensor, float], Tensor]
) -> Operation:
    """Make the operation of an activation that loses nothing.

    Both are functions of its output and of the slope of its negative part, where it has one.
    """

    def backward(network: Network, node: fx.Node, source: fx.Node) -> Tensor:
        value = network.whole(node)
        if value is None:
            raise StoppedError(
                f"{place(node)}: its derivative needs its output, which is not known"
            )
        return network.signal(node) * derivative(value, _slope(network, node))

    def invert(network: Network, node: fx.Node, source: fx.Node) -> Known:
        known, value = network.known(node)
        found = inverse(value, _slope(network, node))
        fine = torch.isfinite(found)
        return known * fine, torch.where(fine, found, torch.zeros_like(found))

    return Operation(backward, invert)


def _slope(network: Network, node: fx.Node) -> float:
    """Return the slope of a leaky ReLU's negative part, 0 for other activations."""
    if node.op == "call_module":
        return getattr(network.module(node), "negative_slope", 0.0)
    return float(node.kwargs.get("negative_slope", [*node.args, 0.01][1]))


def _add_backward(network: Network, node: fx.Node, source: fx.Node) -> Tensor:
    shapes = {network.shape(other) for other in [node, *network.inputs(node)]}
    if len(shapes) > 1 or node.kwargs or list(node.args).count(source) > 1:
        raise StoppedError(f"{place(node)}: adds other than two tensors of one shape")
    return network.signal(node)


def _add_invert(network: Network, node: fx.Node, source: fx.Node) -> Known | None:
    others = [other for other in network.inputs(node) if other is not source]
    if len(others) != 1:
        return None
    other = network.value(others[0])
    if other is None:
        return None
    mask, value = network.known(node)
    return mask, value - other


def _pool_backward(network: Network, node: fx.Node, source: fx.Node) -> Tensor:
    """Spread the signal of an average evenly; send that of a maximum where it came from."""
    signal = network.signal(node)
    if is_maximum(node):
        if node in network.routes:
            return spread(network, node, source, signal) * network.routes[node]
        value = network.value(source)
        if value is None:
            raise StoppedError(f"{place(node)}: where its maxima lie is not known")
    else:
        value = network.empty(source)
    _, pull = torch.func.vjp(lambda t: network.evaluate(node, [t]), value)
    return pull(signal)[0]


def _pool_invert(network: Network, node: fx.Node, source: fx.Node) -> Known | None:
    """Undo a pooling that loses nothing: windows of one number, or one number for all windows."""
    before, after = network.shape(source), network.shape(node)
    if len(after) < 4:
        after = torch.Size([*after, *[1] * (4 - len(after))])
    mask, value = network.known(node)
    mask, value = mask.reshape(after), value.reshape(after)
    if network.copies(node):
        return mask, value
    if node in network.routes:
        routes = network.routes[node]
        return routes, spread(network, node, source, value) * routes
    if math.prod(before[2:]) == 1 and operation_name(node).startswith("adaptive"):
        return mask.amin((2, 3), keepdim=True), value.mean((2, 3), keepdim=True)
    return None


def spread(network: Network, node: fx.Node, source: fx.Node, t: Tensor) -> Tensor:
    """Give every position of a pooling's input the number of its window, t (B, C, h, w).

    Raises StoppedError where windows overlap or leave positions out.
    """
    height, width = network.shape(source)[2:]
    rows, columns = t.shape[2:]
    whole = height % rows == 0 and width % columns == 0
    if is_maximum(node) and operation_name(node) != "adaptivemaxpool2d":
        window = (height // rows, width // columns)
        whole = whole and pooling_sides(network, node) == (window, window, (0, 0))
    if not whole:
        raise StoppedError(
            f"{place(node)}: its windows overlap, so where its values come from is not known"
        )
    return t.repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3)


def pooling_sides(network: Network, node: fx.Node) -> tuple[tuple[int, int], ...] | None:
    """Return kernel, stride and padding of a max-pooling; None for an unusual one."""
    pool = network.module(node) if node.op == "call_module" else None
    if not isinstance(pool, nn.MaxPool2d) or pool.ceil_mode or pool.dilation not in (1, (1, 1)):
        return None
    return pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)


#: Name of an operation (`operation_name`) → how to walk back through it.
OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(WEIGHTED, Operation(_weighted_backward, _nothing)),
    **dict.fromkeys(BATCHNORMS, Operation(_batchnorm_backward, _batchnorm_invert)),
    **dict.fromkeys(RELUS, Operation(_relu_backward, _relu_invert)),
    **dict.fromkeys(ADDITIONS, Operation(_add_backward, _add_invert)),
    **dict.fromkeys(MAXIMA | AVERAGES, Operation(_pool_backward, _pool_invert)),
    **dict.fromkeys(COPIES, Operation(_same, _same_known)),
    "sigmoid": _monotone(lambda y, _: y * (1 - y), lambda y, _: torch.logit(y)),
    "tanh": _monotone(lambda y, _: 1 - y.square(), lambda y, _: torch.atanh(y)),
    "leakyrelu": _monotone(
        lambda y, slope: torch.where(y > 0, torch.ones_like(y), slope),
        lambda y, slope: torch.where(y > 0, y, y / slope),
    ),
}
