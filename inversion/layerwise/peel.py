"""Solves a network layer by layer, from the head to the image, as far as its gradient allows."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from inversion.layerwise.accuracy import MOST_ERROR
from inversion.layerwise.anchor import anchored, candidates
from inversion.layerwise.certify import in_order, solve_head, solve_node, start_at
from inversion.layerwise.kinds import AVERAGES, MAXIMA, RELUS, WEIGHTED, StoppedError
from inversion.layerwise.layer import Layer
from inversion.layerwise.network import Network
from inversion.layerwise.routes import find_route
from models.graph import operation_name, place

#: Kinds of certificates that are about signals, not about a tensor's values.
SIGNALS = ("masks", "shifts")
#: Kinds of certificates at which the walk started anew, which see nothing of the tensor behind.
STARTS = ("forward", "shifts")
#: Why a walk ended that was told to.
INTERRUPTED = "interrupted"


@dataclass
class Peeled:
    """Holds what was recovered, deepest last."""

    network: Network
    layers: list[Layer] = field(default_factory=list)
    #: Why it ended where it did, in one line.
    stopped: str = ""
    #: Why it turned to convolutions that were attacked directly, a line each.
    detours: list[str] = field(default_factory=list)
    #: (B,) labels that such a convolution gave; None without one.
    labels: Tensor | None = None
    #: Place in the network's nodes down to which it came.
    reached: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return what was recovered, by name: values only, in the order of `layers`."""
        by_name = {node.name: node for node in self.network.nodes}
        found = {}
        for layer in self.layers:
            if layer.kind not in SIGNALS and by_name[layer.name] in self.network.values:
                found[layer.name] = self.network.values[by_name[layer.name]]
        return found

    def frontier(self) -> list[fx.Node]:
        """Return the certified tensors that no deeper ones determine, the deepest first."""
        certified = {
            layer.name for layer in self.layers if layer.certified and layer.kind not in SIGNALS
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

    Then the next convolution towards the image that can be attacked directly is, and the walk goes
    on from there (`inversion.layerwise.anchor`).

    y: (B,) labels, or (B, K) of a binary cross-entropy. clipped: the client scaled gradients down
    by unknown factors. With either no convolution is attacked directly: that reads class labels
    from the gradient, and needs its scale. on_layer: called with every certificate; true ends the
    walk there. Nothing is raised for what cannot be solved: `stopped` says it.
    """
    peeled = Peeled(network, reached=len(network.nodes))
    y = y.to(next(network.twin.parameters()).device)
    _follow(peeled, _from_head(peeled, y, label_smoothing, clipped=clipped), on_layer)
    while peeled.stopped not in ("", INTERRUPTED) and not clipped and y.dim() == 1:
        layers = _from_anchor(peeled, y, label_smoothing)
        if layers is None:
            break
        peeled.stopped = ""
        _follow(peeled, layers, on_layer)
    withdraw_unsupported(peeled)
    return peeled


def _follow(peeled: Peeled, layers: Iterator[Layer], on_layer: Callable[[Layer], bool]) -> None:
    """Walk, and write down every tensor's certificate and why the walk ended."""
    try:
        for layer in layers:
            peeled.layers.append(layer)
            if on_layer(layer):
                peeled.stopped = INTERRUPTED
            elif not layer.certified:
                peeled.stopped = _reason(layer)
            if peeled.stopped:
                return
    except StoppedError as reason:
        peeled.stopped = str(reason)
    except torch.linalg.LinAlgError as error:  # such as numbers that overflow
        peeled.stopped = f"a system cannot be solved: {' '.join(str(error).split())[:160]}"


def withdraw_unsupported(peeled: Peeled) -> None:
    """Withdraw the certificate of a tensor that rests on its zeros, if none before bears them out.

    The next tensor's equations contain the mask of this one, so that its certificate does.
    """
    layers = peeled.layers
    for number, layer in enumerate(layers):
        following = layers[number + 1] if number + 1 < len(layers) else None
        borne_out = following is not None and following.certified and following.kind not in STARTS
        if layer.certified and layer.rests_on_zeros and not borne_out:
            layers[number] = replace(layer, certified=False)
            spoilt = f"that spoils {layer.name}, whose zeros nothing bears out"
            peeled.stopped = "; ".join(filter(None, [peeled.stopped, spoilt]))


def _from_head(
    peeled: Peeled, y: Tensor, label_smoothing: float, *, clipped: bool
) -> Iterator[Layer]:
    """Yield the certificates of the head and of all tensors before it."""
    network = peeled.network
    output = network.nodes[-1]
    if operation_name(output) != "linear":
        raise StoppedError(f"{place(output)}: the walk starts at a linear head")
    yield solve_head(network, output, y, label_smoothing, clipped=clipped)
    yield from _walk(peeled, network.nodes[:-1])


def _from_anchor(peeled: Peeled, y: Tensor, label_smoothing: float) -> Iterator[Layer] | None:
    """Return the certificates from the next convolution on that can be attacked directly.

    None where there is none. What was certified stays, all else is forgotten.
    """
    network = peeled.network
    for node in candidates(network, peeled.reached):
        start = time.perf_counter()
        try:
            anchor = anchored(network, node, label_smoothing)
        except (StoppedError, torch.linalg.LinAlgError):
            continue
        peeled.layers = [layer for layer in peeled.layers if layer.certified]
        kept = {layer.name for layer in peeled.layers if layer.kind not in SIGNALS}
        values = {node: t for node, t in network.values.items() if node.name in kept}
        (head,) = network.inputs(network.nodes[-1])  # what is kept goes in the order of these
        anchor = in_order(anchor, y, network.values.get(head) if values else None)
        peeled.network = replace(network, values=values, signals={}, masks={}, raw={}, routes={})
        peeled.labels = anchor.labels
        peeled.detours.append(f"{peeled.stopped}; {node.target} was then attacked directly")
        layers = start_at(peeled.network, anchor, time.perf_counter() - start)
        peeled.reached = network.nodes.index(anchor.joint)  # the next one lies before this one
        return itertools.chain(layers, _walk(peeled, network.nodes[: peeled.reached]))
    return None


def _walk(peeled: Peeled, nodes: Sequence[fx.Node]) -> Iterator[Layer]:
    """Yield the certificate of every tensor among `nodes` that is solved for, the last first."""
    network = peeled.network
    for number, node in reversed([*enumerate(nodes)]):
        peeled.reached = number
        if any(operation_name(user) in WEIGHTED for user in network.users(node)):
            if network.value(node) is None:
                yield solve_node(network, node)
            if node.op != "placeholder":
                network.settle(node)
        elif operation_name(node) in RELUS:
            network.settle(node)
        if operation_name(node) in MAXIMA | AVERAGES and node.op != "placeholder":
            layer = find_route(network, node)
            if layer is not None:
                yield layer


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
