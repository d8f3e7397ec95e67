"""BatchNorm: statistics of a batch at every layer, the derivative of the original attack, and
layers that take its place."""

import math
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from utils.shard import ALONE, Shard, differentiable_sum

#: Every BatchNorm of torch, SyncBatchNorm included.
BATCHNORM_TYPES = (nn.modules.batchnorm._BatchNorm,)


def batchnorm_layers(model: nn.Module) -> list[nn.Module]:
    """List the model's BatchNorm layers in the order of `model.modules()`."""
    return [module for module in model.modules() if isinstance(module, BATCHNORM_TYPES)]


def uses_batch_statistics(model: nn.Module, train_mode: bool) -> bool:
    """Tell whether some BatchNorm layer normalises by its batch.

    In train mode all do, in eval mode those that keep no running statistics.
    """
    return any(normalises_by_batch(layer, train_mode) for layer in batchnorm_layers(model))


def normalises_by_batch(layer: nn.Module, train_mode: bool) -> bool:
    """Tell whether one BatchNorm layer does, by the rule of torch's own forward pass."""
    return train_mode or (layer.running_mean is None and layer.running_var is None)


def uses_learned_statistics(model: nn.Module, train_mode: bool) -> bool:
    """Tell whether some BatchNorm layer normalises by running statistics that images have made.

    Those are others than mean 0 and variance 1, with which a layer is built.
    """
    return any(
        not normalises_by_batch(layer, train_mode)
        and bool((layer.running_mean != 0).any() or (layer.running_var != 1).any())
        for layer in batchnorm_layers(model)
    )


def set_statistics(layer: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Let a BatchNorm layer normalise by copies of this mean and variance, (C,), in eval mode.

    It is changed in place, also where it kept no running statistics.
    """
    layer.register_buffer("running_mean", mean.detach().clone())
    layer.register_buffer("running_var", var.detach().clone())


def _group_norm(layer: nn.Module) -> nn.GroupNorm:
    """Make the GroupNorm (Wu & He, 2018) for a BatchNorm layer: 32 groups of two channels or more.

    Fewer groups where the channels do not divide so. Scale and shift are copied from the layer, as
    far as it has them, with their type and device; its running statistics are lost.
    """
    channels = layer.num_features
    groups = math.gcd(32, channels // 2) if channels % 2 == 0 else 1
    new = nn.GroupNorm(groups, channels, eps=layer.eps, affine=False)
    new.affine = layer.affine
    for name in ("weight", "bias"):
        own = getattr(layer, name)
        if own is not None:
            own = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
        new.register_parameter(name, own)
    return new.train(layer.training)


#: `--replace-bn`: name → function that makes the layer to put in a BatchNorm's place.
BATCHNORM_REPLACEMENTS = {"groupnorm": _group_norm}


def replace_batchnorm(model: nn.Module, replacement: str) -> int:
    """Replace every BatchNorm layer by one of BATCHNORM_REPLACEMENTS; return how many there were.

    In such a model samples do not depend on one another, so each has a gradient of its own.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, BATCHNORM_TYPES)]
    for name in names:
        layer = BATCHNORM_REPLACEMENTS[replacement](model.get_submodule(name))
        model.set_submodule(name, layer)
    return len(names)


def batch_moments(x: Tensor, shard: Shard = ALONE) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance per channel of a layer's input `x` (B, C, ...): (C,) each.

    With several processes, each holding its part of the batch (possibly none of it), the result is
    that of the whole batch, differentiable any number of times, by one collective. The parts'
    means and centred squares are merged (Chan et al., 1979), so nothing cancels.
    """
    dims = [0, *range(2, x.dim())]
    if shard.size == 1:
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var
    count = x.new_full((1,), x.numel() // x.shape[1])
    mean = x.sum(dims) / count.clamp(min=1)
    squares = (x - per_channel(mean, x)).square().sum(dims)
    own = torch.cat([mean, squares, count])
    others = torch.zeros_like(own)
    rows = torch.stack([own if rank == shard.rank else others for rank in range(shard.size)])
    means, squares, counts = differentiable_sum(rows, shard).split([len(mean), len(mean), 1], 1)
    counts = counts.detach()
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0) / total


def require_spread(count: int) -> None:
    """Raise ValueError, as torch's own layers do, where a batch has one value per channel."""
    if count == 1:
        raise ValueError("Expected more than 1 value per channel when training")


