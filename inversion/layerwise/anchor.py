"""Attacks one convolution directly: its gradient gives its inputs and signals, and then the labels.

A 3×3 convolution of stride 1 with no more numbers per channel, N = B·h·w, than channels gives both
factors of its weight gradient away (`inversion.layerwise.shift.factors`), and its inputs are not
negative, behind a ReLU. What is left open is one positive factor per image, and the order of the
images. No label, no head and nothing behind the layer is needed: the walk can start there, where
labels repeat or where something behind cannot be solved.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from inversion.layerwise.accuracy import LARGEST, MOST_ERROR
from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.convolution import Geometry
from inversion.layerwise.kinds import ADDITIONS, BATCHNORMS, RELUS, StoppedError, geometry_of
from inversion.layerwise.least_squares import disturbed, least_norm
from inversion.layerwise.masks import fitted_signals, rectify
from inversion.layerwise.network import Network
from inversion.layerwise.shift.factors import Factors, check_identified, shift_factors
from inversion.layerwise.shift.nonnegative import fitted_to_zeros, gauge_by_nonnegativity
from inversion.layerwise.solve import solve_tensor
from models.graph import operation_name, place

#: Share of the last singular value that counts which the next one may have.
CLEAR_GAP = 0.5
#: The most negative number that an image's inputs may have, in shares of its largest.
NEGATIVE = 1e-2
#: Times what a tensor may leave of its gradient that features may leave of the head's: they hold
#: the errors of all tensors on the way.
FORWARD = 10.0
#: Half the width of the first grid on which the logarithms of the images' factors are sought, the
#: points of every grid, and the half width at which they are found.
WIDEST, GRID, ARRIVED = 12.0, 101, 1e-10


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
        scale = _scale_by_means(trial, node, inputs)
        inputs, signals = inputs * scale, signals / scale
    trial.take(source, inputs, *_rectified(inputs))
    trial.signals[node] = signals
    scale, free = torch.ones_like(inputs[:, :1, :1, :1]), not network.train_mode
    below = _weighted_before(trial, source)
    if below is not None:
        (lower,) = trial.inputs(below)
        value = _solve_lower(trial, below, lower, coupled=network.train_mode)
        shift = _shift_before(trial, below, source)
        if free and bool(shift.any()):
            scale, free = _scale_by_shift(trial, below, source, value, shift), False
        trial.values[lower] = scale * value
    trial.values[source], trial.signals[node] = scale * trial.values[source], signals / scale
    signal = _climb(trial, way)
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
    if factors.residual > accuracy.certified:
        raise StoppedError(f"{name}: its factors leave {factors.residual:.1e} of its gradient")

    least, next_one = factors.gap
    if not next_one < CLEAR_GAP * least:
        raise StoppedError(f"{name}: its gradient has too small a rank to be split")

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


# The images' factors --------------------------------------------------------------------------


def _scale_by_means(network: Network, node: fx.Node, inputs: Tensor) -> Tensor:
    """Return the factors (B, 1, 1, 1) with which the outputs have the batch's means."""
    users = network.users(node)
    if len(users) != 1 or operation_name(users[0]) not in BATCHNORMS:
        raise StoppedError(f"{place(node)}: no BatchNorm says the means of its outputs")
    module = network.module(node)
    z = F.conv2d(inputs, module.weight, padding=1).mean((2, 3)) / len(inputs)
    mean = network.affine(users[0]).mean
    if module.bias is not None:
        mean = mean - module.bias
    return least_norm(z.mT, mean[:, None]).view(-1, 1, 1, 1)


def _weighted_before(network: Network, source: fx.Node) -> fx.Node | None:
    """Return the convolution that a tensor is made by, with a BatchNorm and a ReLU at most."""
    node = source
    while operation_name(node) in RELUS | BATCHNORMS:
        (node,) = network.inputs(node)
    return node if operation_name(node) == "conv2d" and len(network.users(node)) == 1 else None


def _solve_lower(network: Network, below: fx.Node, lower: fx.Node, *, coupled: bool) -> Tensor:
    """Solve the convolution before for its input (B, I, H, W).

    In eval mode by its gradient alone, since its outputs are known only up to the images' factors.
    """
    use = network.use(below)
    network.check_memory([use], lower)
    if not coupled:
        use = replace(use, known=torch.zeros_like(use.known))
    empty = network.empty(lower)
    near = {use.relu: network.raw[use.relu]} if use.relu in network.raw else {}
    solved = solve_tensor(
        [use], list(empty.shape), (empty, empty), rectified=network.rectified(lower), near=near
    )
    if use.relu in solved.masks:
        source = next(node for node in network.nodes if node.name == use.relu)
        network.values[source] = network.values[source] * solved.masks[use.relu]
    return solved.value


