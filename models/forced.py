"""Forced statistics: train mode's gradient of a batch whose images do not interact.

A client that uploads the mean μ and variance σ² of its batch sends everything by which BatchNorm
couples the images. With x̂ = (z − μ)/σ and N values per channel, the backward pass of y = γ x̂ + β
in train mode is ∂L/∂z = γ/σ (∂L/∂y − (∂L/∂β)/N − x̂ (∂L/∂γ)/N): beside μ and σ it takes two numbers
per channel, and those are the layer's own entries of the client's gradient. With all four held
constant the gradient is that of the network in eval mode, with running statistics μ and σ², for the
loss

    L + R,  R = − Σ_layers Σ_values [γ (∂L/∂β)/N x̂ + ½ γ (∂L/∂γ)/N x̂²],

where R's γ is held constant too. At the client's images this is the client's gradient, up to
rounding. At other images it is another function than train mode's gradient, and a sum over the
images.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batchnorm import batchnorm_layers, per_channel
from models.gradient import trainable_parameters
from models.target import Target
from utils.errors import InputError


@dataclass(frozen=True)
class ForcedStatistics:
    """Holds what the client sent of one BatchNorm layer and the layer's scale, (C,) each."""

    #: Mean μ of the client's batch at the layer's input.
    mean: Tensor
    #: Biased variance σ² at the same place.
    var: Tensor
    #: The client's gradient by the layer's scale, ∂L/∂γ.
    d_weight: Tensor
    #: The client's gradient by the layer's shift, ∂L/∂β.
    d_bias: Tensor
    #: The layer's scale γ as R holds it constant, also where the layer's own is moved.
    weight: Tensor


def forced_statistics(model: nn.Module, target: Target) -> list[ForcedStatistics]:
    """Collect what forces the statistics of every BatchNorm layer, in their order.

    The tensors have the type and device of the model's parameters.

    Raises InputError where the client sent too little of some layer, or where there is nothing to
    force: no BatchNorm, or a gradient taken in eval mode.
    """
    layers = batchnorm_layers(model)
    if not layers:
        raise InputError(f"{target.network} has no BatchNorm layer; leave it out")
    if not target.train_mode:
        raise InputError(
            "the client took its gradient in eval mode, where BatchNorm couples no images; leave "
            "it out"
        )
    if target.bn_mean is None or target.bn_var is None:
        raise InputError(
            "the client sent no statistics of its batch; capture it anew with uploaded ones"
        )
    sent = dict(zip(map(id, trainable_parameters(model).values()), target.gradient, strict=True))
    like, names = next(model.parameters()), {layer: name for name, layer in model.named_modules()}
    found = []
    for layer, mean, var in zip(layers, target.bn_mean, target.bn_var, strict=True):
        own = [sent.get(id(parameter)) for parameter in (layer.weight, layer.bias)]
        if any(gradient is None for gradient in own):
            raise InputError(
                f"the client sent no gradient by scale and shift of BatchNorm layer "
                f"{names[layer]}, which is part of the coupling; leave it out"
            )
        mean, var, d_weight, d_bias = (t.to(like) for t in (mean, var, *own))
        scale = layer.weight.detach().clone()
        found.append(ForcedStatistics(mean, var, d_weight, d_bias, scale))
    return found


@contextmanager
def forced_normalisation(
    model: nn.Module, statistics: Sequence[ForcedStatistics], images: int
) -> Iterator[Callable[[], Tensor]]:
    """Within this context every BatchNorm layer normalises by the client's statistics.

    It does so whatever its mode. Yields a function that returns R (see above) of the last forward
    pass, to be added to a loss that is a mean over `images` images, or to a part of their sum
    divided by it. The model's buffers are left as they are.
    """
    terms: dict[nn.Module, Tensor] = {}

    def replaced(layer: nn.Module, of: ForcedStatistics):
        def forward(z: Tensor) -> Tensor:
            terms[layer] = _coupling(layer, of, z, images)
            return F.batch_norm(z, of.mean, of.var, layer.weight, layer.bias, eps=layer.eps)

        return forward

    layers = batchnorm_layers(model)
    try:
        for layer, of in zip(layers, statistics, strict=True):
            layer.forward = replaced(layer, of)
        yield lambda: torch.stack([*terms.values()]).sum()
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _coupling(layer: nn.Module, of: ForcedStatistics, z: Tensor, images: int) -> Tensor:
    """Return what a layer with the input `z` (n, C, ...) adds to R."""
    count = images * math.prod(z.shape[2:])
    scale = (of.var + layer.eps).rsqrt()
    weight = of.weight / count
    slope, bend = weight * scale * of.d_bias, weight * scale.square() * of.d_weight / 2
    centred = z - per_channel(of.mean, z)
    return -(centred * torch.addcmul(per_channel(slope, z), per_channel(bend, z), centred)).sum()
