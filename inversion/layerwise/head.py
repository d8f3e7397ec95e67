"""Recovers every image's features from the gradient of the classifier head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rounds of the fixed point, and the change of a probability at which it has arrived.
ROUNDS, ARRIVED = 300, 1e-14
#: Rounds after which a step goes only half way: the plain fixed point may swing to and fro.
PLAIN_ROUNDS = 20
#: The least factor of a clipped image's gradient.
LEAST_SCALE = 1e-4
#: Share of the largest singular value below which a direction of the labels is lost.
LOST = 1e-9


@dataclass(frozen=True)
class Head:
    """Holds what the gradient of the head says about a batch."""

    #: (B, d) inputs of the head.
    features: Tensor
    #: (B, K) probabilities of the classes.
    probabilities: Tensor
    #: (B, K) derivative of the loss by the logits.
    signal: Tensor
    #: Rank of the signal, B where every image has its own direction.
    rank: int
    #: Largest singular value of the signal over its smallest.
    condition: float
    #: Norm of what the features leave unexplained of the gradient, relative to the gradient's.
    residual: float


def head_features(
    weight: Tensor,
    bias: Tensor | None,
    weight_gradient: Tensor,
    y: Tensor,
    label_smoothing: float = 0.0,
    scaled_by: Tensor | None = None,
) -> Head:
    """Solve the head's gradient for the features of every image.

    weight: (K, d), bias: (K,) or None, weight_gradient: (K, d), of the batch's mean cross-entropy;
    y: (B,) labels; all float64. With P the probabilities and Y the (smoothed) labels as rows,
    ∂L/∂W = A F with A = (P − Y)ᵀ / B and P = softmax(F Wᵀ + b): A follows from F and F, by least
    squares, from A. The two are applied in turn until the probabilities stay.

    A client that clips multiplies each image's part by an unknown factor s ≤ 1 (the same for all,
    if it clips the batch). Given `scaled_by`, the gradient (K,) of the head's bias, they follow
    from it, ∂L/∂b = A s, and A diag(s) takes the place of A.

    The features are unique where A has rank B, so for distinct labels and B ≤ K − 1 (the rows of
    P − Y sum to 0). Otherwise they are those of the least norm, with a rank below B.
    """
    classes, count = len(weight), len(y)
    labels = F.one_hot(y, classes).to(weight)
    labels = (1 - label_smoothing) * labels + label_smoothing / classes
    offset = weight.new_zeros(classes) if bias is None else bias
    probabilities = torch.softmax(offset, 0).expand(count, classes)
    for step in range(ROUNDS):
        signal = (probabilities - labels) / count
        if scaled_by is not None:
            scales = torch.linalg.lstsq(signal.T, scaled_by[:, None], driver="gelsd").solution
            signal = signal * scales.clamp(LEAST_SCALE, 1)
        left, values, right = torch.linalg.svd(signal.T, full_matrices=False)
        kept = values > LOST * values[0]
        features = right[kept].T @ ((left[:, kept].T @ weight_gradient) / values[kept, None])
        found = torch.softmax(features @ weight.T + offset, 1)
        change = (found - probabilities).abs().max()
        if change < ARRIVED:
            break
        probabilities = found if step < PLAIN_ROUNDS else (probabilities + found) / 2
    rank = int(kept.sum())
    residual = (signal.T @ features - weight_gradient).norm() / weight_gradient.norm()
    condition = (values[0] / values[kept][-1]).item()
    return Head(features, probabilities, signal, rank, condition, residual.item())
