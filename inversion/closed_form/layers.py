"""The gradient of candidate images with the derivatives of the layers in closed form.

Within one pass every convolution, linear layer and BatchNorm of the network is replaced by its
closed form (products.py, normalisation.py). The weights of convolutions and linear layers then
stand on no graph: torch is asked for ∂L/∂y at the output of each such layer. From it and the
layer's input follow the gradient by its weights and, with a cotangent of that gradient, the
derivatives by the input and by ∂L/∂y. Everything else is left to torch. Values and derivatives are
those of torch, up to rounding.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from inversion.candidate_gradient import CandidateGradient, Pairs, Part
from inversion.closed_form.normalisation import Pass, Statistics, normalise
from inversion.closed_form.products import Product, product_of, product_of_linear
from models.batchnorm import (
    batchnorm_layers,
    moments_of_uses,
    normalises_by_batch,
    require_spread,
)
from models.forced import ForcedStatistics
from models.gradient import gradient_mode, trainable_parameters
from models.losses import ClientLoss, mean_loss

#: BatchNorm layers that have a closed form here; SyncBatchNorm and subclasses have none.
NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Moments = tuple[Tensor, Tensor]


@dataclass
class _Use:
    """Holds one use of a convolution or linear layer in a forward pass."""

    layer: nn.Conv2d | nn.Linear
    product: Product
    #: The weights that take part, (C', C, kernel), without a graph; and which these are.
    weight: Tensor
    part: Part
    #: The input as images, on the graph, and its version at that time.
    x: Tensor
    version: int
    #: The input as the product takes it, without a graph.
    operands: Tensor
    #: ∂L/∂y, without a graph; None until the loss's derivative is taken.
    signal: Tensor | None = None
    #: Whether the loss's derivative went on to the layer's input, by its adjoint on the graph.
    passed: bool = False
    #: Cotangents of the gradient by weights, (C', C, kernel), and shift; None until they are known.
    v_weight: Tensor | None = None
    v_bias: Tensor | None = None
    #: At how many of two places the derivatives by these were added.
    met: int = 0


@dataclass
class _Noted:
    """Holds what the layers note of a forward pass."""

    uses: list[_Use] = field(default_factory=list)
    #: Where ∂L/∂y arrives, per use. Kept apart: the graph holds the uses, and must not hold itself.
    edges: list[GradientEdge] = field(default_factory=list)
    #: BatchNorm layer → moments of the batch, per use of the layer.
    moments: dict[nn.Module, list[Moments]] = field(default_factory=dict)
    taken: Pass = field(default_factory=Pass)


class _Applied(torch.autograd.Function):
    """Computes W x + b; the derivative by x is the adjoint, and Vᵀ gy once V is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, use: _Use) -> Tensor:
        ctx.use = use
        bias = None if use.layer.bias is None else use.layer.bias.detach()
        return use.product.apply(use.operands, use.weight, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor):
        use: _Use = ctx.use
        if use.signal is None:
            use.passed = True
        by_x = _Adjoint.apply(gy, use)
        if use.v_weight is not None:
            use.met += 1
            by_x = by_x.add_(use.product.adjoint(use.signal, use.v_weight))
        return by_x, None


