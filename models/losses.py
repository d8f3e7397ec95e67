"""The losses of a client: softmax cross-entropy, and binary cross-entropy for every output."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClientLoss:
    """Says how the client takes its mean loss; both sides must agree."""

    #: Whether BatchNorm normalises by the batch's own statistics, else by its running ones.
    train_mode: bool
    #: Share ε in [0, 1) of every label that the loss moves evenly to all classes; 0 with "bce".
    label_smoothing: float = 0.0
    #: A name in LOSS_KINDS (models/choices.py). Labels of "cross-entropy" are (B,) class indices;
    #: those of "bce" are (B, K) numbers in [0, 1], one per output, and a binary head has K = 1.
    kind: str = "cross-entropy"


def _cross_entropy(logits: Tensor, y: Tensor, loss: ClientLoss, reduction: str) -> Tensor:
    return F.cross_entropy(logits, y, reduction=reduction, label_smoothing=loss.label_smoothing)


def _binary_cross_entropy(logits: Tensor, y: Tensor, loss: ClientLoss, reduction: str) -> Tensor:
    """Take each image's mean over the K outputs; they are averaged, summed or left as they are."""
    if reduction == "mean":
        return F.binary_cross_entropy_with_logits(logits, y.to(logits))
    values = F.binary_cross_entropy_with_logits(logits, y.to(logits), reduction="none").mean(1)
    return values if reduction == "none" else values.sum()


#: Name in LOSS_KINDS → function(logits (B, K), labels, loss, reduction).
LOSSES = {"cross-entropy": _cross_entropy, "bce": _binary_cross_entropy}


def mean_loss(logits: Tensor, y: Tensor, loss: ClientLoss, total: int | None = None) -> Tensor:
    """Return the batch's mean loss, or a part's share of it.

    logits: (B, K). y: labels as `loss.kind` has them. total: images of the whole batch where these
    are a part of it; the shares of all parts sum to the mean.
    """
    if total is None:
        return LOSSES[loss.kind](logits, y, loss, "mean")
    return LOSSES[loss.kind](logits, y, loss, "sum") / total


def image_losses(logits: Tensor, y: Tensor, loss: ClientLoss) -> Tensor:
    """Return every image's own loss, (B,); their mean is the batch's."""
    return LOSSES[loss.kind](logits, y, loss, "none")


def output_problem(output: object, count: int, num_classes: int) -> str:
    """Say why a network's output for `count` images has no classification loss; "" if it has.

    A loss needs one tensor of logits, (count, num_classes).
    """
    if not isinstance(output, Tensor):
        kind = f"a {type(output).__name__}"
        if isinstance(output, dict):
            kind += f" with {', '.join(map(str, output))}"
        elif isinstance(output, tuple | list):
            kind += f" of {len(output)}"
        return f"it returns {kind}, not one tensor of logits; return the logits alone"
    shape = tuple(output.shape)
    wanted = (count, num_classes)
    if shape == wanted:
        return ""
    found = f"its output for {count} images is {shape}, not the logits {wanted}"
    if len(shape) > 2:
        return f"{found}: a map, as of a segmentation, has no classification loss"
    if shape == (count,) and num_classes == 1:
        return f"{found}; do not squeeze the last dimension"
    if shape[:1] == (count,) and len(shape) == 2:
        return f"{found}: give it one output per class of the data"
    return found
