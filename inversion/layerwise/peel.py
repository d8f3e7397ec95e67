"""Solves a network layer by layer, from the head to the image, as far as its gradient allows."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from inversion.layerwise.accuracy import CLEAR_NOISE, LARGEST, MOST_ERROR
from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.convolution import Geometry
from inversion.layerwise.head import head_features
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
)
from inversion.layerwise.masks import rectify
from inversion.layerwise.network import Network
from inversion.layerwise.operations import spread
from inversion.layerwise.shift.routing import routing_masks
from inversion.layerwise.solve import solve_tensor
from models.graph import operation_name, place


@dataclass(frozen=True)
class Layer:
    """Holds the certificate of one tensor: how well the gradient determines it."""

    #: The tensor's name in the traced network.
    name: str
    #: The module that makes it, for people.
    place: str
    #: Convolutions and linear layers whose gradients were solved for it.
    used_by: tuple[str, ...]
    #: What it was recovered from: "head", "masks", "convolution", "linear".
    kind: str
    unknowns: int
    equations: int
    rank: int
    condition: float
    #: Norm of what the recovered tensor leaves of the gradients, relative to theirs.
    residual: float
    #: Relative error of the tensor that follows from that on average, None where nobody knows.
    expected_error: float | None
    #: Mask entries that were turned over on the way.
    flips: int
    certified: bool
    seconds: float
    #: Whether other solutions with fewer zeros exist, so that the certificate needs the next
    #: tensor's, whose equations see these zeros.
    rests_on_zeros: bool = False


@dataclass
class Peeled:
    """Holds what was recovered, deepest last."""

    network: Network
    layers: list[Layer] = field(default_factory=list)
    #: Why it ended where it did, in one line.
    stopped: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """Return what was recovered, by name: values only, in the order of `layers`."""
        by_name = {node.name: node for node in self.network.nodes}
        found = {}
        for layer in self.layers:
            if layer.kind != "masks" and by_name[layer.name] in self.network.values:
                found[layer.name] = self.network.values[by_name[layer.name]]
        return found

    def frontier(self) -> list[fx.Node]:
        """Return the certified tensors that no deeper ones determine, the deepest first."""
        certified = {
            layer.name for layer in self.layers if layer.certified and layer.kind != "masks"
        }
        known: set[fx.Node] = set()
        found = []
        for node in self.network.nodes:
            inputs = self.network.inputs(node)
            follows = bool(inputs) and all(source in known for source in inputs)
            solved = node.name in certified and node in self.network.values
            if solved and not follows:
                found.append(node)
            if solved or follows:
                known.add(node)
        return found


def peel(
    network: Network,
    y: Tensor,
    *,
    label_smoothing: float = 0.0,
    clipped: bool = False,
    on_layer: Callable[[Layer], bool] = lambda layer: False,
) -> Peeled:
    """Recover the network's tensors from the head to the image, until one is not certified.

    y: (B,) labels. clipped: the client scaled gradients down by unknown factors. on_layer: called
    with every certificate; true ends the walk there. Nothing is raised for what cannot be solved:
    `stopped` says it.
    """
    peeled = Peeled(network)
    _peel(peeled, y, label_smoothing, clipped=clipped, on_layer=on_layer)
    _withdraw(peeled)
    return peeled


def _peel(
    peeled: Peeled,
    y: Tensor,
    label_smoothing: float,
    *,
    clipped: bool,
    on_layer: Callable[[Layer], bool],
) -> None:
    """Walk, and write down every tensor's certificate and why the walk ended."""
    network = peeled.network
    try:
        y = y.to(next(network.twin.parameters()).device)
        for layer in _walk(network, y, label_smoothing, clipped=clipped):
            peeled.layers.append(layer)
            if on_layer(layer):
                peeled.stopped = "interrupted"
            elif not layer.certified:
                peeled.stopped = _reason(layer)
            if peeled.stopped:
                return
    except StoppedError as reason:
        peeled.stopped = str(reason)
    except torch.linalg.LinAlgError as error:  # such as numbers that overflow
        peeled.stopped = f"a system cannot be solved: {' '.join(str(error).split())[:160]}"


def _withdraw(peeled: Peeled) -> None:
    """Withdraw the certificate of a tensor that rests on its zeros, if none before bears them out.

    The next tensor's equations contain the mask of this one, so that its certificate does.
    """
    layers = peeled.layers
    for number, layer in enumerate(layers):
        borne_out = number + 1 < len(layers) and layers[number + 1].certified
        if layer.certified and layer.rests_on_zeros and not borne_out:
            layers[number] = replace(layer, certified=False)
            peeled.stopped += f"; that spoils {layer.name}, whose zeros nothing bears out"


def _walk(network: Network, y: Tensor, label_smoothing: float, *, clipped: bool) -> Iterator[Layer]:
    """Yield the certificate of every tensor that is solved for."""
    output = network.nodes[-1]
    if operation_name(output) != "linear":
        raise StoppedError(f"{place(output)}: the walk starts at a linear head")
    yield _solve_head(network, output, y, label_smoothing, clipped=clipped)
    for node in reversed(network.nodes[:-1]):
        if any(operation_name(user) in WEIGHTED for user in network.users(node)):
            if network.value(node) is None:
                yield _solve(network, node)
            if node.op != "placeholder":
                network.settle(node)
        elif operation_name(node) in RELUS:
            network.settle(node)
        if operation_name(node) in MAXIMA | AVERAGES and node.op != "placeholder":
            layer = _route(network, node)
            if layer is not None:
                yield layer


