"""Attacks one convolution directly: its gradient gives its inputs and signals, and then the labels.

A 3×3 convolution of stride 1 with no more numbers per channel, N = B·h·w, than channels gives both
factors of its weight gradient away (`inversion.layerwise.shift.factors`), and its inputs are not
negative, behind a ReLU. What is left open is one positive factor per image, and the order of the
images. No label, no head and nothing behind the layer is needed: the walk can start there, where
labels repeat or where something behind cannot be solved.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from inversion.layerwise.convolution import Geometry
from inversion.layerwise.forward_head import head_part
from inversion.layerwise.image_factors import (
    affine_before,
    scale_by_means,
    scale_by_shift,
    solve_lower,
    weighted_before,
)
from inversion.layerwise.kinds import StoppedError, geometry_of
from inversion.layerwise.least_squares import disturbed, least_norm
from inversion.layerwise.masks import rectify
from inversion.layerwise.network import Network
from inversion.layerwise.shift.factors import Factors, check_identified, shift_factors
from inversion.layerwise.shift.nonnegative import fitted_to_zeros, gauge_by_nonnegativity
from inversion.layerwise.way_out import climb, way_out
from models.graph import operation_name

#: Share of the last singular value that counts which the next one may have.
CLEAR_GAP = 0.5
#: The most negative number that an image's inputs may have, in shares of its largest.
NEGATIVE = 1e-2


@dataclass(frozen=True)
class Anchor:
    """Holds what a convolution's own gradient says about a batch, in any order of the images."""

    convolution: fx.Node
    #: The tensor behind it through which everything before it reaches the loss.
    joint: fx.Node
    #: (B, O, h, w), the derivative of the loss by that tensor.
    signal: Tensor
    #: (B,) labels, (B, d) inputs of the head and (B, K) derivatives of the loss by the logits.
    labels: Tensor
    features: Tensor
    head_signal: Tensor
    #: Norm of what the last two leave of the head's gradient, relative to it.
    head_residual: float
    #: Relative difference of `head_signal` and of what solves the head's gradient for it.
    mismatch: float
    #: How the convolution's gradient was split.
    factors: Factors
    #: Relative error of the signals that the gradient's error causes, by direction and size.
    signal_error: float

    def ordered(self, order: Tensor) -> "Anchor":
        """Return the same with the images in this order, (B,)."""
        return replace(
            self, signal=self.signal[order], labels=self.labels[order],
            features=self.features[order], head_signal=self.head_signal[order],
        )  # fmt: skip


def candidates(network: Network, before: int) -> Iterator[fx.Node]:
    """Yield the convolutions that can be attacked directly, from the head to the image.

    before: place in `network.nodes` before which they reach the rest of the network.
    """
    for node in reversed(network.nodes[:before]):
        if operation_name(node) != "conv2d" or f"{node.target}.weight" not in network.gradient:
            continue
        count, _, height, width = network.shape(node)
        gradient = network.gradient[f"{node.target}.weight"]
        try:
            geometry = geometry_of(network.module(node), str(node.target))
            check_identified(gradient, height, width, count, centred=network.train_mode)
            joint = way_out(network, node)[-1]
        except (StoppedError, ValueError):
            continue
        (source,) = network.inputs(node)
        fits = geometry == Geometry((3, 3), (1, 1), (1, 1)) and network.rectified(source)
        if fits and network.nodes.index(joint) < before:
            yield node


def anchored(network: Network, node: fx.Node, label_smoothing: float = 0.0) -> Anchor:
    """Attack the convolution of a node directly; what is known in `network` is not used.

    In train mode the batch's means at the convolution's output fix the images' factors. In eval
    mode the shift of the BatchNorm, or the bias, before its input does; where there is none, the
    network behind is homogeneous, and the probabilities do. All of it is done once more with random
    numbers of the gradient's error added, which tells the signals' error.

    Raises StoppedError where that gives nothing that the gradient of the head bears out.
    """
    generator, gradient = torch.Generator().manual_seed(0), {}
    for name, g in network.gradient.items():
        gradient[name] = disturbed(g, network.accuracy[name].error, generator)
    other = replace(network, gradient=gradient)
    factors, found, moved = _split(network, other, node)
    signal, head = _behind(network, node, found, label_smoothing)
    error = _difference(signal, _behind(other, node, moved, label_smoothing)[0])
    return Anchor(node, way_out(network, node)[-1], signal, *head, factors, error)


