"""Rank analysis RA-i: counts which layers' inputs a gradient leaves undetermined.

After R-GAP (Zhu & Blaschko, ICLR 2021, arXiv 2010.07733), which solves a network layer by layer
from the output back. With layer i's output known, its input is the unknown of one equation for
every output number (z = w∗x) and one for every weight (∂L/∂w is linear in x); virtual
constraints are what the layers before say about that input, since a layer with more outputs
than inputs can only reach some of them.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torchvision.models import ResNet

from models.choices import RANK_MODES

# What a layer is called as a module, function or method, lower case without underscores.
_WEIGHTED = {"conv2d": "convolution", "linear": "linear"}
_POOLING = {"maxpool2d", "avgpool2d", "adaptiveavgpool2d", "adaptivemaxpool2d", "mean"}
_ADDITION = {"add", "iadd"}
_ARITHMETIC = {"add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "neg"}
_SIGMOIDS = {"sigmoid", "logsigmoid", "hardsigmoid", "tanh", "hardtanh", "softsign"}
_RELUS = {"relu", "relu6", "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "softplus"}
_SWISHES = {"gelu", "silu", "mish", "hardswish"}
_NORMS = {"batchnorm1d", "batchnorm2d", "syncbatchnorm", "groupnorm"}
_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "alphadropout", "stochasticdepth"}
_VIEWS = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze"}
_COPIES = {"identity", "contiguous", "clone"}
_INVERTIBLE = _SIGMOIDS | _RELUS | _SWISHES | _NORMS | _DROPOUTS | _VIEWS | _COPIES | _ARITHMETIC


@dataclass(frozen=True)
class LayerRank:
    """Counts the unknowns and equations of one layer, for the whole batch."""

    #: Module path, or the name in torch.fx of an operation that has none.
    name: str
    #: "convolution", "linear", "pooling" or "residual block".
    kind: str
    #: |x|: numbers of the layer's input, the unknowns.
    inputs: int
    #: |z|: numbers of its output, one equation each.
    outputs: int
    #: |w|: its trained weights, one equation each.
    weights: int
    #: v: virtual constraints, what the layers before say about the input.
    virtual: int

    @property
    def index(self) -> int:
        """Return RA-i = |x| − |w| − |z| − v: above 0, how many input numbers are undetermined."""
        return self.inputs - self.weights - self.outputs - self.virtual


def rank_analysis(
    model: nn.Module, batch_size: int, image_shape: tuple[int, int, int], mode: str = "all"
) -> list[LayerRank]:
    """Compute RA-i of every layer, input side first, for `batch_size` images (C, H, W).

    The network's index is the largest: above 0 some layer's input is not determined; 0 or below,
    counting does not rule out that all are. The first layer has v = 0, and behind each layer
    v grows by max(max(|z| − |x|, 0) − max(|x| − |w| − |z|, 0), 0): by what its outputs are more
    than its inputs, less what of its input stays undetermined.

    What is counted:
    - A convolution or linear layer: |w| is its weight, where that is trained. The gradient of a
      bias does not contain x and constrains nothing.
    - Pooling (max, average, adaptive, a mean): a layer with |w| = 0, since it loses numbers.
    - A residual block, any stretch of parallel paths that meet in additions only: one layer. x is
      the value where the paths part, z their sum, |w| all convolutions and linear layers inside.
      Every value between brings as many unknowns as equations (those that make it from others),
      be it made by a convolution, an activation, a pooling or an inner sum. They cancel, and
      |x| − Σ|w| − |z| remains.
    - BatchNorm, GroupNorm, activations, dropout, arithmetic with a number, changes of shape:
      nothing. They take every number to one number and count as invertible.

    `mode` "original" counts like E2EGI's code, which knows torchvision's ResNets only: the same
    layers, but of a block only `conv2` and the convolution `downsample.0`; of a layer that stands
    alone all trained parameters, the bias of `fc` too.

    `model` may lie on the meta device. It is not touched: a copy on the meta device is traced by
    torch.fx in eval mode, so neither images nor memory are needed.

    Raises ValueError with a one-line reason for a network that cannot be counted so: torch.fx
    cannot trace it, it cannot take such images, paths merge otherwise than by addition
    (concatenation, multiplication), weights are shared between layers or used outside of them,
    or there is an operation not listed above (attention, permutation, chunk, slice,
    transposed convolution, other normalisations); for an unknown `mode`; and for "original" where
    the model is no torchvision ResNet.
    """
    if mode not in RANK_MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose from {', '.join(RANK_MODES)}")
    if mode == "original" and not isinstance(model, ResNet):
        raise ValueError(
            f"mode original counts torchvision's ResNets only, not a {type(model).__name__}; "
            "choose all"
        )
    layers, virtual, seen = [], 0, set()
    for start, nodes in _stretches(_tensor_nodes(model, batch_size, image_shape)):
        kind = _kind(nodes)
        if kind == "invertible":
            continue
        name, parameters = _name(nodes, kind), []
        for node in nodes:
            if _role(node) not in _WEIGHTED.values():
                continue
            module = node.meta["module"]
            if id(module.weight) in seen:  # its gradient is a sum and belongs to no one layer
                raise ValueError(f"{node.target} uses the weights of an earlier layer again")
            seen.add(id(module.weight))
            if mode == "all":
                parameters.append(module.weight)
            elif kind != "residual block":
                parameters += module.parameters()
            elif node.target in (f"{name}.conv2", f"{name}.downsample.0"):
                parameters.append(module.weight)
        weights = sum(p.numel() for p in parameters if p.requires_grad)
        inputs, outputs = start.meta["value"].numel(), nodes[-1].meta["value"].numel()
        layers.append(LayerRank(name, kind, inputs, outputs, weights, virtual))
        # The whole formula: of its two inner maxima never both are above 0.
        virtual += max(outputs - inputs, 0)
    return layers


def _tensor_nodes(model, batch_size, image_shape) -> list[fx.Node]:
    """Return the image and every tensor made from it, in order of execution.

    Their values (meta tensors) stand in meta["value"], their tensor inputs in meta["inputs"] and
    their modules, if any, in meta["module"]. Sizes and checks are left out; every tensor comes
    from the image and leads to the output.
    """
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    try:
        twin = copy.deepcopy(model, memo).eval()  # eval: BatchNorm takes one number a channel
        traced = fx.symbolic_trace(twin)
    except Exception as error:
        raise ValueError(f"torch.fx cannot trace the network: {_first_line(error)}") from error
    dtype = next((p.dtype for p in twin.parameters()), None)
    images = torch.empty(batch_size, *image_shape, dtype=dtype, device="meta")
    with torch.no_grad():
        _Values(traced).run(images)

    *nodes, output = traced.graph.nodes
    tensors = [node for node in nodes if _holds_tensor(node.meta["value"])]
    known = set(tensors)
    for node in tensors:
        node.meta["inputs"] = [source for source in node.all_input_nodes if source in known]
        if node.op == "call_module":
            node.meta["module"] = twin.get_submodule(node.target)
        if node.op == "get_attr":
            raise ValueError(f"{node.target} is used outside of a convolution or linear layer")
        if node.op != "placeholder" and not node.meta["inputs"]:
            raise ValueError(f"{_place(node)} makes a tensor that does not come from the image")
        if known.isdisjoint(node.users) and output not in node.users:
            raise ValueError(f"{_place(node)} computes a value that the output does not use")
    if not isinstance(output.meta["value"], Tensor):
        raise ValueError("the network returns several values instead of one tensor")
    return tensors


class _Values(fx.Interpreter):
    """Runs a traced network and leaves every node's value in its meta["value"]."""

    def __init__(self, traced):
        super().__init__(traced)
        self.extra_traceback = False  # an error keeps its one line

    def run_node(self, n):
        try:
            n.meta["value"] = super().run_node(n)
        except Exception as error:
            raise ValueError(f"{_place(n)} fails: {_first_line(error)}") from error
        return n.meta["value"]


