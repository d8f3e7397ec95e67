"""What is known of every tensor of a network while its gradient is solved layer by layer.

The network is the graph that torch.fx traces. How to walk back through an operation is given to it
from outside, as a table of `Operation`s.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.batchnorm import BatchNorm, per_channel
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
)
from inversion.layerwise.least_squares import memory_of_system
from inversion.layerwise.use import Use
from models.graph import operation, operation_name, place

#: What a ReLU's output is where its mask was repaired to "on" and its value had been taken for 0.
TINY = 1e-12
#: Bytes that a dense system may take, where nobody says.
MAX_MEMORY = 8 * 2**30
#: (0/1 of the tensor's shape, values that count where it is 1).
Known = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Operation:
    """Says how an attacker walks back through one kind of operation."""

    #: (network, node, input) → ∂L/∂input from ∂L/∂node.
    backward: Callable[["Network", fx.Node, fx.Node], Tensor]
    #: (network, node, input) → what is known of the input, None for nothing.
    invert: Callable[["Network", fx.Node, fx.Node], Known | None]


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
    #: Name of an operation (`operation_name`) → how to walk back through it.
    operations: Mapping[str, Operation]
    #: What has been recovered.
    values: dict[fx.Node, Tensor] = field(default_factory=dict)
    #: Name of a ReLU → 0/1 where it is on, where that says more than its value.
    masks: dict[str, Tensor] = field(default_factory=dict)
    #: Name of a ReLU → its output (B, C, h, w) as it was solved for, and the threshold of its mask.
    raw: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    #: Pooling → 0/1 of its input's shape where a window's value comes from.
    routes: dict[fx.Node, Tensor] = field(default_factory=dict)
    #: Bytes that a dense system may take.
    max_memory: int = MAX_MEMORY
    #: Names of parameters of whose gradients the client's defence sent only a part.
    partial: frozenset[str] = frozenset()
    #: Relative error of the derivative of the loss by the logits, which all others inherit.
    signal_error: float = 0.0
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

    def operation(self, node: fx.Node) -> Operation:
        """Return how to walk back through a node; raise StoppedError where nobody knows."""
        name = operation_name(node)
        if name not in self.operations:
            raise StoppedError(f"{place(node)}: {operation(node)} cannot be inverted")
        return self.operations[name]

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
        return self._value(node, {})

    def _value(self, node: fx.Node, seen: dict[fx.Node, Tensor | None]) -> Tensor | None:
        """Do what `value` does; `seen` holds what is known by now of the tensors before.

        Without it, a tensor would be asked for once per path from it to the node, and the residual
        connections of a network double the paths.
        """
        if node in self.values:
            return self.values[node]
        if node not in seen:
            given: list[Tensor] = []
            for source in self.inputs(node):
                value = self._value(source, seen)
                if value is None:
                    break
                given.append(value)
            seen[node] = None
            if given and len(given) == len(self.inputs(node)):
                with torch.no_grad():
                    seen[node] = self.evaluate(node, given)
        return seen[node]

    def following(self) -> dict[fx.Node, Tensor]:
        """Return every tensor's value that was recovered or follows from what was."""
        found: dict[fx.Node, Tensor] = {}
        for node in self.nodes:
            inputs = [found.get(source) for source in self.inputs(node)]
            given = [value for value in inputs if value is not None]
            if node in self.values:
                found[node] = self.values[node]
            elif inputs and len(given) == len(inputs):
                with torch.no_grad():
                    found[node] = self.evaluate(node, given)
        return found

    def known(self, node: fx.Node) -> Known:
        """Return which entries of a tensor are known, from its value or from what it became."""
        value = self.value(node)
        if value is not None:
            return torch.ones_like(value), value
        zeros = self.empty(node)
        mask, value = zeros, zeros
        for user in self.users(node):
            if operation_name(user) not in self.operations:
                continue
            found = self.operation(user).invert(self, user, node)
            if found is not None:
                value = torch.where(found[0] > 0, found[1], value)
                mask = torch.maximum(mask, found[0])
        return mask, value

    def whole(self, node: fx.Node) -> Tensor | None:
        """Return a tensor's value if every entry of it is known."""
        known, value = self.known(node)
        return value if bool((known > 0).all()) else None

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

    def affine_behind(self, conv: fx.Node, norm: fx.Node | None) -> tuple[Tensor, Tensor]:
        """Return scale and shift (O,) that turn w∗u into the convolution's output, normalised.

        norm: the BatchNorm behind it, None for none.
        """
        module = self.module(conv)
        scale = torch.ones_like(module.weight[:, 0, 0, 0])
        shift = torch.zeros_like(scale)
        if norm is not None:
            layer = self.affine(norm)
            scale, shift = layer.scale, layer.shift
        if module.bias is not None:
            shift = shift + scale * module.bias
        return scale, shift

    def batchnorm(self, node: fx.Node) -> BatchNorm:
        """Return the BatchNorm layer of a node; raise StoppedError where it cannot be inverted."""
        layer = self.affine(node)
        if not self.train_mode:
            return layer
        of_weight = self.gradient.get(f"{node.target}.weight")
        of_bias = self.gradient.get(f"{node.target}.bias")
        if of_weight is None or of_bias is None:
            whole = self.whole_or_not(f"{node.target}.weight", f"{node.target}.bias")
            raise StoppedError(f"{place(node)}: the gradient of its scale and shift was {whole}")
        return replace(layer, weight_gradient=of_weight, bias_gradient=of_bias)

    def whole_or_not(self, *names: str) -> str:
        """Say of parameters without a gradient whether a part of it was sent, or nothing."""
        if self.partial.isdisjoint(names):
            return "not sent"
        return "sent in part: the client's defence left the rest out"

    def uses(self, node: fx.Node) -> list[Use]:
        """Return what the convolutions and linear layers that take a tensor say about it."""
        return [self.use(user) for user in self.users(node) if operation_name(user) in WEIGHTED]

    def memory_needed(self, uses: Sequence[Use], node: fx.Node) -> int:
        """Return about how many bytes the dense system about a tensor takes."""
        rows = sum(use.gradient[:, 0].numel() for use in uses)
        return memory_of_system(rows, self.empty(node)[:, 0].numel())

    def check_memory(self, uses: Sequence[Use], node: fx.Node) -> None:
        """Raise StoppedError where the dense system about a tensor takes more than `max_memory`."""
        needed = self.memory_needed(uses, node)
        if needed > self.max_memory:
            raise StoppedError(
                f"{node.name}: its equations take about {needed / 2**20:,.0f} MiB, more than the "
                f"{self.max_memory / 2**20:,.0f} MiB of --max-memory"
            )

    def use(self, node: fx.Node) -> Use:
        """Return what one convolution or linear layer says about the tensor that it takes."""
        module, name = self.module(node), str(node.target)
        if f"{name}.weight" not in self.gradient:
            whole = self.whole_or_not(f"{name}.weight")
            raise StoppedError(f"{name}: the gradient of its weights was {whole}")
        if not self.gradient[f"{name}.weight"].any():
            raise StoppedError(f"{name}: the gradient of its weights is zero")
        if len(self.shape(node)) not in (2, 4):
            raise StoppedError(f"{name}: takes tensors of {len(self.shape(node))} dimensions")
        geometry = geometry_of(module, name)
        users = self.users(node)
        normalised = len(users) == 1 and operation_name(users[0]) in BATCHNORMS
        behind = users[0] if normalised else node
        batchnorm = self.batchnorm(behind) if normalised else None
        relu = self.relu_behind(behind)
        arriving = self.signal(behind if relu is None else relu)
        mask = torch.ones_like(arriving) if relu is None else self.mask(relu)
        known, output = (_as_map(t) for t in self.known(node))
        if module.bias is not None:
            output = output - per_channel(module.bias.detach())
        return Use(
            name=name,
            geometry=geometry,
            weight=_as_map(module.weight.detach()),
            gradient=_as_map(self.gradient[f"{name}.weight"]),
            arriving=_as_map(arriving),
            mask=_as_map(mask),
            batchnorm=batchnorm,
            accuracy=self.accuracy[f"{name}.weight"],
            known=known,
            output=output,
            trusted=module.weight.new_ones(module.weight.shape[0]),
            relu=None if relu is None else relu.name,
        )

    def original(self, node: fx.Node) -> fx.Node:
        """Return the tensor that a tensor is a copy of: itself where it is none.

        A pooling whose windows hold one number each copies, too.
        """
        while node.op != "placeholder":
            name = operation_name(node)
            if name not in COPIES and not (name in MAXIMA | AVERAGES and self.copies(node)):
                break
            node = self.inputs(node)[0]
        return node

    def copies(self, pool: fx.Node) -> bool:
        """Tell whether a pooling returns what it takes, by trying it on distinct numbers."""
        (source,) = self.inputs(pool)
        numbers = self.empty(source)
        numbers = torch.linspace(1, 2, numbers.numel()).to(numbers).reshape(numbers.shape)
        found = self.evaluate(pool, [numbers]).flatten()
        return len(found) == numbers.numel() and bool((found == numbers.flatten()).all())

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
        value = self.whole(node)
        if value is None:
            return
        raised = torch.where(value > 0, value, torch.full_like(value, TINY))
        self.values[node] = raised * mask
        for copied in list(self.values):
            if copied is not node and self.original(copied) is node:
                self.values[copied] = self.values[node].reshape(self.shape(copied))

    def rectified(self, node: fx.Node) -> bool:
        """Tell whether a tensor is a ReLU's output, or a pooling or copy of one."""
        while operation_name(node) in COPIES | MAXIMA | AVERAGES and node.op != "placeholder":
            node = self.inputs(node)[0]
        return operation_name(node) in RELUS

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
        value = self.whole(relu)
        if value is None:
            raise StoppedError(f"{place(relu)}: which of its entries are on is not known")
        return (value > 0).to(value)


def _as_map(t: Tensor) -> Tensor:
    """Return a linear layer's tensor (·, ·) as a convolution's on maps of one position."""
    return t if t.dim() == 4 else t[:, :, None, None]
