"""What the client computes and sends: the gradient, and its BatchNorm statistics if asked."""

from torch import Tensor, nn

from models.batchnorm import batch_statistics, batchnorm_layers
from models.gradient import batch_gradient
from models.target import Update
from utils.shard import ALONE, Shard, sum_tensors


def capture(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    train_mode: bool,
    label_smoothing: float = 0.0,
    capture_bn: bool = False,
    shard: Shard = ALONE,
) -> Update:
    """Compute what a client sends for the batch `x` (B, C, H, W) normalised, `y` (B,).

    The gradient is that of the mean cross-entropy (models/gradient.py), whose labels
    `label_smoothing` in [0, 1) smooths. `capture_bn` adds mean
    and biased variance of the batch at the input of every BatchNorm layer. The model's modes
    and buffers are left as they were. shard: several processes, each given the whole batch,
    compute their parts of it; all return the same.
    """
    options = {"train_mode": train_mode, "label_smoothing": label_smoothing}
    if shard.size > 1:
        options["total"] = len(x)
    capture_bn = capture_bn and bool(batchnorm_layers(model))
    pairs = []
    context = batch_statistics(
        model, shard, train_mode=train_mode, needed=capture_bn, images=len(x)
    )
    with context as moments:
        gradient = batch_gradient(model, shard.split(x), shard.split(y), **options)
        if capture_bn:
            pairs = moments()
    gradient = sum_tensors(gradient, shard)
    if not capture_bn:
        return Update(gradient)
    return Update(
        gradient,
        tuple(mean.detach() for mean, _ in pairs),
        tuple(var.detach() for _, var in pairs),
    )
