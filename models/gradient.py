"""The one definition of "the gradient", used by the client and by the attacker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.batchnorm import (
    BATCHNORM_TYPES,
    batch_statistics,
    batchnorm_layers,
    uses_batch_statistics,
)
from models.losses import ClientLoss, mean_loss, output_problem
from utils.errors import is_out_of_memory
from utils.shard import ALONE, Shard, sum_tensors

#: Bytes that the per-sample gradients of one chunk may take.
CHUNK_BYTES = 2**29


@dataclass(frozen=True)
class Update:
    """Holds what a client computes for one batch and sends."""

    #: One tensor per trainable parameter, in the model's order, shaped like it.
    gradient: tuple[Tensor, ...]
    #: Mean of the whole batch at the input of every BatchNorm layer, (C_l,) each; None if not sent.
    bn_mean: tuple[Tensor, ...] | None = None
    #: Biased variance at the same places.
    bn_var: tuple[Tensor, ...] | None = None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Map names to the parameters that require a gradient, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def gradient_mode(model: nn.Module, train_mode: bool):
    """Put `model` into the state in which gradients are taken; restore it afterwards.

    Only BatchNorm follows `train_mode`: dropout and stochastic depth are off on both sides,
    since their random masks are not part of what a client sends. Running statistics are used
    in eval mode but never updated, so the model's buffers stay as they were. Attention runs
    on the kernel that has a second derivative everywhere, and so does hardsigmoid, rewritten by
    ReLU6.
    """
    modes = [(module, module.training) for module in model.modules()]
    layers = [module for module, _ in modes if isinstance(module, BATCHNORM_TYPES)]
    hard_sigmoids = [module for module, _ in modes if isinstance(module, nn.Hardsigmoid)]
    tracking = [layer.track_running_stats for layer in layers]
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers:
            layer.training = train_mode
            if train_mode:
                layer.track_running_stats = False
        for layer in hard_sigmoids:
            layer.forward = _hard_sigmoid
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, track in zip(layers, tracking, strict=True):
            layer.track_running_stats = track
        for layer in hard_sigmoids:
            del layer.forward


def forward_failure(
    model: nn.Module, x: Tensor, train_mode: bool, num_classes: int
) -> Exception | None:
    """Return why the network makes no logits of images `x` (B, C, H, W); None if it does.

    Two images suffice to find out: BatchNorm by batch statistics needs more than one value per
    channel. Only this forward pass is tried, so that a failure elsewhere keeps its traceback. An
    error for want of memory is raised.
    """
    try:
        with gradient_mode(model, train_mode), torch.no_grad():
            output = model(x[:2])
    except (RuntimeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        return error
    problem = output_problem(output, len(x[:2]), num_classes)
    return ValueError(problem) if problem else None


def kept_bytes(model: nn.Module, image_shape: tuple[int, int, int], train_mode: bool) -> int:
    """Return the bytes that a network's convolutions and linear layers make of two images.

    A backward pass keeps at least that. The forward pass is computed on shapes alone and takes no
    memory; 0 where the network cannot be computed so.
    """
    made = [0]

    def count(module, inputs, output):
        made[0] += output.numel() * output.element_size()

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    x = torch.empty(2, *image_shape, dtype=next(iter(state.values())).dtype, device="meta")
    try:
        with gradient_mode(model, train_mode), torch.no_grad():
            functional_call(model, shapes, (x,))
    except Exception:  # a user's network may do anything that shapes alone do not allow
        return 0
    finally:
        for hook in hooks:
            hook.remove()
    return made[0]


def _hard_sigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6


def batch_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: ClientLoss,
    *,
    create_graph: bool = False,
    total: int | None = None,
    added: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Compute the gradient of the batch's mean loss by the trainable parameters.

    x: (B, C, H, W) normalised images. y: (B,) class indices, or (B, K) for binary cross-entropy
    (`ClientLoss.kind`). Returns one tensor per trainable
    parameter, in the model's order, shaped like it; zeros where a parameter takes no part.
    create_graph: the result can be differentiated once more with respect to `x`. total: images of
    the whole batch where `x` is a part of it; the result is then this part's share, and the shares
    of all parts sum to the gradient. added: asked after the forward pass for what is added to the
    loss, or to the part's share of it (models/forced.py).
    """
    parameters = list(trainable_parameters(model).values())
    with gradient_mode(model, loss.train_mode), torch.enable_grad():
        value = mean_loss(model(x), y, loss, total)
        if added is not None:
            value = value + added()
        return torch.autograd.grad(
            value, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )


def whole_batch_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: ClientLoss,
    shard: Shard = ALONE,
    *,
    moments: bool = False,
) -> Update:
    """Compute what a client sends for the batch `x` (B, C, H, W) normalised with labels `y`.

    moments: also the mean and biased variance of the batch at the input of every BatchNorm layer,
    where the model has any. shard: several processes, each given the whole batch, compute their
    parts of it; all return the same. The model's modes and buffers are left as they were.
    """
    total = len(x) if shard.size > 1 else None
    moments = moments and bool(batchnorm_layers(model))
    pairs = []
    with batch_statistics(
        model, shard, train_mode=loss.train_mode, needed=moments, images=len(x)
    ) as recorded:
        share = batch_gradient(model, shard.split(x), shard.split(y), loss, total=total)
        if moments:
            pairs = recorded()
    gradient = sum_tensors(share, shard)
    if not moments:
        return Update(gradient)
    return Update(
        gradient,
        tuple(mean.detach() for mean, _ in pairs),
        tuple(var.detach() for _, var in pairs),
    )


def couples_samples(model: nn.Module, train_mode: bool) -> bool:
    """Tell whether a sample's output depends on the others of its batch.

    That is so where BatchNorm uses batch statistics: in train mode, or without running ones.
    """
    return uses_batch_statistics(model, train_mode)


def per_sample_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: ClientLoss,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[tuple[Tensor, ...]]:
    """Compute the gradient of every sample's own loss, chunk by chunk along the batch.

    x: (B, C, H, W) and y as in `batch_gradient`, which is the mean of these. A chunk is one
    tensor (n, *shape) per trainable parameter, for as many samples as `chunk_bytes` hold, one at
    least; computed by torch.func (vmap of grad). Nothing is on a graph.

    Raises ValueError where samples are coupled (`couples_samples`): a sample then has no gradient
    of its own.
    """
    if couples_samples(model, loss.train_mode):
        raise ValueError("BatchNorm by batch statistics couples the samples of a batch")
    parameters = {name: p.detach() for name, p in trainable_parameters(model).items()}

    def of_sample(values, image, label):
        logits = functional_call(model, values, (image[None],))
        return mean_loss(logits, label[None], loss)

    of_samples = vmap(grad(of_sample), in_dims=(None, 0, 0))
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    count = max(1, chunk_bytes // size)
    for start in range(0, len(x), count):
        part = slice(start, start + count)
        with gradient_mode(model, loss.train_mode):
            chunk = of_samples(parameters, x[part], y[part])
        yield tuple(chunk[name] for name in parameters)
