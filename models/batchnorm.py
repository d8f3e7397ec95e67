"""BatchNorm: statistics of a batch at every layer, and the derivative of the original attack."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: Every BatchNorm of torch, SyncBatchNorm included.
BATCHNORM_TYPES = (nn.modules.batchnorm._BatchNorm,)


def batchnorm_layers(model: nn.Module) -> list[nn.Module]:
    """The model's BatchNorm layers in the order of `model.modules()`."""
    return [module for module in model.modules() if isinstance(module, BATCHNORM_TYPES)]


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance a channel of a layer's input `x` (B, C, ...): two (C,) tensors."""
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, dims, correction=0)
    return mean, var


@contextmanager
def recorded_moments(model: nn.Module):
    """Record `batch_moments` of the input of every BatchNorm layer during forward passes.

    Yields a function that returns the (mean, var) pairs of the forward pass, in the order
    of `batchnorm_layers`; they are on the graph of that pass. Raises ValueError for a layer that
    the pass used never or twice: it has no statistics of its own.
    """
    layers = batchnorm_layers(model)
    moments = {}

    def record(layer, args):
        if layer in moments:
            raise ValueError("a BatchNorm layer is used twice in one forward pass")
        moments[layer] = batch_moments(args[0])

    def recorded():
        if len(moments) < len(layers):
            raise ValueError("a BatchNorm layer takes no part in the forward pass")
        return [moments[layer] for layer in layers]

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def running_moments(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copies of the running (mean, var) of every BatchNorm layer.

    Raises ValueError for a layer that keeps none.
    """
    layers = batchnorm_layers(model)
    if any(layer.running_mean is None for layer in layers):
        raise ValueError("a BatchNorm layer keeps no running statistics")
    return [
        (layer.running_mean.detach().clone(), layer.running_var.detach().clone())
        for layer in layers
    ]


class _TruncatedBatchNorm(torch.autograd.Function):
    """Batch normalisation whose first derivative is exact and whose second is truncated.

    What the backward pass saved (normalised input, standard deviation) is made inside the
    forward pass, so autograd holds it for constant when the backward pass is differentiated:
    only the dependence on the incoming derivative and on the weight is seen.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean, var = batch_moments(x)
        scale = (var + eps).rsqrt()
        normed = (x - _per_channel(mean, x)) * _per_channel(scale, x)
        ctx.save_for_backward(normed, scale, weight)
        if weight is None:
            return normed.clone()  # an in-place layer behind must not change what is saved
        return normed * _per_channel(weight, x) + _per_channel(bias, x)

    @staticmethod
    def backward(ctx, cotangent):
        normed, scale, weight = ctx.saved_tensors
        dims = [0, *range(2, normed.dim())]
        d_weight = d_bias = None
        d_normed = cotangent
        if weight is not None:
            d_weight = (cotangent * normed).sum(dims)
            d_bias = cotangent.sum(dims)
            d_normed = cotangent * _per_channel(weight, normed)
        d_x = _per_channel(scale, normed) * (
            d_normed
            - d_normed.mean(dims, keepdim=True)
            - normed * (d_normed * normed).mean(dims, keepdim=True)
        )
        return d_x, d_weight, d_bias, None


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


@contextmanager
def truncated_derivative(model: nn.Module):
    """Within this context BatchNorm in train mode has the original attack's second derivative.

    The original replaced every BatchNorm by apex's SyncBatchNorm, whose Python backward pass
    works on saved copies of the input and of the batch statistics that autograd does not
    follow. Outputs and gradients (first derivatives) are unchanged; what is differentiated
    twice is not exact. For comparison only.
    """
    layers = batchnorm_layers(model)

    def replaced(layer):
        def forward(x):
            if not layer.training:
                return type(layer).forward(layer, x)
            return _TruncatedBatchNorm.apply(x, layer.weight, layer.bias, layer.eps)

        return forward

    try:
        for layer in layers:
            layer.forward = replaced(layer)
        yield
    finally:
        for layer in layers:
            del layer.forward
