"""Reconstructs images by solving the gradient layer by layer, instead of matching it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.front import statistics_of
from inversion.layerwise.images import make_images
from inversion.layerwise.layer import Layer
from inversion.layerwise.network import MAX_MEMORY, Network
from inversion.layerwise.peel import peel
from inversion.layerwise.trace import network_of
from models.gradient import trainable_parameters
from models.target import Target, rounding_error
from utils.journal import FORGETFUL, Journal, reading

#: The largest relative distance of an image's own activations from the recovered ones at which
#: these determine it.
NEAR = 0.25
#: Rounding to a type spreads evenly over one unit: its standard deviation in units.
UNIFORM = 12**-0.5
#: Steps from 0 to the largest magnitude of a tensor that was quantised to 8 bits.
INT8_STEPS = 127
#: Relative distance from the limit up to which an entry counts as cut to it.
CUT = 1e-6


@dataclass(frozen=True)
class Recovered:
    """Holds the images of a layerwise attack, what they were made of, and the certificate."""

    #: (B, C, H, W), normalised, inside the box.
    images: Tensor
    #: One of `images.METHODS`.
    method: str
    #: Names of the recovered tensors that the images were made of.
    sources: tuple[str, ...]
    #: (B,) relative distance of the images' own activations from the recovered ones; None without.
    residual: Tensor | None
    #: The certificate of every tensor, from the head on.
    layers: tuple[Layer, ...]
    #: Why the walk ended where it did.
    stopped: str
    #: Why it turned to convolutions that were attacked directly, a line each.
    detours: tuple[str, ...]
    #: (B,) labels that such a convolution gave, in the order of the images; None without one.
    labels: Tensor | None
    #: (B, C, H, W) of the decoder alone on the public mean: a control that saw nothing.
    decoder_only: Tensor | None
    #: Name → recovered tensors, in the order they were found.
    tensors: dict[str, Tensor] = field(repr=False)
    seconds: float = 0.0

    @property
    def certified(self) -> list[Layer]:
        """The layers that are certified."""
        return [layer for layer in self.layers if layer.certified]

    @property
    def determined(self) -> bool:
        """Whether the gradient determines the images.

        They were solved for; or what they were made of has at least as many numbers as they have,
        and they reproduce it up to NEAR.
        """
        return not self.shortfall

    @property
    def shortfall(self) -> str:
        """Say why the images are not determined; empty where they are."""
        if self.method == "solved":
            return ""
        numbers, size = 0, self.images[0].numel()
        if self.residual is not None:
            numbers = sum(self.tensors[name][0].numel() for name in self.sources)
        if self.residual is None or numbers < size:
            what = f"what is certified has {numbers} numbers per image, the images {size}"
        elif not self.residual.max() <= NEAR:
            what = (
                f"the images' own activations differ from the recovered ones by up to "
                f"{self.residual.max():.1e} of these, more than {NEAR:g}"
            )
        else:
            return ""
        return f"{what}; {self.stopped}"


def layerwise_attack(
    model: nn.Module,
    target: Target,
    y: Tensor,
    public: Tensor,
    *,
    on_layer: Callable[[Layer], None] = lambda layer: None,
    on_recalled: Callable[[Layer], None] = lambda layer: None,
    should_stop: Callable[[], bool] = lambda: False,
    seed: int = 0,
    max_memory: int = MAX_MEMORY,
    journal: Journal = FORGETFUL,
) -> Recovered:
    """Solve the gradient for the network's tensors and make images of the deepest certified ones.

    model: the attacked network. y: (B,) labels, or (B, K) of a binary cross-entropy; where the
    head's gradient does not determine the features that belong to class labels, labels are read
    from the gradient instead. public: (M, C, H, W)
    normalised photographs that are none of the client's, for the linear decoder. on_layer: called
    with every certificate; on_recalled: with those that an earlier process saved. should_stop:
    asked after every tensor, and while images are made; true ends with what there is.
    seed: of the decoder's augmentation. max_memory: bytes that a dense system may take. journal:
    where the attack is saved on its way, and from where a killed one goes on.

    Raises ValueError, in one line, where the network cannot be walked through or the batch
    statistics are missing; StateError where what the journal recalls does not fit the network.
    """
    start = time.perf_counter()
    network = target_network(model, target, max_memory)
    clipped = target.protection is not None and target.protection.clip is not None
    before = journal.recall("seconds")
    with reading("the time of the layerwise attack"):
        before = 0.0 if before is None else float(before)

    def seconds() -> float:
        return before + time.perf_counter() - start

    def told(layer: Layer) -> bool:
        on_layer(layer)
        return should_stop()

    journal.note("seconds", seconds, always=True)
    peeled = peel(
        network, y, label_smoothing=target.label_smoothing, clipped=clipped, on_layer=told,
        journal=journal, on_recalled=on_recalled,
    )  # fmt: skip
    made = make_images(
        model, target, peeled, public, seed=seed, should_stop=should_stop,
        journal=journal if peeled.ended else FORGETFUL,
    )  # fmt: skip
    taken = seconds()
    journal.note("seconds", lambda: taken)
    low, high = (bound.to(made.images) for bound in target.box)
    return Recovered(
        made.images.clamp(low, high), made.method, made.sources, made.residual,
        tuple(peeled.layers), peeled.stopped, tuple(peeled.detours), peeled.labels,
        made.decoder_only, peeled.tensors(), taken,
    )  # fmt: skip


def target_network(model: nn.Module, target: Target, max_memory: int = MAX_MEMORY) -> Network:
    """Trace the attacked network, with what the client sent.

    Raises ValueError, in one line, where the network cannot be walked through, the batch statistics
    are missing, or an update of several local steps was sent.
    """
    if target.local is not None:
        raise ValueError(
            f"an update of {target.local.steps} local steps was sent, and the layers' equations "
            "hold for one gradient"
        )
    if target.protection is not None and target.protection.mode == "sign":
        raise ValueError(
            "the client sent the signs of its gradient alone, from which no equation follows"
        )
    whole = whole_tensors(model, target)
    statistics = statistics_of(target, model)
    return network_of(
        model,
        target.batch_size,
        target.image_shape,
        whole,
        train_mode=target.train_mode,
        statistics=None if statistics is None else [*statistics.values()],
        accuracy=accuracies(model, target),
        max_memory=max_memory,
        partial=[name for name in trainable_parameters(model) if name not in whole],
    )


def whole_tensors(model: nn.Module, target: Target) -> dict[str, Tensor]:
    """Return the gradients of which every entry was sent, uncut, by the parameter's name.

    A tensor of a sparse update that lacks one entry takes no part in an equation.
    """
    names = list(trainable_parameters(model))
    keep = [True] * len(names)
    if target.sent is not None:
        keep = [bool(mask.all()) for mask in target.sent]
    largest = None if target.protection is None else target.protection.largest
    if largest is not None:  # entries at the limit may have been larger
        limit = (1 - CUT) * largest
        inside = (bool((g.abs() < limit).all()) for g in target.gradient)
        keep = [whole and uncut for whole, uncut in zip(keep, inside, strict=True)]
    rows = zip(names, target.gradient, keep, strict=True)
    return {name: g for name, g, whole in rows if whole}


def accuracies(model: nn.Module, target: Target) -> dict[str, Accuracy]:
    """Return how exact each parameter's gradient is, by the parameter's name.

    From the type of its numbers and, where the client recorded noise, from its deviation. Rounding
    to 8 bits counts as noise of 1/√12 of the tensor's step, as rounding to a narrow type does.
    """
    resolution = target.resolution or rounding_error(target.gradient)
    single = torch.finfo(torch.float32).eps
    sigma = 0.0 if target.protection is None else target.protection.sigma
    quantised = target.protection is not None and target.protection.mode == "int8"
    narrow = UNIFORM * resolution if resolution > single else 0.0
    found = {}
    for name, g in zip(trainable_parameters(model), target.gradient, strict=True):
        size = max(g.double().norm().item(), torch.finfo(torch.float64).tiny)
        step = g.abs().max().item() / INT8_STEPS if quantised and g.numel() else 0.0
        added = (
            (deviation * g.numel() ** 0.5 / size) ** 2 for deviation in (sigma, UNIFORM * step)
        )
        noise = (narrow**2 + sum(added)) ** 0.5
        found[name] = Accuracy(min(resolution, single), noise)
    return found
