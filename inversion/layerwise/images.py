"""Makes images of what the walk recovered, by the best means that it allows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Size, Tensor, fx, nn

from inversion.layerwise.decoder import (
    Decoder,
    augmented,
    decode,
    linear_decoder,
    mean_decoding,
)
from inversion.layerwise.front import Front, statistics_of
from inversion.layerwise.kinds import AVERAGES, MAXIMA, StoppedError, geometry_of
from inversion.layerwise.matching import Matched, Matching, match_activations
from inversion.layerwise.network import Network
from inversion.layerwise.operations import pooling_sides
from inversion.layerwise.peeled import SIGNALS, Peeled
from inversion.layerwise.smooth_matching import SmoothMatching, match_smoothly, whitening
from inversion.layerwise.stages import note, same_kind
from inversion.layerwise.stem.posterior import Stem, stem_posterior
from inversion.layerwise.stem.windows import Pooling
from models.graph import operation_name
from models.target import Target
from utils.journal import FORGETFUL, Journal, reading

#: Penalty of the decoder, in shares of the mean square of its features.
RIDGE = 0.1
#: Public photographs that the decoder learns from.
PUBLIC_IMAGES = 600
#: Numbers per number of the image from which activations are matched; fewer say too little.
WORTH_MATCHING = 0.1
#: The same where no pooling lies before, from which images are matched without a prior.
NO_PRIOR = 0.25
#: The least relative error of recovered pooled values that the stem allows for.
POOLED_ERROR = 1e-6
#: Where the activations may determine the image, where a pooling has lost pixels, and where they
#: say too little.
WHOLE, SMOOTH = Matching(120, 0.1, 300), SmoothMatching(300, 0.1, 2.4)
#: First rate of SMOOTH where there are at least as many activations as numbers of the image.
LARGE_RATE = 0.2
UNMATCHED = Matching(0, 0.0, 0)
#: Relative distance of activations from which an image was not matched: the decoder's own images
#: come nearer, where images can be matched at all.
FAILED = 0.5
#: Public photographs that tell how activations vary.
VARIED_IMAGES = 64
#: Operations of a stem that is solved, from the pooling to the convolution on the image.
STEMS = (
    ["maxpool2d", "relu", "batchnorm2d", "conv2d"],
    ["maxpool2d", "relu", "conv2d"],
)
#: How images may have been made: the image itself, from pooled values, by matching, by a decoder of
#: certified activations or of uncertified ones, or of nothing.
METHODS = ("solved", "stem", "activations", "decoded", "decoder", "nothing")


@dataclass(frozen=True)
class Made:
    """Holds images and what they were made of."""

    #: (B, C, H, W), normalised.
    images: Tensor
    #: One of METHODS.
    method: str
    #: Names of the recovered tensors that the images were made of.
    sources: tuple[str, ...] = ()
    #: (B,) relative distance of the images' own activations from the recovered ones; None where
    #: there are none, or no others.
    residual: Tensor | None = None
    #: (B, C, H, W) of the decoder alone on the public mean: a control that saw nothing.
    decoder_only: Tensor | None = None


def make_images(
    model: nn.Module,
    target: Target,
    peeled: Peeled,
    public: Tensor,
    *,
    seed: int,
    should_stop: Callable[[], bool],
    journal: Journal = FORGETFUL,
) -> Made:
    """Make images of the deepest certified tensors, or of the head's features where there are none.

    public: (M, C, H, W) normalised photographs that the decoder learns from. seed: of its
    augmentation. should_stop: asked between steps; true ends with the best images until then.
    journal: where every stage is saved on its way, and from where a killed one goes on.

    Raises StateError where what the journal recalls does not fit.
    """
    if (saved := journal.recall("images")) is not None:
        return _made_from(saved, target, peeled)
    stopped = False

    def stop() -> bool:
        nonlocal stopped
        stopped = stopped or should_stop()
        return stopped

    made = _make(model, target, peeled, public, seed, stop, journal)
    if not stopped:
        note(journal, "images", vars(made) | {"sources": list(made.sources)})
        if journal.due():
            journal.save()
    return made


def _make(
    model: nn.Module,
    target: Target,
    peeled: Peeled,
    public: Tensor,
    seed: int,
    should_stop: Callable[[], bool],
    journal: Journal,
) -> Made:
    network, tensors = peeled.network, peeled.tensors()
    image, deepest = network.nodes[0], peeled.frontier()
    if image in deepest:
        return Made(network.values[image], "solved", (image.name,))
    if not tensors:
        mean = public.double().mean(0).expand(target.batch_size, -1, -1, -1)
        return Made(mean, "nothing", decoder_only=mean)
    names = tuple(node.name for node in deepest) or (next(iter(tensors)),)
    front = Front(model, names, statistics_of(target, model))
    start, alone = _decoded(front, names[0], tensors[names[0]], target, public, seed, journal)
    if not deepest:
        return Made(start, "decoder", names, None, alone)
    certificate = next(
        layer for layer in peeled.layers if layer.name == names[0] and layer.kind not in SIGNALS
    )
    error = certificate.expected_error or 0.0
    stem = _solved_stem(network, deepest[0], error, target, should_stop, journal)
    if stem is not None:
        return Made(stem.images, "stem", names[:1], stem.residual, alone)
    targets, box = {name: tensors[name] for name in names}, target.box
    first = match_activations(front, targets, *box, start, UNMATCHED)
    share = sum(value[0].numel() for value in targets.values()) / start[0].numel()
    if share < WORTH_MATCHING:
        return Made(first.images, "decoded", names, first.residual, alone)
    if share < NO_PRIOR or _pools_before(network, deepest[0]):
        found = _matched_smoothly(front, targets, target, start, public, seed, should_stop, journal)
    else:
        found = match_activations(
            front, targets, *box, start, WHOLE, should_stop=should_stop, journal=journal
        )
    failed = found.residual >= FAILED  # noise, where the decoder gives shapes
    images = torch.where(failed[:, None, None, None], first.images, found.images)
    residual = torch.where(failed, first.residual, found.residual)
    return Made(images, "decoded" if bool(failed.all()) else "activations", names, residual, alone)


def decoded(
    model: nn.Module, target: Target, name: str, activations: Tensor, public: Tensor
) -> Tensor:
    """Return the images (B, C, H, W), normalised, that a decoder makes of one recovered tensor.

    name, activations: its name in the traced network, and its values. public: (M, C, H, W)
    normalised photographs that the decoder learns from.
    """
    front = Front(model, [name], statistics_of(target, model))
    return decode(_decoder(front, name, target, public, seed=0), activations)


def _made_from(saved: Any, target: Target, peeled: Peeled) -> Made:
    """Read back images that were made, and what they were made of; raise StateError."""
    with reading("the images of the layerwise attack"):
        like = peeled.network.empty(peeled.network.nodes[0])
        names, alone, residual = tuple(saved["sources"]), saved["decoder_only"], saved["residual"]
        known = {node.name for node in peeled.network.values}
        if saved["method"] not in METHODS or not known.issuperset(names):
            raise ValueError("of another method or other sources")
        return Made(
            same_kind(saved["images"], like),
            str(saved["method"]),
            names,
            None if residual is None else same_kind(residual, like, Size([target.batch_size])),
            None if alone is None else same_kind(alone, like),
        )


def _decoded(
    front: Front,
    name: str,
    activations: Tensor,
    target: Target,
    public: Tensor,
    seed: int,
    journal: Journal,
) -> tuple[Tensor, Tensor]:
    """Return what a decoder makes of activations, and what it makes of the public mean alone."""
    if (saved := journal.recall("decoded")) is not None:
        with reading("the decoded images"):
            shape = Size([target.batch_size, *target.image_shape])
            start, alone = (same_kind(t, activations, shape) for t in saved["images"])
            return start, alone
    decoder = _decoder(front, name, target, public, seed)
    start, alone = decode(decoder, activations), mean_decoding(decoder, target.batch_size)
    note(journal, "decoded", {"images": [start, alone]})
    return start, alone


def _decoder(front: Front, name: str, target: Target, public: Tensor, seed: int) -> Decoder:
    generator = Generator().manual_seed(seed)
    return linear_decoder(front, name, *target.box, public, ridge=RIDGE, generator=generator)


def _matched_smoothly(
    front: Front,
    targets: dict[str, Tensor],
    target: Target,
    start: Tensor,
    public: Tensor,
    seed: int,
    should_stop: Callable[[], bool],
    journal: Journal,
) -> Matched:
    """Match activations, weighted as they vary among public photographs."""
    generator = Generator().manual_seed(seed)
    enough = sum(value[0].numel() for value in targets.values()) >= start[0].numel()
    how = replace(SMOOTH, rate=LARGE_RATE) if enough else SMOOTH
    varied = augmented(public[:VARIED_IMAGES], *target.box, generator)
    return match_smoothly(
        front, targets, *target.box, start, whitening(front, varied), how,
        should_stop=should_stop, journal=journal,
    )  # fmt: skip


def _pools_before(network: Network, node: fx.Node) -> bool:
    """Tell whether a pooling lies between the image and a tensor, itself included."""
    before = network.nodes[: network.nodes.index(node) + 1]
    return any(operation_name(earlier) in MAXIMA | AVERAGES for earlier in before)


def _solved_stem(
    network: Network,
    pool: fx.Node,
    error: float,
    target: Target,
    should_stop: Callable[[], bool],
    journal: Journal,
) -> Stem | None:
    """Solve image → convolution → BatchNorm → ReLU → max-pooling for the image, if it is so.

    error: relative error of the pooled values.
    """
    chain = [pool]
    while len(network.inputs(chain[-1])) == 1 and len(chain) <= max(map(len, STEMS)):
        chain.append(network.inputs(chain[-1])[0])
    kinds = [operation_name(node) for node in chain[:-1]]
    if chain[-1] is not network.nodes[0] or kinds not in STEMS:
        return None
    conv, sides = network.module(chain[-2]), pooling_sides(network, pool)
    if sides is None or any(rows != columns for rows, columns in sides):
        return None
    try:
        geometry = geometry_of(conv, str(chain[-2].target))
    except StoppedError:
        return None
    norm = chain[2] if "batchnorm2d" in kinds else None
    scale, shift = network.affine_behind(chain[-2], norm)
    low, high = (bound.double() for bound in target.box)
    return stem_posterior(
        network.values[pool], conv.weight, scale, shift, target.image_shape, conv=geometry,
        pool=Pooling(*(side[0] for side in sides)), low=low, high=high,
        error=max(POOLED_ERROR, error), should_stop=should_stop, journal=journal,
    )  # fmt: skip
