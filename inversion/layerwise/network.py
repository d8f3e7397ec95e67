"""What is known of every tensor of a network while its gradient is solved layer by layer.

The network is the graph that torch.fx traces. OPERATIONS says per operation what an attacker who
walks back through it needs: how a value goes forward, how ∂L/∂output becomes ∂L/∂input, and what a
known output says about the input.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.batchnorm import BatchNorm, Use, per_channel
from inversion.layerwise.convolution import Geometry
from models.batchnorm import BATCHNORM_TYPES
from models.graph import operation, operation_name, place, traced_tensors

#: What a ReLU's output is where its mask was repaired to "on" and its value had been taken for 0.
TINY = 1e-12
#: Times a ReLU's threshold from which its output counts as known.
CLEAR = 8.0
#: (0/1 of the tensor's shape, values that count where it is 1).
Known = tuple[Tensor, Tensor]


class StoppedError(Exception):
    """Says in one line why a layer cannot be solved."""


@dataclass
class Network:
    """Holds the network, what the client sent, and what has been recovered so far.

    Everything is float64. A client's batch statistics take the place of running ones, so that the
    forward pass is that of the client in train mode too.
    """

    #: In order of execution, the image first.
    nodes: list[fx.Node]
    #: A copy of the network, in eval mode.
    twin: nn.Module
    #: Name of a parameter → its gradient.
    gradient: Mapping[str, Tensor]
    #: Whether BatchNorm normalised by the batch's statistics.
    train_mode: bool
    #: How exact each parameter's gradient is.
    accuracy: dict[str, Accuracy]
    #: What has been recovered.
    values: dict[fx.Node, Tensor] = field(default_factory=dict)
    #: Name of a ReLU → 0/1 where it is on, where that says more than its value.
    masks: dict[str, Tensor] = field(default_factory=dict)
    #: Name of a ReLU → its output (B, C, h, w) as it was solved for, and the threshold of its mask.
    raw: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    #: Pooling → 0/1 of its input's shape where a window's value comes from.
    routes: dict[fx.Node, Tensor] = field(default_factory=dict)
    #: Derivatives of the loss that no later step changes.
    signals: dict[fx.Node, Tensor] = field(default_factory=dict)

    def shape(self, node: fx.Node) -> torch.Size:
        """Return the shape of a tensor, batch first."""
        return node.meta["value"].shape

    def module(self, node: fx.Node) -> Any:
        """Return the module of a node, with its weights."""
        return self.twin.get_submodule(str(node.target))

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that a node takes."""
        return node.meta["inputs"]

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that take a tensor."""
        return node.meta["tensor_users"]

    def operation(self, node: fx.Node) -> "Operation":
        """Return how to walk back through a node; raise StoppedError where nobody knows."""
        name = operation_name(node)
        if name not in OPERATIONS:
            raise StoppedError(f"{place(node)}: {operation(node)} cannot be inverted")
        return OPERATIONS[name]

    def evaluate(self, node: fx.Node, inputs: Sequence[Tensor]) -> Tensor:
        """Apply a node to its input tensors, without changing them."""
        given = dict(zip(self.inputs(node), [t.clone() for t in inputs], strict=True))

        def argument(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return given[value] if value in given else value.meta["value"]
            return value

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), argument)
        if node.op == "call_module":
            return self.module(node)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def value(self, node: fx.Node) -> Tensor | None:
        """Return a tensor's value if it was recovered or follows from what was."""
        if node in self.values:
            return self.values[node]
        inputs = [self.value(source) for source in self.inputs(node)]
        if not inputs or any(value is None for value in inputs):
            return None
        with torch.no_grad():
            return self.evaluate(node, [value for value in inputs if value is not None])

    def known(self, node: fx.Node) -> Known:
        """Return which entries of a tensor are known, from its value or from what it became."""
        value = self.value(node)
        if value is not None:
            return torch.ones_like(value), value
        zeros = self.empty(node)
        mask, value = zeros, zeros
        for user in self.users(node):
            if operation_name(user) not in OPERATIONS:
                continue
            found = OPERATIONS[operation_name(user)].invert(self, user, node)
            if found is not None:
                value = torch.where(found[0] > 0, found[1], value)
                mask = torch.maximum(mask, found[0])
        return mask, value

    def empty(self, node: fx.Node) -> Tensor:
        """Return zeros of a tensor's shape."""
        parameter = next(self.twin.parameters())
        return torch.zeros(self.shape(node), dtype=torch.float64, device=parameter.device)

    def signal(self, node: fx.Node) -> Tensor:
        """Return ∂L/∂tensor, (B, …); raise StoppedError where a step on the way is not known."""
        if node in self.signals:
            return self.signals[node]
        return torch.stack(
            [self.operation(user).backward(self, user, node) for user in self.users(node)]
        ).sum(0)

    def settle(self, node: fx.Node) -> Tensor:
        """Return ∂L/∂tensor and keep it."""
        self.signals[node] = self.signal(node)
        return self.signals[node]

    def affine(self, node: fx.Node) -> BatchNorm:
        """Return the BatchNorm layer of a node as the affine map that it is going forward."""
        layer = self.module(node)
        ones = torch.ones_like(layer.running_mean)
        weight = ones if layer.weight is None else layer.weight.detach()
        bias = 0 * ones if layer.bias is None else layer.bias.detach()
        return BatchNorm(weight, bias, layer.running_mean, layer.running_var, layer.eps)

    def batchnorm(self, node: fx.Node) -> BatchNorm:
        """Return the BatchNorm layer of a node; raise StoppedError where it cannot be inverted."""
        layer = self.affine(node)
        if not self.train_mode:
            return layer
        of_weight = self.gradient.get(f"{node.target}.weight")
        of_bias = self.gradient.get(f"{node.target}.bias")
        if of_weight is None or of_bias is None:
            raise StoppedError(f"{place(node)}: the gradient of its scale and shift was not sent")
        return replace(layer, weight_gradient=of_weight, bias_gradient=of_bias)

    def uses(self, node: fx.Node) -> list[Use]:
        """Return what the convolutions and linear layers that take a tensor say about it."""
        return [self._use(user) for user in self.users(node) if operation_name(user) in WEIGHTED]

    def _use(self, node: fx.Node) -> Use:
        module, name = self.module(node), str(node.target)
        if f"{name}.weight" not in self.gradient:
            raise StoppedError(f"{name}: the gradient of its weights was not sent")
        if not self.gradient[f"{name}.weight"].any():
            raise StoppedError(f"{name}: the gradient of its weights is zero")
        if len(self.shape(node)) not in (2, 4):
            raise StoppedError(f"{name}: takes tensors of {len(self.shape(node))} dimensions")
        geometry = geometry_of(module, name)
        four = lambda t: t if t.dim() == 4 else t[:, :, None, None]  # noqa: E731
        behind, batchnorm = node, None
        users = self.users(node)
        if len(users) == 1 and operation_name(users[0]) in BATCHNORMS:
            behind, batchnorm = users[0], self.batchnorm(users[0])
        relu = self.relu_behind(behind)
        if relu is None:
            arriving = self.signal(behind)
            mask = torch.ones_like(arriving)
        else:
            arriving, mask = self.signal(relu), self.mask(relu)
        known, output = self.known(node)
        if module.bias is not None:
            output = output - module.bias.detach().view(1, -1, *[1] * (output.dim() - 2))
        return Use(
            name,
            geometry,
            four(module.weight.detach()),
            four(self.gradient[f"{name}.weight"]),
            four(arriving),
            four(mask),
            batchnorm,
            self.accuracy[f"{name}.weight"],
            four(known),
            four(output),
            module.weight.new_ones(module.weight.shape[0]),
            None if relu is None else relu.name,
        )

    def original(self, node: fx.Node) -> fx.Node:
        """Return the tensor that a tensor is a copy of: itself where it is none.

        A pooling whose windows hold one number each copies, too.
        """
        while node.op != "placeholder":
            name = operation_name(node)
            same = self.shape(self.inputs(node)[0]).numel() == self.shape(node).numel()
            if name not in COPIES and not (name in MAXIMA | AVERAGES and same):
                break
            node = self.inputs(node)[0]
        return node

    def take(self, node: fx.Node, raw: Tensor, value: Tensor, threshold: float) -> None:
        """Take over what a tensor was solved for: (B, C, h, w) raw and rectified, and how."""
        self.values[node] = value.reshape(self.shape(node))
        node = self.original(node)
        if operation_name(node) in RELUS:
            self.raw[node.name] = (raw, threshold)

    def correct(self, relu: str, mask: Tensor) -> None:
        """Take over a repaired mask (B, C, h, w) of the ReLU of this name."""
        node = next(node for node in self.nodes if node.name == relu)
        self.masks[relu] = mask = mask.reshape(self.shape(node))
        for pool in self.routes:  # there the mask says which entries are the largest, too
            if self.original(self.inputs(pool)[0]) is node:
                self.routes[pool] = mask.reshape(self.shape(self.inputs(pool)[0]))
                return
        value = self.value(node)
        if value is None:
            known, value = self.known(node)
            if not bool((known > 0).all()):
                return
        raised = torch.where(value > 0, value, torch.full_like(value, TINY))
        self.values[node] = raised * mask

    def relu_behind(self, node: fx.Node) -> fx.Node | None:
        """Return the ReLU that a tensor goes to, through additions alone, or None."""
        while True:
            users = self.users(node)
            if len(users) != 1:
                return None
            name = operation_name(users[0])
            if name in RELUS:
                return users[0]
            if name not in ADDITIONS:
                return None
            node = users[0]

    def mask(self, relu: fx.Node) -> Tensor:
        """Return 0/1 where a ReLU is on; raise StoppedError where that is not known."""
        if relu.name in self.masks:
            return self.masks[relu.name]
        value = self.value(relu)
        if value is None:
            known, value = self.known(relu)
            if not bool((known > 0).all()):
                raise StoppedError(f"{place(relu)}: which of its entries are on is not known")
        return (value > 0).to(value)


