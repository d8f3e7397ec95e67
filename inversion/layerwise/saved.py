"""Writes where a walk is as plain values and tensors, and reads it back with checks.

What is read comes from a file: names, types and shapes are compared with the traced network.
"""

from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Size, Tensor, fx

from inversion.layerwise.layer import Layer
from inversion.layerwise.network import Network
from inversion.layerwise.peeled import Peeled
from utils.files import printable
from utils.journal import reading

#: Field of a certificate → the types that it may have in a file.
LAYER_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,), "place": (str,), "used_by": (list,), "kind": (str,), "unknowns": (int,),
    "equations": (int,), "rank": (int,), "condition": (float,), "residual": (float,),
    "expected_error": (float, type(None)), "flips": (int,), "certified": (bool,),
    "seconds": (float,), "rests_on_zeros": (bool,),
}  # fmt: skip
KINDS = ("head", "masks", "convolution", "linear", "shifts", "forward")


def plain_walk(peeled: Peeled) -> dict:
    """Return where a walk is, by the names of the network's nodes; tensors are not copied."""
    network = peeled.network
    by_name = {
        table: {node.name: t for node, t in getattr(network, table).items()}
        for table in ("values", "signals", "routes")
    }
    return {
        **by_name,
        "masks": dict(network.masks),
        "raw": {name: [t, threshold] for name, (t, threshold) in network.raw.items()},
        "noise": {name: of.noise for name, of in network.accuracy.items()},
        "signal_error": network.signal_error,
        "layers": [_plain_layer(layer) for layer in peeled.layers],
        "pending": [_plain_layer(layer) for layer in peeled.pending],
        "stopped": peeled.stopped,
        "detours": list(peeled.detours),
        "labels": peeled.labels,
        "reached": peeled.reached,
        "todo": peeled.todo,
        "ended": peeled.ended,
    }


def walk_from(saved: Any, network: Network) -> Peeled:
    """Return the walk that `plain_walk` wrote, in a network that was traced anew.

    Raises StateError where a name, type or shape is not that of this network.
    """
    with reading("the walk of the layerwise attack"):
        nodes = {node.name: node for node in network.nodes}
        device = network.empty(network.nodes[0]).device

        def tensor(t: Any, shape: Size) -> Tensor:
            _require(isinstance(t, Tensor) and t.dtype == torch.float64 and t.shape == shape)
            return t.to(device)

        def raw(entry: Any, node: fx.Node) -> tuple[Tensor, float]:
            shape = entry[0].shape  # of the tensor that was solved for, maybe a copy of the node
            _require(len(shape) == 4 and shape[0] == network.shape(node)[0])
            _require(shape.numel() == network.shape(node).numel())
            return tensor(entry[0], shape), _number(entry[1])

        def source(node: fx.Node) -> Size:
            return network.shape(network.inputs(node)[0])

        def of(table: str) -> list[tuple[fx.Node, Any]]:
            return [(nodes[name], entry) for name, entry in saved[table].items()]

        _require(saved["noise"].keys() == network.accuracy.keys())
        filled = replace(
            network,
            values={node: tensor(t, network.shape(node)) for node, t in of("values")},
            signals={node: tensor(t, network.shape(node)) for node, t in of("signals")},
            routes={node: tensor(t, source(node)) for node, t in of("routes")},
            masks={node.name: tensor(t, network.shape(node)) for node, t in of("masks")},
            raw={node.name: raw(entry, node) for node, entry in of("raw")},
            accuracy={
                name: replace(accuracy, noise=_number(saved["noise"][name]))
                for name, accuracy in network.accuracy.items()
            },
            signal_error=_number(saved["signal_error"]),
        )
        labels = saved["labels"]
        if labels is not None:
            count, classes = network.shape(network.nodes[-1])
            _require(labels.dtype == torch.int64 and labels.shape == (count,))
            _require(bool(((labels >= 0) & (labels < classes)).all()))
            labels = labels.to(device)
        places = range(len(nodes) + 1)
        _require(saved["reached"] in places and saved["todo"] in places)
        return Peeled(
            filled,
            [_layer(entry, nodes) for entry in saved["layers"]],
            _text(saved["stopped"]),
            [_text(line) for line in saved["detours"]],
            labels,
            int(saved["reached"]),
            int(saved["todo"]),
            [_layer(entry, nodes) for entry in saved["pending"]],
            saved["ended"] is True,
        )


def _plain_layer(layer: Layer) -> dict:
    return asdict(layer) | {"used_by": list(layer.used_by)}


def _layer(saved: Any, nodes: dict[str, fx.Node]) -> Layer:
    """Return a certificate of one of the network's nodes; raise ValueError for anything else."""
    _require(saved.keys() == {field.name for field in fields(Layer)})
    for name, types in LAYER_TYPES.items():
        _require(type(saved[name]) in types)
    _require(saved["name"] in nodes and saved["kind"] in KINDS)
    used_by = tuple(_text(name) for name in saved["used_by"])
    return Layer(**(saved | {"place": _text(saved["place"]), "used_by": used_by}))


def _text(value: Any) -> str:
    _require(type(value) is str and printable(value) == value)
    return value


def _number(value: Any) -> float:
    _require(type(value) is float)
    return value


def _require(right: bool) -> None:
    if not right:
        raise ValueError("of another type, name or shape")