def _solve_head(
    network: Network, output: fx.Node, y: Tensor, label_smoothing: float, *, clipped: bool
) -> Layer:
    start = time.perf_counter()
    module, name = network.module(output), str(output.target)
    if f"{name}.weight" not in network.gradient:
        raise StoppedError(f"{name}: the gradient of its weights was not sent")
    of_weight, of_bias = (network.gradient.get(f"{name}.{part}") for part in ("weight", "bias"))
    assert of_weight is not None
    if not of_weight.any():
        raise StoppedError(f"{name}: the gradient of its weights is zero")
    count, classes = len(y), len(of_weight)
    if of_bias is None and count > classes - 2:
        raise StoppedError(
            f"{name}: without a bias, {count} images of {classes} classes leave several solutions"
        )
    if of_bias is None and clipped:
        raise StoppedError(f"{name}: without a bias, the factors of the clipping stay unknown")
    _allow_for_noise(network, of_weight, count)
    accuracy = network.accuracy[f"{name}.weight"]
    head = head_features(
        module.weight, module.bias, of_weight, y, label_smoothing, bias_gradient=of_bias,
        clipped=clipped, tolerance=accuracy.certified, error=accuracy.error,
    )  # fmt: skip
    (source,) = network.inputs(output)
    features, threshold = head.features, 0.0
    if network.rectified(source):
        kept = rectify(features)
        features, threshold = kept.value, kept.threshold
    network.take(source, head.features[..., None, None], features, threshold)
    network.signals[output] = head.signal
    network.signal_error = head.signal_error
    certified = head.rank == count and head.residual <= accuracy.certified
    return Layer(
        name=source.name, place=name, used_by=(name,), kind="head", unknowns=features.numel(),
        equations=of_weight.numel(), rank=head.rank * features.shape[1], condition=head.condition,
        residual=head.residual, expected_error=head.expected_error, flips=0,
        certified=certified and head.expected_error <= MOST_ERROR,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def _allow_for_noise(network: Network, gradient: Tensor, count: int) -> None:
    """Take for noise what the head's gradient (K, d) has beyond a rank of B = count.

    Without noise its rank is at most B, whatever the features, so a wrong fixed point leaves
    nothing there. K classes are K equations per feature, of which B directions fit anything.
    """
    classes = len(gradient)
    values = torch.linalg.svdvals(gradient)
    left = (values[count:].norm() / values.norm()).item()
    noise = left * math.sqrt(classes / max(1, classes - count))
    if noise > LARGEST:
        return
    for parameter, of in network.accuracy.items():
        if noise > CLEAR_NOISE * of.rounding:
            network.accuracy[parameter] = replace(of, noise=max(of.noise, noise))


def _solve(network: Network, node: fx.Node) -> Layer:
    """Solve for one tensor and take over what was found, masks behind it included."""
    start = time.perf_counter()
    uses = network.uses(node)
    shape = [*network.shape(node), 1, 1][:4]
    known, value = network.known(node)
    near = {use.relu: network.raw[use.relu] for use in uses if use.relu and use.relu in network.raw}
    solved = solve_tensor(
        uses,
        shape,
        (known.reshape(shape), value.reshape(shape)),
        rectified=network.rectified(node),
        near=near,
    )
    expected_error = math.hypot(solved.expected_error, network.signal_error)
    certified = solved.certified and expected_error <= MOST_ERROR
    if certified:  # before the tensor is taken over, from which values behind it would follow
        for relu, mask in solved.masks.items():
            network.correct(relu, mask)
    network.take(node, solved.raw, solved.value, solved.threshold)
    kind = "linear" if len(network.shape(node)) == 2 else "convolution"
    return Layer(
        name=node.name, place=place(node), used_by=tuple(use.name for use in uses), kind=kind,
        unknowns=solved.unknowns, equations=solved.equations, rank=solved.rank,
        condition=solved.condition, residual=solved.residual,
        expected_error=expected_error, flips=solved.flips, certified=certified,
        seconds=time.perf_counter() - start, rests_on_zeros=solved.rests_on_zeros,
    )  # fmt: skip


def _reason(layer: Layer) -> str:
    """Say why a layer is not certified."""
    if layer.rank < layer.unknowns:
        return (
            f"{layer.name}: {layer.equations} equations determine {layer.rank} of its "
            f"{layer.unknowns} numbers"
        )
    if layer.expected_error is not None and layer.expected_error > MOST_ERROR:
        return f"{layer.name}: an error of {layer.expected_error:.0%} is to be expected"
    return (
        f"{layer.name}: it leaves {layer.residual:.1e} of the gradient, more than rounding and "
        "noise can"
    )


# Where a pooling's values come from ----------------------------------------------------------


def _route(network: Network, node: fx.Node) -> Layer | None:
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
