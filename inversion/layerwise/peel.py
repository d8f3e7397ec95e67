"""Solves a network layer by layer, from the head to the image, as far as its gradient allows."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from inversion.layerwise.accuracy import MOST_ERROR
from inversion.layerwise.anchor import anchored, candidates
from inversion.layerwise.certify import in_order, solve_head, solve_node, start_at
from inversion.layerwise.kinds import AVERAGES, MAXIMA, RELUS, WEIGHTED, StoppedError
from inversion.layerwise.layer import Layer
from inversion.layerwise.network import Network
from inversion.layerwise.peeled import SIGNALS, Peeled
from inversion.layerwise.routes import find_route
from inversion.layerwise.saved import plain_walk, walk_from
from inversion.saved import CPU, moved
from models.graph import operation_name, place
from utils.journal import FORGETFUL, Journal

#: Kinds of certificates at which the walk started anew, which see nothing of the tensor behind.
STARTS = ("forward", "shifts")
#: Why a walk ended that was told to.
INTERRUPTED = "interrupted"


def peel(
    network: Network,
    y: Tensor,
    *,
    label_smoothing: float = 0.0,
    clipped: bool = False,
    on_layer: Callable[[Layer], bool] = lambda layer: False,
    journal: Journal = FORGETFUL,
    on_recalled: Callable[[Layer], None] = lambda layer: None,
) -> Peeled:
    """Recover the network's tensors from the head to the image, until one is not certified.

    Then the next convolution towards the image that can be attacked directly is, and the walk goes
    on from there (`inversion.layerwise.anchor`).

    network: freshly traced. y: (B,) labels, or (B, K) of a binary cross-entropy. clipped: the
    client scaled gradients down by unknown factors. With either no convolution is attacked
    directly: that reads class labels from the gradient, and needs its scale. on_layer: called with
    every certificate; true ends the walk there. journal: where the walk is saved behind every
    tensor, as "walk", and from where a killed one goes on; on_recalled is called with each of its
    certificates then. Nothing is raised for what cannot be solved: `stopped` says it.

    Raises StateError where what the journal recalls does not fit the network.
    """
    y = y.to(next(network.twin.parameters()).device)
    follow = partial(_follow, on_layer=on_layer, journal=journal)
    saved = journal.recall("walk")
    if saved is None:
        peeled = Peeled(network, reached=len(network.nodes))
        follow(peeled, _from_head(peeled, y, label_smoothing, clipped=clipped))
    else:
        peeled = walk_from(saved, network)
        for layer in peeled.layers:
            on_recalled(layer)
        if not peeled.stopped and not peeled.ended:
            follow(peeled, _onwards(peeled))
    while peeled.stopped not in ("", INTERRUPTED) and not (peeled.ended or clipped or y.dim() > 1):
        if not _find_anchor(peeled, y, label_smoothing):
            break
        follow(peeled, _onwards(peeled))
    if not peeled.ended:
        withdraw_unsupported(peeled)
        if not peeled.stopped.startswith(INTERRUPTED):
            peeled.ended = True
            _note(peeled, journal)
    return peeled


def _follow(
    peeled: Peeled, layers: Iterator[Layer], on_layer: Callable[[Layer], bool], journal: Journal
) -> None:
    """Walk, and write down every tensor's certificate and why the walk ended."""
    try:
        for layer in layers:
            peeled.layers.append(layer)
            if not layer.certified:
                peeled.stopped = _reason(layer)
            _note(peeled, journal)
            if on_layer(layer):
                journal.save()  # before images are made of what there is
                peeled.stopped = INTERRUPTED
            if peeled.stopped:
                return
    except StoppedError as reason:
        peeled.stopped = str(reason)
    except torch.linalg.LinAlgError as error:  # such as numbers that overflow
        peeled.stopped = f"a system cannot be solved: {' '.join(str(error).split())[:160]}"
    _note(peeled, journal)


def _note(peeled: Peeled, journal: Journal) -> None:
    """Let the journal have the walk as it is now, and save it where that is due."""
    walk = plain_walk(peeled)  # as it is now; tensors are replaced, never changed
    journal.note("walk", lambda: moved(walk, CPU))
    if journal.due():
        journal.save()


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
    layer = solve_head(network, output, y, label_smoothing, clipped=clipped)
    peeled.todo = len(network.nodes) - 1
    yield layer
    yield from _onwards(peeled)


def _find_anchor(peeled: Peeled, y: Tensor, label_smoothing: float) -> bool:
    """Turn to the next convolution that can be attacked directly; false where there is none.

    What was certified stays, all else is forgotten.
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
        peeled.pending = start_at(peeled.network, anchor, time.perf_counter() - start)
        peeled.reached = peeled.todo = network.nodes.index(anchor.joint)  # the next lies before
        peeled.stopped = ""
        return True
    return False


def _onwards(peeled: Peeled) -> Iterator[Layer]:
    """Yield the certificates that are pending, then that of every tensor that is yet to be solved.

    When it yields, `peeled` says all that it takes to go on from there.
    """
    while peeled.pending:
        yield peeled.pending.pop(0)
    network = peeled.network
    for number in reversed(range(peeled.todo)):
        node, peeled.reached = network.nodes[number], number
        if any(operation_name(user) in WEIGHTED for user in network.users(node)):
            if network.value(node) is None:
                layer = solve_node(network, node)
                peeled.todo = number + 1  # its signal and its positions are yet to come
                yield layer
            if node.op != "placeholder":
                network.settle(node)
        elif operation_name(node) in RELUS:
            network.settle(node)
        if operation_name(node) in MAXIMA | AVERAGES and node.op != "placeholder":
            found = find_route(network, node)
            if found is not None:
                peeled.todo = number
                yield found


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
