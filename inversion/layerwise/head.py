"""Recovers every image's features from the gradient of the classifier head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.layerwise.head_search import HeadGradient, search
from inversion.layerwise.least_squares import disturbed, least_norm

#: Rounds of the fixed point, and the change of a probability at which it has arrived.
ROUNDS, ARRIVED = 300, 1e-14
#: Rounds after which a step goes only half way: the plain fixed point may swing to and fro.
PLAIN_ROUNDS = 20
#: The least factor of a clipped image's gradient.
LEAST_SCALE = 1e-4
#: Share of the largest singular value below which a direction of the labels is lost.
LOST = 1e-9
#: Probabilities of the labels from which the search starts.
STARTS = (0.5, 0.9, 0.7, 0.97, 0.3, 0.99)
#: Squared batch size up to which it is tried: that many numbers are sought.
MOST_SEARCHED = 256


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
    #: Norm of what the features leave unexplained of the weights' gradient, or of the bias's,
    #: relative to that gradient: the larger of the two.
    residual: float
    #: Relative errors of the features and of the signal that the gradient's error causes; 0 where
    #: that is not asked.
    expected_error: float = 0.0
    signal_error: float = 0.0


def head_features(
    weight: Tensor,
    bias: Tensor | None,
    weight_gradient: Tensor,
    y: Tensor,
    label_smoothing: float = 0.0,
    *,
    bias_gradient: Tensor | None = None,
    clipped: bool = False,
    tolerance: float = 1e-9,
    error: float = 0.0,
) -> Head:
    """Solve the head's gradient for the features of every image.

    weight: (K, d), bias: (K,) or None, weight_gradient: (K, d) and bias_gradient: (K,) or None, of
    the batch's mean cross-entropy; y: (B,) labels; all float64. With P the probabilities and Y the
    (smoothed) labels as rows, ∂L/∂W = A F with A = (P − Y)ᵀ / B and P = softmax(F Wᵀ + b): A
    follows from F and F, by least squares, from A. The two are applied in turn until the
    probabilities stay. Where that leaves more than `tolerance` of the gradient, as where the
    network is sure of its labels, `search` looks for the solution instead.

    A client that clips multiplies each image's part by an unknown factor s ≤ 1 (the same for all,
    if it clips the batch). Where `clipped`, they follow from the bias's gradient, which is needed
    then, ∂L/∂b = A s, and A diag(s) takes the place of A. Elsewhere ∂L/∂b = A 1 tells a right
    solution from wrong ones.

    A has rank B for distinct labels and B ≤ K − 1 (the rows of P − Y sum to 0). Otherwise the
    features are those of the least norm, with a rank below B. A has B² unknowns, P (K − 1) B
    equations: without the bias's gradient there is one solution, as a rule, for B ≤ K − 2 alone.

    Labels y (B, K) are those of a binary cross-entropy. Then P = σ(F Wᵀ + b), A = (P − Y)ᵀ / (B K),
    the rows sum to anything, so that B ≤ K suffices, and the fixed point is all that is tried.

    error: the norm of the gradient's error, relative to the gradient's. What it makes of the
    features is found by solving once more, with random numbers of that norm added to the gradient
    (a parametric bootstrap; Efron & Tibshirani, 1993).
    """
    classes, count = len(weight), len(y)
    offset = weight.new_zeros(classes) if bias is None else bias
    if y.dim() == 2:
        given = HeadGradient(
            weight, offset, weight_gradient, bias_gradient, y.to(weight), binary=True
        )
        starts = [torch.sigmoid(offset).expand(count, classes)]
    else:
        labels = F.one_hot(y, classes).to(weight)
        smooth = (1 - label_smoothing) * labels + label_smoothing / classes
        given = HeadGradient(weight, offset, weight_gradient, bias_gradient, smooth)
        starts = [torch.softmax(offset, 0).expand(count, classes), *_starts(labels)]
    found = _solve(given, starts, clipped=clipped, tolerance=tolerance)
    if error == 0:
        return found
    other = _solve(_disturbed(given, error), [found.probabilities], clipped=clipped)
    features = (other.features - found.features).norm() / found.features.norm()
    signal = (other.signal - found.signal).norm() / found.signal.norm()
    return replace(found, expected_error=features.item(), signal_error=signal.item())


def _solve(
    given: HeadGradient, starts: Sequence[Tensor], *, clipped: bool, tolerance: float = 0.0
) -> Head:
    """Apply the fixed point from the first start, then search from all; return the best."""
    found = _fixed_point(given, starts[0], clipped=clipped)
    count = len(given.labels)
    if given.binary or clipped or count**2 > MOST_SEARCHED or found.rank < count:
        return found
    for start in starts:
        if found.residual <= tolerance:
            break
        other = _head(given, given.signal(search(given, start)))
        if other.residual < found.residual:
            found = other
    return found


def _starts(labels: Tensor) -> list[Tensor]:
    """Return probabilities (B, K) of networks that are more or less sure of these labels."""
    others = (1 - labels) / max(1, labels.shape[1] - 1)
    return [certainty * labels + (1 - certainty) * others for certainty in STARTS]


def _fixed_point(given: HeadGradient, start: Tensor, *, clipped: bool) -> Head:
    """Compute features from probabilities and these from the features, until neither changes."""
    probabilities = start
    for step in range(ROUNDS):
        signal = given.signal(probabilities)
        if clipped:
            assert given.of_bias is not None
            scales = least_norm(signal.T, given.of_bias[:, None])
            signal = signal * scales.clamp(LEAST_SCALE, 1)
        head = _head(given, signal)
        change = (head.probabilities - probabilities).abs().max()
        if change < ARRIVED:
            break
        half = (probabilities + head.probabilities) / 2
        probabilities = head.probabilities if step < PLAIN_ROUNDS else half
    return head


def _head(given: HeadGradient, signal: Tensor) -> Head:
    """Solve ∂L/∂W = signalᵀ F for the features F of the least norm."""
    left, values, right = torch.linalg.svd(signal.T, full_matrices=False)
    kept = (values > LOST * values[0]) & (values > 0)
    features = right[kept].T @ ((left[:, kept].T @ given.of_weight) / values[kept, None])
    condition = (values[0] / values[kept][-1]).item() if bool(kept.any()) else 1.0
    return Head(
        features, given.probabilities(features), signal, int(kept.sum()), condition,
        given.residual(signal, features),
    )  # fmt: skip


def _disturbed(given: HeadGradient, error: float) -> HeadGradient:
    """Add random numbers of this norm, relative to the gradient's, to the gradient."""
    generator = torch.Generator().manual_seed(0)
    of_bias = given.of_bias
    if of_bias is not None:
        of_bias = disturbed(of_bias, error, generator)
    return replace(given, of_weight=disturbed(given.of_weight, error, generator), of_bias=of_bias)