def _behind(
    network: Network, node: fx.Node, found: tuple[Tensor, Tensor], label_smoothing: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, float, float]]:
    """Return the signal at the end of the way out, and the part of an `Anchor` about the head.

    found: inputs (B, I, h, w) and signals (B, O, h, w) of the convolution, up to a factor per
    image.
    """
    trial = replace(network, values={}, signals={}, masks={}, raw={}, routes={})
    (source,), way, (inputs, signals) = network.inputs(node), way_out(network, node), found
    if network.train_mode:
        scale = scale_by_means(trial, node, inputs)
        inputs, signals = inputs * scale, signals / scale
    trial.take(source, inputs, *_rectified(inputs))
    trial.signals[node] = signals
    scale, free = torch.ones_like(inputs[:, :1, :1, :1]), not network.train_mode
    below = weighted_before(trial, source)
    if below is not None:
        (lower,) = trial.inputs(below)
        value = solve_lower(trial, below, lower, coupled=network.train_mode)
        affine = affine_before(trial, below)
        if free and bool(affine[1].any()):
            scale, free = scale_by_shift(trial, below, source, value, affine), False
        trial.values[lower] = scale * value
    trial.values[source], trial.signals[node] = scale * trial.values[source], signals / scale
    signal = climb(trial, way)
    head, scale = head_part(trial, trial.values, label_smoothing, free=free)
    return signal / scale, head


# The factors of the gradient ------------------------------------------------------------------


def _split(
    network: Network, disturbed_one: Network, node: fx.Node
) -> tuple[Factors, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Split a convolution's gradient, and a disturbed one, with images in the same order.

    Returns how the first was split, and of both the inputs (B, I, h, w) and signals (B, O, h, w)
    up to a factor per image.
    """
    name = str(node.target)
    gradient, accuracy = network.gradient[f"{name}.weight"], network.accuracy[f"{name}.weight"]
    count, _, height, width = network.shape(node)
    try:
        factors = shift_factors(gradient, height, width, count, centred=network.train_mode)
        if not factors.residual <= accuracy.certified:
            raise StoppedError(f"{name}: its factors leave {factors.residual:.1e} of its gradient")
        least, next_one = factors.gap
        if not next_one < CLEAR_GAP * least:
            raise StoppedError(f"{name}: its gradient has too small a rank to be split")
        gauge = gauge_by_nonnegativity(factors.inputs)
        other = shift_factors(
            disturbed_one.gradient[f"{name}.weight"], height, width, count,
            centred=network.train_mode,
        )  # fmt: skip
        towards = least_norm(factors.inputs.transpose(1, 2).flatten(0, 1),
                             other.inputs.transpose(1, 2).flatten(0, 1)).mT  # fmt: skip
        others = fitted_to_zeros(other.inputs, towards @ gauge)
    except torch.linalg.LinAlgError as error:
        raise StoppedError(f"{name}: its gradient cannot be split") from error

    def maps(t: Tensor) -> Tensor:  # (h·w, B, C)
        return t.permute(1, 2, 0).reshape(count, -1, height, width)

    def parts(split: Factors, gauge: Tensor) -> tuple[Tensor, Tensor]:
        inputs = maps(torch.linalg.solve(gauge, split.inputs))
        return inputs, maps((split.outputs @ gauge).permute(1, 2, 0))

    found = parts(factors, gauge)
    lowest, largest = found[0].flatten(1).amin(1), found[0].flatten(1).amax(1)
    if not bool((lowest > -NEGATIVE * largest).all()):
        raise StoppedError(f"{name}: its images cannot be told apart")
    return factors, found, parts(other, others)


def _difference(signals: Tensor, others: Tensor) -> float:
    """Return the root mean square over images of two batches' relative difference."""
    sizes = signals.flatten(1).norm(dim=1).clamp_min(1e-300)
    apart = (signals - others).flatten(1).norm(dim=1) / sizes
    return apart.square().mean().sqrt().item()


def _rectified(inputs: Tensor) -> tuple[Tensor, float]:
    """Return the outputs of a ReLU (B, I, h, w), each image with zeros of its own, and a threshold.

    The threshold is that of the image that scatters most.
    """
    kept = [rectify(image) for image in inputs]
    return torch.stack([image.value for image in kept]), max(image.threshold for image in kept)
