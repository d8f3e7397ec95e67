"""Follows the way from a convolution to where all before it reaches the loss."""

import itertools

from torch import Tensor, fx

from inversion.layerwise.kinds import ADDITIONS, BATCHNORMS, RELUS, StoppedError, geometry_of
from inversion.layerwise.masks import fitted_signals
from inversion.layerwise.network import Network
from models.graph import operation_name, place


def way_out(network: Network, node: fx.Node) -> list[fx.Node]:
    """Return the way from a convolution to the tensor through which all before it reaches the loss.

    Behind a convolution in a residual block that is the sum at the block's end. Raises StoppedError
    where the way holds other layers than convolutions, BatchNorm and ReLUs, or where the last of
    them before the sum is a ReLU: the signal at the sum is lost there where it is off.
    """
    bypassed, way = _bypassed(network, node), [node]
    while True:
        users = network.users(way[-1])
        if len(users) != 1:
            raise StoppedError(f"{place(way[-1])}: goes to several layers")
        name = operation_name(users[0])
        if name not in BATCHNORMS and not bypassed:
            return way
        masked = name in ADDITIONS and operation_name(way[-1]) in RELUS
        if masked or name not in {"conv2d"} | BATCHNORMS | RELUS | ADDITIONS:
            raise StoppedError(f"{place(users[0])}: the way past it is not known")
        way.append(users[0])
        if name in ADDITIONS:
            return way


def climb(network: Network, way: list[fx.Node]) -> Tensor:
    """Return the signal at the end of the way from a convolution whose signal is known.

    Convolutions on the way have known inputs, so that their gradients give their signals.
    """
    signal, values = network.signals[way[0]], network.following()
    for node, behind in itertools.pairwise(way):
        if operation_name(behind) in BATCHNORMS:
            signal = network.batchnorm(behind).output_signal(signal, values[node])
        elif operation_name(behind) == "conv2d":
            signal = _fitted(network, behind, values[node])
    return signal


def _bypassed(network: Network, node: fx.Node) -> bool:
    """Tell whether tensors before a node reach the output past it, too."""
    before, todo = set(), [node]
    while todo:
        earlier = todo.pop()
        if earlier not in before:
            before.add(earlier)
            todo += network.inputs(earlier)
    return any(user not in before for earlier in before - {node} for user in network.users(earlier))


def _fitted(network: Network, node: fx.Node, value: Tensor) -> Tensor:
    """Return the signal (B, O, h, w) at a convolution's output from its input and gradient."""
    if f"{node.target}.weight" not in network.gradient:
        whole = network.whole_or_not(f"{node.target}.weight")
        raise StoppedError(f"{node.target}: the gradient of its weights was {whole}")
    geometry = geometry_of(network.module(node), str(node.target))
    count, channels, height, width = network.shape(node)
    gradient = network.gradient[f"{node.target}.weight"]
    if count * height * width > gradient[0].numel():
        raise StoppedError(f"{node.target}: has more positions than weights per channel")
    signal = fitted_signals(gradient, value, geometry)
    return signal.reshape(channels, count, height, width).transpose(0, 1)