def _stretches(nodes: list[fx.Node]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Cut the network at the tensors that all paths lead through: (the tensor, what follows it).

    What follows, up to and with the next such tensor, is one operation or parallel paths.
    """
    position = {node: i for i, node in enumerate(nodes)}
    cut = reach = 0
    for i, node in enumerate(nodes):
        if i > cut and reach <= i:  # no edge jumps over this node
            yield nodes[cut], nodes[cut + 1 : i + 1]
            cut = i
        reach = max([reach, *(position[user] for user in node.users if user in position)])


def _kind(nodes: list[fx.Node]) -> str:
    """Tell what a stretch counts as; raise ValueError where it cannot be counted."""
    refused = [node for node in nodes if _role(node) is None]
    merging = [node for node in refused if len(node.meta["inputs"]) > 1]
    if merging:
        place = _common_path(nodes) or _place(merging[0])
        raise ValueError(
            f"{place} merges paths by {_operation(merging[0])}; only additions can be counted"
        )
    if refused:
        raise ValueError(f"{_place(refused[0])}: {_operation(refused[0])} cannot be counted")
    if len(nodes) > 1:
        return "residual block"
    kind = _role(nodes[0])
    assert kind is not None  # it would be among the refused ones
    return kind


def _role(node: fx.Node) -> str | None:
    """A kind of LayerRank, "addition" or "invertible"; None for what cannot be counted."""
    operation = _operation(node).replace("_", "").lower()
    if not isinstance(node.meta["value"], Tensor):
        return None
    if len(node.meta["inputs"]) > 1:
        return "addition" if operation in _ADDITION else None
    if node.op == "call_module" and operation in _WEIGHTED:
        return _WEIGHTED[operation]
    if operation in _POOLING:
        return "pooling"
    return "invertible" if operation in _INVERTIBLE else None


def _operation(node: fx.Node) -> str:
    if node.op == "call_module":
        return type(node.meta["module"]).__name__
    return getattr(node.target, "__name__", str(node.target))


def _name(nodes, kind) -> str:
    """A layer's module path, a block's common one; what has none goes by its name in torch.fx."""
    if kind == "residual block":
        return _common_path(nodes) or nodes[-1].name
    return nodes[0].target if nodes[0].op == "call_module" else nodes[0].name


def _common_path(nodes) -> str:
    return ".".join(os.path.commonprefix([_path(node).split(".") for node in nodes]))


def _path(node: fx.Node) -> str:
    """Path of the module that a node is, or whose forward calls it; empty for the network."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def _place(node: fx.Node) -> str:
    return _path(node) or node.name


def _holds_tensor(value) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
