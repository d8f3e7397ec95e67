"""Solves for one tensor after the other, and certifies what was found."""

import math
import time
from dataclasses import replace

import torch
from torch import Tensor, fx

from inversion.layerwise.accuracy import CLEAR_NOISE, LARGEST, MOST_ERROR
from inversion.layerwise.anchor import Anchor
from inversion.layerwise.head import head_features
from inversion.layerwise.kinds import RELUS, StoppedError
from inversion.layerwise.layer import Layer
from inversion.layerwise.masks import rectify
from inversion.layerwise.network import Network
from inversion.layerwise.solve import solve_tensor
from models.graph import operation_name, place
from utils.errors import is_out_of_memory
from utils.matching import assign


def solve_head(
    network: Network, output: fx.Node, y: Tensor, label_smoothing: float, *, clipped: bool
) -> Layer:
    """Solve the head's gradient for the features of every image, and take them over.

    Raises StoppedError where the gradient cannot give them.
    """
    start = time.perf_counter()
    module, name = network.module(output), str(output.target)
    if f"{name}.weight" not in network.gradient:
        whole = network.whole_or_not(f"{name}.weight")
        raise StoppedError(f"{name}: the gradient of its weights was {whole}")
    of_weight, of_bias = (network.gradient.get(f"{name}.{part}") for part in ("weight", "bias"))
    assert of_weight is not None
    if not of_weight.any():
        raise StoppedError(f"{name}: the gradient of its weights is zero")
    count, classes = len(y), len(of_weight)
    if of_bias is None and count > classes - 2:
        raise StoppedError(
            f"{name}: without a bias, {count} images of {classes} classes leave several solutions"
        )
    if of_bias is None and clipped:
        raise StoppedError(f"{name}: without a bias, the factors of the clipping stay unknown")
    _allow_for_noise(network, of_weight, count)
    accuracy = network.accuracy[f"{name}.weight"]
    head = head_features(
        module.weight, module.bias, of_weight, y, label_smoothing, bias_gradient=of_bias,
        clipped=clipped, tolerance=accuracy.certified, error=accuracy.error,
    )  # fmt: skip
    (source,) = network.inputs(output)
    features, threshold = head.features, 0.0
    if network.rectified(source):
        kept = rectify(features)
        features, threshold = kept.value, kept.threshold
    network.take(source, head.features[..., None, None], features, threshold)
    network.signals[output] = head.signal
    network.signal_error = head.signal_error
    certified = head.rank == count and head.residual <= accuracy.certified
    return Layer(
        name=source.name, place=name, used_by=(name,), kind="head", unknowns=features.numel(),
        equations=of_weight.numel(), rank=head.rank * features.shape[1], condition=head.condition,
        residual=head.residual, expected_error=head.expected_error, flips=0,
        certified=certified and head.expected_error <= MOST_ERROR,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def _allow_for_noise(network: Network, gradient: Tensor, count: int) -> None:
    """Take for noise what the head's gradient (K, d) has beyond a rank of B = count.

    Without noise its rank is at most B, whatever the features, so a wrong fixed point leaves
    nothing there. K classes are K equations per feature, of which B directions fit anything.
    """
    classes = len(gradient)
    values = torch.linalg.svdvals(gradient)
    left = (values[count:].norm() / values.norm()).item()
    noise = left * math.sqrt(classes / max(1, classes - count))
    if noise > LARGEST:
        return
    for parameter, of in network.accuracy.items():
        if noise > CLEAR_NOISE * of.rounding:
            network.accuracy[parameter] = replace(of, noise=max(of.noise, noise))


def solve_node(network: Network, node: fx.Node) -> Layer:
    """Solve for one tensor and take over what was found, masks behind it included."""
    start = time.perf_counter()
    uses = network.uses(node)
    network.check_memory(uses, node)
    shape = [*network.shape(node), 1, 1][:4]
    known, value = network.known(node)
    near = {use.relu: network.raw[use.relu] for use in uses if use.relu and use.relu in network.raw}
    try:
        solved = solve_tensor(
            uses,
            shape,
            (known.reshape(shape), value.reshape(shape)),
            rectified=network.rectified(node),
            near=near,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        needed = network.memory_needed(uses, node)
        raise StoppedError(
            f"{node.name}: out of memory, its equations take about {needed / 2**20:,.0f} MiB; give "
            "a smaller --max-memory, or a machine with more"
        ) from error
    expected_error = math.hypot(solved.expected_error, network.signal_error)
    certified = solved.certified and expected_error <= MOST_ERROR
    if certified:  # before the tensor is taken over, from which values behind it would follow
        for relu, mask in solved.masks.items():
            network.correct(relu, mask)
    network.take(node, solved.raw, solved.value, solved.threshold)
    kind = "linear" if len(network.shape(node)) == 2 else "convolution"
    return Layer(
        name=node.name, place=place(node), used_by=tuple(use.name for use in uses), kind=kind,
        unknowns=solved.unknowns, equations=solved.equations, rank=solved.rank,
        condition=solved.condition, residual=solved.residual,
        expected_error=expected_error, flips=solved.flips, certified=certified,
        seconds=time.perf_counter() - start, rests_on_zeros=solved.rests_on_zeros,
    )  # fmt: skip


def start_at(network: Network, anchor: Anchor, seconds: float) -> list[Layer]:
    """Take over what a convolution's own gradient says, and certify it.

    The signal behind the convolution is set, from which all before it follow, and the features of
    the head, where they are not known. seconds: what the attack on the convolution took.
    """
    joint, name = anchor.joint, str(anchor.convolution.target)
    network.signals[joint] = anchor.signal
    users = network.users(joint)
    if len(users) == 1 and operation_name(users[0]) in RELUS:
        network.signals[users[0]] = anchor.signal  # what the ReLU lets through
        network.masks[users[0].name] = torch.ones_like(anchor.signal)
    # Zeros that were mistaken move the disturbed images alike; the head's gradient tells then.
    network.signal_error = math.hypot(anchor.signal_error, anchor.head_residual)
    gradient = network.gradient[f"{name}.weight"]
    numbers = network.empty(anchor.convolution).numel()
    split = Layer(
        name=joint.name, place=name, used_by=(name,), kind="shifts", unknowns=numbers,
        equations=gradient.numel(), rank=numbers, condition=1 / max(anchor.factors.gap[0], 1e-300),
        residual=anchor.factors.residual, expected_error=anchor.signal_error, flips=0,
        certified=anchor.signal_error <= MOST_ERROR,  # a larger residual is refused before
        seconds=seconds,
    )  # fmt: skip
    output = network.nodes[-1]
    (head,) = network.inputs(output)
    if head in network.values:
        return [split]
    network.values[head] = anchor.features
    of_head, name = network.gradient[f"{output.target}.weight"], str(output.target)
    forward = Layer(
        name=head.name, place=name, used_by=(name,), kind="forward",
        unknowns=anchor.features.numel(), equations=of_head.numel(), rank=anchor.features.numel(),
        condition=1.0, residual=anchor.head_residual, expected_error=anchor.mismatch, flips=0,
        certified=True,  # or the anchor would not have been taken
        seconds=0.0,
    )  # fmt: skip
    return [forward, split]


def in_order(anchor: Anchor, y: Tensor, features: Tensor | None) -> Anchor:
    """Return an anchor with the images in the order of the labels y (B,).

    features: (B, d) of the head where they are known; images go by them then. Where y are not the
    labels that the anchor found, images are in the order of their own labels.
    """
    if features is not None:
        return anchor.ordered(torch.tensor(assign(anchor.features, features)).to(y))
    order = anchor.labels.argsort(stable=True)
    if torch.equal(anchor.labels[order], y.sort().values):
        order = order[y.argsort(stable=True).argsort()]
    return anchor.ordered(order)