def _shift_before(network: Network, below: fx.Node, source: fx.Node) -> Tensor:
    """Return what the layers between a convolution and its output's ReLU add, (O,)."""
    module = network.module(below)
    shift = torch.zeros_like(module.weight[:, 0, 0, 0])
    if module.bias is not None:
        shift = shift + module.bias
    (behind,) = network.users(below)
    if operation_name(behind) in BATCHNORMS:
        norm = network.affine(behind)
        shift = norm.shift + norm.scale * shift
    return shift


def _scale_by_shift(
    network: Network, below: fx.Node, source: fx.Node, value: Tensor, shift: Tensor
) -> Tensor:
    """Return the factors a (B, 1, 1, 1) with a x = scale · w∗(a u) + shift wherever x > 0.

    x: the source's values, u: value; both up to the factors.
    """
    geometry = geometry_of(network.module(below), str(below.target))
    z = geometry.forward(value, network.module(below).weight)
    (behind,) = network.users(below)
    if operation_name(behind) in BATCHNORMS:
        z = z * per_channel(network.affine(behind).scale)
    x = network.values[source]
    on = (x > 0).to(x)
    left, right = ((x - z) * on).flatten(1), (per_channel(shift) * on).flatten(1)
    return ((left * right).sum(1) / left.square().sum(1)).view(-1, 1, 1, 1)


# What lies behind -----------------------------------------------------------------------------


def way_out(network: Network, node: fx.Node) -> list[fx.Node]:
    """Return the way from a convolution to the tensor through which all before it reaches the loss.

    Behind a convolution in a residual block that is the sum at the block's end. Raises StoppedError
    where the way holds other layers than convolutions, BatchNorm and ReLUs, or where the last of
    them before the sum is a ReLU: the signal at the sum is lost there where it is off.
    """
    bypassed, way = _bypassed(network, node), [node]
    while True:
        users = network.users(way[-1])
        if len(users) != 1:
            raise StoppedError(f"{place(way[-1])}: goes to several layers")
        name = operation_name(users[0])
        if name not in BATCHNORMS and not bypassed:
            return way
        masked = name in ADDITIONS and operation_name(way[-1]) in RELUS
        if masked or name not in {"conv2d"} | BATCHNORMS | RELUS | ADDITIONS:
            raise StoppedError(f"{place(users[0])}: the way past it is not known")
        way.append(users[0])
        if name in ADDITIONS:
            return way


def _climb(network: Network, way: list[fx.Node]) -> Tensor:
    """Return the signal at the end of the way from a convolution whose signal is known.

    Convolutions on the way have known inputs, so that their gradients give their signals.
    """
    signal, values = network.signals[way[0]], network.following()
    for node, behind in itertools.pairwise(way):
        if operation_name(behind) in BATCHNORMS:
            signal = network.batchnorm(behind).output_signal(signal, values[node])
        elif operation_name(behind) == "conv2d":
            signal = _fitted(network, behind, values[node])
    return signal


def _bypassed(network: Network, node: fx.Node) -> bool:
    """Tell whether tensors before a node reach the output past it, too."""
    before, todo = set(), [node]
    while todo:
        earlier = todo.pop()
        if earlier not in before:
            before.add(earlier)
            todo += network.inputs(earlier)
    return any(user not in before for earlier in before - {node} for user in network.users(earlier))


def _fitted(network: Network, node: fx.Node, value: Tensor) -> Tensor:
    """Return the signal (B, O, h, w) at a convolution's output from its input and gradient."""
    if f"{node.target}.weight" not in network.gradient:
        raise StoppedError(f"{node.target}: the gradient of its weights was not sent")
    geometry = geometry_of(network.module(node), str(node.target))
    count, channels, height, width = network.shape(node)
    gradient = network.gradient[f"{node.target}.weight"]
    if count * height * width > gradient[0].numel():
        raise StoppedError(f"{node.target}: has more positions than weights per channel")
    signal = fitted_signals(gradient, value, geometry)
    return signal.reshape(channels, count, height, width).transpose(0, 1)


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
