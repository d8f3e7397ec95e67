"""Finds which positions a pooling's values come from."""

import time

from torch import Tensor, fx

from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.convolution import Geometry
from inversion.layerwise.kinds import (
    ADDITIONS,
    BATCHNORMS,
    RELUS,
    StoppedError,
    geometry_of,
    is_maximum,
)
from inversion.layerwise.layer import Layer
from inversion.layerwise.network import Network
from inversion.layerwise.operations import spread
from inversion.layerwise.shift.routing import routing_masks
from models.graph import operation_name, place


def find_route(network: Network, node: fx.Node) -> Layer | None:
    """Find which positions a pooling's signal goes to; None where that is known already.

    The shift method finds them from the gradient of the 3×3 convolution before the ReLU before the
    pooling: the signal at its output is known but for a factor 0 or 1.
    """
    (source,) = network.inputs(node)
    if bool((network.known(source)[0] > 0).all()):
        return None
    start = time.perf_counter()
    relu = network.original(source)
    if operation_name(relu) not in RELUS:
        raise StoppedError(f"{place(node)}: which of its inputs count is not known")
    if is_maximum(node):
        routed = spread(network, node, source, network.signal(node))
    else:
        routed = network.signal(source)
    name, scale = _convolution_before(network, relu)
    height, width = routed.shape[2:]
    try:
        found = routing_masks(
            network.gradient[f"{name}.weight"], routed * per_channel(scale), height, width
        )
    except ValueError as error:
        raise StoppedError(f"{place(node)}: its positions cannot be told apart: {error}") from error
    masks = found.masks.to(routed)
    network.masks[relu.name] = masks
    if is_maximum(node):
        network.routes[node] = masks
    allowed = network.accuracy[f"{name}.weight"].certified
    rank = masks.numel() - int(found.undecided.sum())
    return Layer(
        name=relu.name, place=name, used_by=(name,), kind="masks", unknowns=masks.numel(),
        equations=network.gradient[f"{name}.weight"].numel(), rank=rank,
        condition=1 / max(found.gap[0], 1e-300), residual=found.residual, expected_error=None,
        flips=0, certified=rank == masks.numel() and found.residual <= allowed,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def _convolution_before(network: Network, relu: fx.Node) -> tuple[str, Tensor]:
    """Return the 3×3 convolution whose outputs a ReLU takes, and by what they are multiplied."""
    paths: list[tuple[fx.Node, Tensor | None]] = [(network.inputs(relu)[0], None)]
    while paths:
        node, scale = paths.pop()
        name = operation_name(node)
        if name in ADDITIONS:
            paths += [(source, scale) for source in network.inputs(node)]
        elif name in BATCHNORMS:
            layer = network.batchnorm(node)
            if layer.coupled:
                raise StoppedError(
                    f"{place(relu)}: in train mode the masks of maps with several positions "
                    "are not found"
                )
            paths.append((network.inputs(node)[0], layer.scale))
        elif name == "conv2d":
            geometry = geometry_of(network.module(node), str(node.target))
            if geometry == Geometry((3, 3), (1, 1), (1, 1)):
                channels = network.module(node).weight.shape[0]
                ones = network.module(node).weight.new_ones(channels)
                return str(node.target), ones if scale is None else scale
    raise StoppedError(f"{place(relu)}: no 3×3 convolution of stride 1 stands before it")