def network_of(
    model: nn.Module,
    batch_size: int,
    image_shape: tuple[int, int, int],
    gradient: Mapping[str, Tensor],
    *,
    train_mode: bool,
    statistics: Sequence[tuple[Tensor, Tensor]] | None,
    accuracy: Mapping[str, Accuracy],
) -> Network:
    """Trace a network for an attack on its gradient.

    gradient, accuracy: by the parameters' names. statistics: (mean, biased variance) of the batch
    at every BatchNorm layer, in the model's order; needed in train mode.

    Raises ValueError, in one line, where torch.fx cannot trace the network or where the attack
    lacks the batch statistics.
    """
    nodes = traced_tensors(model, batch_size, image_shape)
    for node in nodes:
        node.meta["tensor_users"] = [user for user in nodes if node in user.meta["inputs"]]
    twin = copy.deepcopy(model).double().eval()
    layers = [m for m in twin.modules() if isinstance(m, BATCHNORM_TYPES)]
    if train_mode and layers:
        if statistics is None:
            raise ValueError(
                "in train mode the walk needs the batch's BatchNorm statistics, which the client "
                "did not send"
            )
        for layer, (mean, var) in zip(layers, statistics, strict=True):
            layer.running_mean, layer.running_var = mean.double(), var.double()
    if any(layer.running_mean is None for layer in layers):
        raise ValueError("a BatchNorm layer keeps no running statistics")
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    in_double = {name: g.double() for name, g in gradient.items()}
    return Network(nodes, twin, in_double, train_mode and bool(layers), dict(accuracy))