def moments_of_uses(found: Sequence[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Return the moments of every layer's one use in a forward pass, of the lists of all uses.

    Raises ValueError for a layer that was used twice, or never: it has no statistics of its own.
    """
    if any(len(uses) > 1 for uses in found):
        raise ValueError("a BatchNorm layer is used twice in one forward pass")
    if not all(found):
        raise ValueError("a BatchNorm layer takes no part in the forward pass")
    return [uses[0] for uses in found]


class _Moments:
    """Records the moments of every BatchNorm layer's input in one forward pass, by hooks."""

    def __init__(self, model: nn.Module, shard: Shard):
        self.layers, self.shard = batchnorm_layers(model), shard
        self._found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {
            layer: [] for layer in self.layers
        }

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the moments of the layer's last use."""
        return self._found[layer][-1]

    def _record(self, layer, args):
        self._found[layer].append(batch_moments(args[0], self.shard))

    def __call__(self) -> list[tuple[Tensor, Tensor]]:
        return moments_of_uses([self._found[layer] for layer in self.layers])

    def __enter__(self):
        self._handles = [layer.register_forward_pre_hook(self._record) for layer in self.layers]
        return self

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()


def recorded_moments(model: nn.Module, shard: Shard = ALONE) -> _Moments:
    """Make a context that records `batch_moments` of the input of every BatchNorm layer.

    It yields a function that returns the (mean, var) pairs of the forward pass, in the order of
    `batchnorm_layers`; they are on the graph of that pass. The function raises ValueError for a
    layer that the pass used never or twice: such a layer has no statistics of its own.
    """
    return _Moments(model, shard)


@contextmanager
def whole_batch_normalisation(
    model: nn.Module, shard: Shard, *, truncated: bool = False, images: int | None = None
):
    """Within this context BatchNorm normalises by the whole batch's statistics.

    This concerns BatchNorm in train mode, and in eval mode where a layer keeps no running
    statistics; other layers in eval mode work as ever. Every process passes its part of the batch
    through its copy of the model. Outputs and all derivatives are those of one process with the
    whole batch. truncated: use the second derivative of the original attack
    (`truncated_derivative`). images: number of images in the whole batch, where this process has a
    part of it. Yields what `recorded_moments` does.

    Raises ValueError, as torch's own layers do, for one value per channel: it has no spread.
    """
    moments = recorded_moments(model, shard)

    def replaced(layer):
        def forward(x):
            if not normalises_by_batch(layer, layer.training):
                return type(layer).forward(layer, x)
            mean, var = moments.of(layer)
            require_spread((len(x) if images is None else images) * math.prod(x.shape[2:]))
            if truncated:
                options = (mean.detach(), var.detach(), layer.eps, shard)
                return _TruncatedBatchNorm.apply(x, layer.weight, layer.bias, *options)
            scale = (var + layer.eps).rsqrt()
            if layer.weight is not None:
                scale = scale * layer.weight
            centred, scale = x - per_channel(mean, x), per_channel(scale, x)
            if layer.bias is None:
                return centred * scale
            return torch.addcmul(per_channel(layer.bias, x), centred, scale)

        return forward

    with moments:
        try:
            for layer in moments.layers:
                layer.forward = replaced(layer)
            yield moments
        finally:
            for layer in moments.layers:
                del layer.forward


def batch_statistics(
    model: nn.Module,
    shard: Shard = ALONE,
    *,
    train_mode: bool,
    needed: bool,
    truncated: bool = False,
    images: int | None = None,
):
    """Make the context for taking the gradient of a batch that may be spread over processes.

    It is the simplest that suffices: `whole_batch_normalisation` where BatchNorm uses batch
    statistics and must see the whole batch or have the truncated derivative, `recorded_moments`
    where the moments are `needed`, else an empty context. images: number of images in the whole
    batch.
    """
    if (shard.size > 1 or truncated) and uses_batch_statistics(model, train_mode):
        return whole_batch_normalisation(model, shard, truncated=truncated, images=images)
    return recorded_moments(model, shard) if needed else nullcontext()


@contextmanager
def truncated_derivative(model: nn.Module):
    """Within this context batch statistics have the original attack's second derivative.

    The original replaced every BatchNorm by apex's SyncBatchNorm, whose Python backward pass
    works on saved copies of the input and of the batch statistics that autograd does not
    follow. Outputs and gradients (first derivatives) are unchanged; what is differentiated
    twice is not exact. For comparison only.
    """
    with whole_batch_normalisation(model, ALONE, truncated=True):
        yield


def running_moments(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy the running (mean, var) of every BatchNorm layer.

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
    def forward(ctx, x, weight, bias, mean, var, eps, shard):
        scale = (var + eps).rsqrt()
        normed = (x - per_channel(mean, x)) * per_channel(scale, x)
        ctx.save_for_backward(normed, scale, weight)
        ctx.shard, ctx.has_bias = shard, bias is not None
        # a copy: an in-place layer behind must not change what is saved
        output = normed.clone() if weight is None else normed * per_channel(weight, x)
        return output if bias is None else output + per_channel(bias, x)

    @staticmethod
    def backward(ctx, cotangent):
        normed, scale, weight = ctx.saved_tensors
        dims = [0, *range(2, normed.dim())]
        d_weight = d_bias = None
        d_normed = cotangent
        if ctx.has_bias:
            d_bias = cotangent.sum(dims)
        if weight is not None:
            d_weight = (cotangent * normed).sum(dims)
            d_normed = cotangent * per_channel(weight, normed)
        sums = torch.stack([d_normed.sum(dims), (d_normed * normed).sum(dims)])
        count = ctx.shard.sum(normed.new_full((1,), normed.numel() // normed.shape[1]))
        means = differentiable_sum(sums, ctx.shard) / count
        d_x = per_channel(scale, normed) * (
            d_normed - per_channel(means[0], normed) - normed * per_channel(means[1], normed)
        )
        return d_x, d_weight, d_bias, None, None, None, None


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return `values` (C,) in a shape that multiplies a layer's input `x` (B, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
