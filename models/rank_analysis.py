"""Rank analysis RA-i: counts which layers' inputs a gradient leaves undetermined.

After R-GAP (Zhu & Blaschko, ICLR 2021, arXiv 2010.07733), which solves a network layer by layer
from the output back. With layer i's output known, its input is the unknown of one equation for
every output number (z = w∗x) and one for every weight (∂L/∂w is linear in x); virtual
constraints are what the layers before say about that input, since a layer with more outputs
than inputs can only reach some of them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from models.choices import RANK_MODES
from models.graph import module_path, operation, operation_name, place, traced_tensors

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
    if mode == "original" and not _is_resnet(model):
        raise ValueError(
            f"mode original counts torchvision's ResNets only, not a {type(model).__name__}; "
            "choose all"
        )
    layers, virtual, seen = [], 0, set()
    for start, nodes in _stretches(traced_tensors(model, batch_size, image_shape)):
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


def _is_resnet(model: nn.Module) -> bool:
    from torchvision.models import ResNet  # with torch's compiler it takes a second

    return isinstance(model, ResNet)


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
        where = _common_path(nodes) or place(merging[0])
        raise ValueError(
            f"{where} merges paths by {operation(merging[0])}; only additions can be counted"
        )
    if refused:
        raise ValueError(f"{place(refused[0])}: {operation(refused[0])} cannot be counted")
    if len(nodes) > 1:
        return "residual block"
    kind = _role(nodes[0])
    assert kind is not None  # it would be among the refused ones
    return kind


def _role(node: fx.Node) -> str | None:
    """A kind of LayerRank, "addition" or "invertible"; None for what cannot be counted."""
    name = operation_name(node)
    if not isinstance(node.meta["value"], Tensor):
        return None
    if len(node.meta["inputs"]) > 1:
        return "addition" if name in _ADDITION else None
    if node.op == "call_module" and name in _WEIGHTED:
        return _WEIGHTED[name]
    if name in _POOLING:
        return "pooling"
    return "invertible" if name in _INVERTIBLE else None


def _name(nodes, kind) -> str:
    """A layer's module path, a block's common one; what has none goes by its name in torch.fx."""
    if kind == "residual block":
        return _common_path(nodes) or nodes[-1].name
    return nodes[0].target if nodes[0].op == "call_module" else nodes[0].name


def _common_path(nodes) -> str:
    return ".".join(os.path.commonprefix([module_path(node).split(".") for node in nodes]))