class _Adjoint(torch.autograd.Function):
    """Computes Wᵀ gy; the derivative by gy is W, and V x once V is known."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, use: _Use) -> Tensor:
        ctx.use = use
        return use.product.adjoint(gy, use.weight)

    @staticmethod
    def backward(ctx: Any, h: Tensor):
        use: _Use = ctx.use
        by_gy = use.product.apply(use.product.operands(h), use.weight)
        if use.v_weight is not None:
            use.met += 1
            by_gy = by_gy.add_(use.product.apply(use.operands, use.v_weight, use.v_bias))
        return by_gy, None


class ClosedForm:
    """Computes the gradient of candidate images with the layers' derivatives in closed form.

    It replaces the layers Conv2d, with zeros as padding and their number given, Linear and
    BatchNorm, but no subclasses of them and none whose parameters are computed, as by a
    parametrization. A network may use a layer more than once, or share weights. A hook of the
    network's own that changes ∂L/∂y of such a layer is not seen.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ClientLoss,
        *,
        batchnorm: bool,
        forced: Sequence[ForcedStatistics] | None = None,
        moments: bool = False,
    ):
        """Look for the layers of a model.

        batchnorm: replace BatchNorm too, which one process then normalises by the images that it
        has. forced: statistics of the client in the place of the candidate's own. moments: the
        batch's moments at every BatchNorm layer are wanted.
        """
        self.model, self.loss, self.batchnorm, self._moments = model, loss, batchnorm, moments
        self._layers = [layer for layer in model.modules() if _is_product(layer)]
        self._norms = batchnorm_layers(model) if batchnorm else []
        self._forced = dict(zip(self._norms, forced or (), strict=False))
        #: Layer and shape of its input → how it multiplies, and by which part of its weights.
        self._products: dict[tuple, tuple[Product, tuple[slice, ...]]] = {}

    @staticmethod
    def replaces_batchnorm(model: nn.Module) -> bool:
        """Tell whether every BatchNorm layer of a model has a closed form here."""
        return all(
            type(layer) in NORM_TYPES and _is_own(layer) for layer in batchnorm_layers(model)
        )

    def gradient(
        self,
        x: Tensor,
        y: Tensor,
        *,
        images: int,
        total: int | None = None,
        added: Callable[[], Tensor] | None = None,
    ) -> tuple[CandidateGradient, list[Moments]]:
        """Return the gradient of images `x` (B, C, H, W) with labels `y`, and their moments.

        The images must require a derivative. Both results can be differentiated by `x`, the
        gradient by its `pairs`. images: number of images in the whole batch. total, added: as in
        `models.gradient.batch_gradient`. The moments are pairs (mean, var), (C_l,) each, in the
        order of the BatchNorm layers; none unless they are wanted.

        Raises ValueError, as torch's own layers do, for a batch statistic of one value.
        """
        with self._replaced(images) as noted:
            with gradient_mode(self.model, self.loss.train_mode), torch.enable_grad():
                value = mean_loss(self.model(x), y, self.loss, total)
                if added is not None:
                    value = value + added()
                parameters = list(trainable_parameters(self.model).values())
                inputs = [*parameters, *noted.edges]
                found = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
            noted.taken.of_loss = False
        count = len(parameters)
        gradient = _multiplied_out(parameters, found[:count], noted.uses, found[count:])
        return gradient, moments_of_uses([*noted.moments.values()]) if self._moments else []

    @contextmanager
    def _replaced(self, images: int) -> Iterator[_Noted]:
        """Within this context the layers are replaced; yield what they note of a forward pass."""
        noted = _Noted(moments={layer: [] for layer in self._norms})
        try:
            for layer in self._layers:
                layer.forward = self._multiplying(layer, noted)
            for layer in self._norms:
                layer.forward = self._normalising(layer, noted, images)
            yield noted
        finally:
            for layer in (*self._layers, *self._norms):
                vars(layer).pop("forward", None)

    def _multiplying(self, layer: nn.Conv2d | nn.Linear, noted: _Noted) -> Callable:
        def forward(x: Tensor) -> Tensor:
            linear = isinstance(layer, nn.Linear)
            if not x.requires_grad or (not linear and x.dim() != 4):
                return type(layer).forward(layer, x)
            z = x.reshape(math.prod(x.shape[:-1]), x.shape[-1], 1, 1) if linear else x
            product, weight, part = self._product(layer, z)
            use = _Use(layer, product, weight, part, z, z._version, product.operands(z.detach()))
            y = _Applied.apply(z, use)
            own = [p for p in (layer.weight, layer.bias) if p is not None]
            if torch.is_grad_enabled() and any(p.requires_grad for p in own):
                noted.uses.append(use)
                noted.edges.append(get_gradient_edge(y))
            return y.view(*x.shape[:-1], y.shape[1]) if linear else y

        return forward

    def _product(self, layer: nn.Conv2d | nn.Linear, x: Tensor) -> tuple[Product, Tensor, Part]:
        """Return how a layer multiplies an input, by which weights, and which part these are."""
        key, weight = (layer, x.shape), layer.weight.detach()
        if isinstance(layer, nn.Linear):
            return product_of_linear(*x.shape[:2]), weight[:, :, None, None], None
        if key not in self._products:
            self._products[key] = product_of(layer, x)
        product, part = self._products[key]
        smaller = weight[part]
        if smaller.shape == weight.shape:
            return product, weight, None
        return product, smaller.contiguous(), part

    def _normalising(self, layer: Any, noted: _Noted, images: int) -> Callable:
        def forward(z: Tensor) -> Tensor:
            forced = self._forced.get(layer)
            count = images * math.prod(z.shape[2:])
            constants: Moments | None = None
            if forced is not None:
                constants = (forced.d_bias / count, forced.d_weight / count)
                fixed: Moments | None = (forced.mean, forced.var)
            else:
                by_batch = normalises_by_batch(layer, layer.training)
                if by_batch:
                    require_spread(count)
                fixed = None if by_batch else (layer.running_mean, layer.running_var)
            if fixed is not None and not z.numel():  # torch's kernels divide by the number
                noted.moments[layer].append(fixed)
                return F.batch_norm(z, *fixed, layer.weight, layer.bias, eps=layer.eps)
            how = Statistics(layer.eps, fixed, constants, self._moments)
            y, *found = normalise(z, layer.weight, layer.bias, how, noted.taken)
            noted.moments[layer].append((found[0], found[1]))
            return y

        return forward