def largest_system(
    model: nn.Module, batch_size: int, image_shape: tuple[int, int, int]
) -> tuple[int, int, str]:
    """Return the equations, unknowns (per channel) and name of the largest convolution's system.

    Raises ValueError, in one line, where torch.fx cannot trace the network.
    """
    found = []
    for node in traced_tensors(model, batch_size, image_shape):
        if operation_name(node) == "conv2d":
            kernel = node.meta["module"].weight[:, 0].numel()
            source = node.meta["inputs"][0].meta["value"]
            found.append((kernel, source[:, 0].numel(), str(node.target)))
    return max(found, key=lambda system: system[0] * system[1], default=(0, 0, "none"))


def geometry_of(module: nn.Module, name: str) -> Geometry:
    """Return how a layer moves over its input; raise StoppedError for one that is not plain."""
    if isinstance(module, nn.Linear):
        return Geometry((1, 1))
    assert isinstance(module, nn.Conv2d)
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    if not plain or isinstance(module.padding, str):
        raise StoppedError(
            f"{name}: grouped, dilated and unusually padded convolutions are not solved"
        )
    pair = lambda t: (int(t[0]), int(t[1]))  # noqa: E731
    return Geometry(pair(module.kernel_size), pair(module.stride), pair(module.padding))


# Operations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """Says how an attacker walks back through one kind of operation."""

    #: (network, node, input) → ∂L/∂input from ∂L/∂node.
    backward: Callable[[Network, fx.Node, fx.Node], Tensor]
    #: (network, node, input) → what is known of the input, None for nothing.
    invert: Callable[[Network, fx.Node, fx.Node], Known | None]


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
) -> "Operation":
    """Make the operation of an activation that loses nothing.

    Both are functions of its output and of the slope of its negative part, where it has one.
    """

    def backward(network: Network, node: fx.Node, source: fx.Node) -> Tensor:
        known, value = network.known(node)
        if not bool((known > 0).all()):
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
    if after == before:
        return mask, value
    if node in network.routes:
        routes = network.routes[node]
        return routes, spread(network, node, source, value) * routes
    if math.prod(before[2:]) == 1:
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


def is_maximum(node: fx.Node) -> bool:
    """Tell whether a node is a max-pooling."""
    return operation_name(node) in MAXIMA


def pooling_sides(network: Network, node: fx.Node) -> tuple[tuple[int, int], ...] | None:
    """Return kernel, stride and padding of a max-pooling; None for an unusual one."""
    pool = network.module(node) if node.op == "call_module" else None
    if not isinstance(pool, nn.MaxPool2d) or pool.ceil_mode or pool.dilation not in (1, (1, 1)):
        return None
    return tuple(
        (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
        for value in (pool.kernel_size, pool.stride, pool.padding)
    )


WEIGHTED = {"conv2d", "linear"}
BATCHNORMS = {"batchnorm2d", "syncbatchnorm"}
RELUS = {"relu"}
ADDITIONS = {"add", "iadd"}
MAXIMA = {"maxpool2d", "adaptivemaxpool2d"}
AVERAGES = {"avgpool2d", "adaptiveavgpool2d", "mean"}
COPIES = {"identity", "dropout", "dropout2d", "stochasticdepth", "flatten", "view", "reshape"}
COPIES |= {"squeeze", "unsqueeze", "contiguous", "clone"}

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
