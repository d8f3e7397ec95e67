"""Compares what follows from a layer by the forward pass with the head's gradient."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from inversion.layerwise.accuracy import LARGEST, MOST_ERROR
from inversion.layerwise.kinds import StoppedError
from inversion.layerwise.least_squares import least_norm
from inversion.layerwise.network import Network
from models.graph import operation_name, place

#: Times what a tensor may leave of its gradient that features may leave of the head's: they hold
#: the errors of all tensors on the way.
FORWARD = 10.0
#: Half the width of the first grid on which the logarithms of the images' factors are sought, the
#: points of every grid, and the half width at which they are found.
WIDEST, GRID, ARRIVED = 12.0, 101, 1e-10


def head_part(
    network: Network, known: Mapping[fx.Node, Tensor], label_smoothing: float, *, free: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, float, float], Tensor]:
    """Return the part of an `Anchor` that concerns the head, and the factors (B, 1, 1, 1).

    With the features F from the forward pass, ∂L/∂W = Rᵀ F gives the signal R. It must be
    (softmax(F Wᵀ + b) − Y) / B, so that the largest entry of softmax(F Wᵀ + b) − B R per image is
    at the label. free: the images' factors are not known; labels are read from the least entry of
    R then, which is right where they are not smoothed or the network is not sure of them.
    """
    output = network.nodes[-1]
    name = str(output.target)
    if operation_name(output) != "linear" or f"{name}.weight" not in network.gradient:
        raise StoppedError(f"{place(output)}: the gradient of a linear head is needed")
    module, gradient = network.module(output), network.gradient[f"{name}.weight"]
    scale = gradient.new_ones(network.shape(output)[0], 1, 1, 1)
    features = _features(network, known)
    solved = least_norm(features.mT, gradient.mT)
    count = len(features)

    def probabilities(features: Tensor) -> Tensor:
        return torch.softmax(F.linear(features, module.weight, module.bias), 1)

    def smoothed(labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, len(gradient)).to(solved)
        return (1 - label_smoothing) * one_hot + label_smoothing / len(gradient)

    if free:
        labels = smoothed(solved.argmin(1))
        scale = _scale_by_probabilities(
            solved, features, lambda found: (probabilities(found) - labels) / count
        ).view(-1, 1, 1, 1)
        features = _features(network, {node: scale * value for node, value in known.items()})
        solved = least_norm(features.mT, gradient.mT)
    # the nearest label: an image that the network is sure of has no signal that tells
    labels = (solved - probabilities(features) / count).argmin(1)
    signal = (probabilities(features) - smoothed(labels)) / count
    mismatch = ((solved - signal).norm() / solved.norm()).item()
    residual = ((gradient - signal.mT @ features).norm() / gradient.norm()).item()
    allowed = min(LARGEST, FORWARD * network.accuracy[f"{name}.weight"].certified)
    if not (residual <= allowed and mismatch <= MOST_ERROR):
        raise StoppedError(f"{name}: its gradient does not bear the features out ({residual:.1e})")
    return (labels, features, signal, residual, mismatch), scale


def _features(network: Network, known: Mapping[fx.Node, Tensor]) -> Tensor:
    """Return the inputs (B, d) of the head that follow from known tensors."""
    (head,) = network.inputs(network.nodes[-1])
    features = replace(network, values=dict(known)).following().get(head)
    if features is None:
        raise StoppedError(f"{place(head)}: does not follow from what was solved")
    if not bool(features.isfinite().all()):
        raise StoppedError(f"{place(head)}: the images cannot be told apart")
    return features


def _scale_by_probabilities(
    solved: Tensor, features: Tensor, signal_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the factors a (B,) with solved = a · signal_of(a · features), row by row.

    So it is behind a homogeneous network, whose features have the images' factors. The a with the
    least distance is sought on ever finer grids of its logarithm.
    """
    best, width = solved.new_zeros(len(solved)), WIDEST
    while width > ARRIVED:
        tried = best + width * torch.linspace(-1, 1, GRID).to(solved)[:, None]
        apart = torch.stack(
            [
                (solved - a[:, None] * signal_of(a[:, None] * features)).norm(dim=1)
                for a in tried.exp()
            ]
        )
        best = tried.gather(0, torch.nan_to_num(apart, nan=torch.inf).argmin(0)[None])[0]
        width *= 4 / (GRID - 1)
    return best.exp()