def _is_product(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return (
            layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and _is_own(layer)
        )
    return type(layer) is nn.Linear and _is_own(layer)


def _is_own(layer: nn.Module) -> bool:
    """Tell whether a layer's weights are parameters of its own, and its forward pass the type's."""
    own = {"weight", "bias"} <= layer._parameters.keys()
    return own and "forward" not in vars(layer)


def _multiplied_out(
    parameters: Sequence[nn.Parameter],
    by_torch: Sequence[Tensor | None],
    uses: Sequence[_Use],
    signals: Sequence[Tensor | None],
) -> CandidateGradient:
    """Make the gradient of the layers' inputs and ∂L/∂y, and of what torch knows of it.

    by_torch: the gradient by each parameter where it enters otherwise. signals: ∂L/∂y per use;
    None where the loss does not depend on it.
    """
    used = [(use, gy) for use, gy in zip(uses, signals, strict=True) if gy is not None]
    for use, gy in used:
        use.signal = gy.detach()
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    parts = _common_parts(used, places, by_torch)
    # a copy, since the graph may hold these tensors
    values: list[Tensor | None] = [None if g is None else g.detach().clone() for g in by_torch]

    def add(parameter: Tensor | None, value: Callable[[], Tensor]) -> None:
        place = places.get(id(parameter))
        if place is not None:
            known = values[place]
            values[place] = value() if known is None else known.add_(value())

    with torch.no_grad():
        for use, gy in used:
            part = parts[places[id(use.layer.weight)]] if id(use.layer.weight) in places else None
            add(use.layer.weight, partial(_weight_gradient, use, gy, part))
            add(use.layer.bias, partial(torch.sum, gy.detach(), (0, 2, 3)))

    def pairs(cotangents: Sequence[Tensor]) -> Pairs:
        found = [
            (g, v)
            for g, v in zip(by_torch, cotangents, strict=True)
            if g is not None and g.requires_grad
        ]
        with torch.no_grad():
            for use, gy in used:
                weight, bias = (
                    cotangents[places[id(p)]] if id(p) in places else None
                    for p in (use.layer.weight, use.layer.bias)
                )
                found += _use_pairs(use, gy, weight, bias)
        return found

    both = zip(values, parameters, strict=True)
    filled = tuple(p.new_zeros(p.shape) if value is None else value for value, p in both)

    def complete() -> bool:
        return all(use.v_weight is None or use.met == 2 for use, _ in used)

    return CandidateGradient(filled, pairs, tuple(parts), disposable=True, complete=complete)


def _common_parts(
    used: Sequence[tuple[_Use, Tensor]], places: Mapping[int, int], by_torch: Sequence
) -> list[Part]:
    """Return, for every parameter, the part that all its uses share; None for all of it."""
    found: dict[int, list[Part]] = {}
    for use, _ in used:
        found.setdefault(id(use.layer.weight), []).append(use.part)
    parts: list[Part] = [None] * len(by_torch)
    for name, of_uses in found.items():
        if name in places and by_torch[places[name]] is None:
            first = of_uses[0]
            parts[places[name]] = first if all(part == first for part in of_uses) else None
    return parts


def _weight_gradient(use: _Use, gy: Tensor, part: Part) -> Tensor:
    """Return gy ⊗ x as the layer's weights are shaped, or as their `part`."""
    product = use.product.outer(use.operands, gy.detach(), use.weight)
    if isinstance(use.layer, nn.Linear):
        return product.flatten(1)
    if use.part is None or use.part == part:
        return product
    whole = torch.zeros_like(use.layer.weight, requires_grad=False)
    whole[use.part] = product
    return whole


def _use_pairs(use: _Use, gy: Tensor, weight: Tensor | None, bias: Tensor | None) -> Pairs:
    """Return the pairs of one use, for cotangents of the gradient by its weights and shift.

    All layers but the first pass ∂L/∂y on to their input (`_Use.passed`). Those need no pairs:
    `_Applied` and `_Adjoint` add the two derivatives when torch comes to them, so that the
    derivatives of all layers are not held at once.
    """
    found: Pairs = []
    if weight is None:
        if bias is not None and gy.requires_grad:
            found.append((gy, bias[:, None, None].expand(gy.shape)))
        return found
    if use.x._version != use.version:
        raise RuntimeError(
            f"the input of a {type(use.layer).__name__} was changed in place after its use"
        )
    if isinstance(use.layer, nn.Linear):
        weight = weight[:, :, None, None]
    elif weight.shape != use.weight.shape:
        assert use.part is not None
        weight = weight[use.part].contiguous()
    if use.passed and gy.requires_grad:
        use.v_weight, use.v_bias = weight, bias
        return found
    if gy.requires_grad:
        found.append((gy, use.product.apply(use.operands, weight, bias)))
    if use.x.requires_grad:
        found.append((use.x, use.product.adjoint(gy.detach(), weight)))
    return found
