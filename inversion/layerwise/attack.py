"""Reconstructs images by solving the gradient layer by layer, instead of matching it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, fx, nn

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.decoder import Decoder, decode, linear_decoder, mean_decoding
from inversion.layerwise.front import Front, Matched, Statistics, match_activations
from inversion.layerwise.kinds import AVERAGES, MAXIMA, StoppedError, geometry_of
from inversion.layerwise.network import Network
from inversion.layerwise.operations import pooling_sides
from inversion.layerwise.peel import Layer, Peeled, peel
from inversion.layerwise.stem.grid_gaussian import Convolution
from inversion.layerwise.stem.posterior import stem_posterior
from inversion.layerwise.stem.windows import Pooling
from inversion.layerwise.trace import network_of
from models.batchnorm import BATCHNORM_TYPES
from models.gradient import trainable_parameters
from models.graph import operation_name
from models.target import Target, rounding_error

#: Penalty of the decoder, in shares of the mean square of its features.
RIDGE = 0.1
#: Public photographs that the decoder learns from.
PUBLIC_IMAGES = 600
#: Numbers per pixel from which activations are matched; fewer say too little, and take long.
WORTH_MATCHING = 0.25
#: The least relative error of recovered pooled values that the stem allows for.
POOLED_ERROR = 1e-6
#: Rounding to a type spreads evenly over one unit: its standard deviation in units.
UNIFORM = 12**-0.5


@dataclass(frozen=True)
class Matching:
    """Says how images are matched to activations."""

    adam_steps: int
    #: First rate of Adam.
    rate: float
    lbfgs_steps: int
    total_variation: float


#: Where no pooling lies before the activations, and where one has lost pixels.
WHOLE, POOLED = Matching(120, 0.1, 300, 0.0), Matching(800, 0.05, 0, 0.1)


@dataclass(frozen=True)
class Recovered:
    """Holds the images of a layerwise attack, what they were made of, and the certificate."""

    #: (B, C, H, W), normalised, inside the box.
    images: Tensor
    #: "solved" (the image itself), "stem", "activations" (matched), "decoded" (from
    #: certified activations), "decoder" (from uncertified ones) or "nothing".
    method: str
    #: Names of the recovered tensors that the images were made of.
    sources: tuple[str, ...]
    #: (B,) relative distance of the images' own activations from the recovered ones; None without.
    residual: Tensor | None
    #: The certificate of every tensor, from the head on.
    layers: tuple[Layer, ...]
    #: Why the walk ended where it did.
    stopped: str
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
        """Whether what was recovered has at least as many numbers as the images have."""
        if self.method in ("solved", "stem"):
            return True
        return self.method == "activations" and self._numbers >= self.images[0].numel()

    @property
    def shortfall(self) -> str:
        """Say why the images are not determined."""
        return (
            f"what is certified has {self._numbers} numbers per image, the images "
            f"{self.images[0].numel()}; {self.stopped}"
        )

    @property
    def _numbers(self) -> int:
        if self.method not in ("activations", "decoded"):
            return 0
        return sum(self.tensors[name][0].numel() for name in self.sources)


def layerwise_attack(
    model: nn.Module,
    target: Target,
    y: Tensor,
    public: Tensor,
    *,
    on_layer: Callable[[Layer], bool] = lambda layer: False,
    seed: int = 0,
) -> Recovered:
    """Solve the gradient for the network's tensors and make images of the deepest certified ones.

    model: the attacked network. y: (B,) labels. public: (M, C, H, W) normalised photographs that
    are none of the client's, for the linear decoder. on_layer: called with every certificate; true
    ends the walk. seed: of the decoder's augmentation.

    Raises ValueError, in one line, where the network cannot be walked through or the batch
    statistics are missing.
    """
    start = time.perf_counter()
    network = target_network(model, target)
    protected = target.protection is not None and target.protection.clip is not None
    peeled = peel(
        network, y, label_smoothing=target.label_smoothing, clipped=protected, on_layer=on_layer
    )
    maker = _Maker(model, network, peeled, target, public, seed)
    images, method, sources, residual, decoder_only = maker.images()
    low, high = (bound.to(images) for bound in target.box)
    return Recovered(
        images.clamp(low, high), method, sources, residual, tuple(peeled.layers), peeled.stopped,
        decoder_only, peeled.tensors(), time.perf_counter() - start,
    )  # fmt: skip


def target_network(model: nn.Module, target: Target) -> Network:
    """Trace the attacked network, with what the client sent.

    Raises ValueError, in one line, where the network cannot be walked through or the batch
    statistics are missing.
    """
    return network_of(
        model,
        target.batch_size,
        target.image_shape,
        dict(zip(trainable_parameters(model), target.gradient, strict=True)),
        train_mode=target.train_mode,
        statistics=_pairs(target),
        accuracy=accuracies(model, target),
    )


def _pairs(target: Target) -> list[tuple[Tensor, Tensor]] | None:
    if target.bn_mean is None or target.bn_var is None:
        return None
    return list(zip(target.bn_mean, target.bn_var, strict=True))


def accuracies(model: nn.Module, target: Target) -> dict[str, Accuracy]:
    """Return how exact each parameter's gradient is, by the parameter's name.

    From the type of its numbers and, where the client recorded noise, from its deviation.
    """
    resolution = target.resolution or rounding_error(target.gradient)
    single = torch.finfo(torch.float32).eps
    sigma = 0.0 if target.protection is None else target.protection.sigma
    narrow = UNIFORM * resolution if resolution > single else 0.0
    found = {}
    for name, g in zip(trainable_parameters(model), target.gradient, strict=True):
        size = max(g.double().norm().item(), torch.finfo(torch.float64).tiny)
        noise = (narrow**2 + (sigma * g.numel() ** 0.5 / size) ** 2) ** 0.5
        found[name] = Accuracy(min(resolution, single), noise)
    return found


def statistics_of(target: Target, model: nn.Module) -> Statistics | None:
    """Return the batch statistics of a client in train mode by module path, None otherwise."""
    pairs = _pairs(target)
    if not target.train_mode or pairs is None:
        return None
    paths = [path for path, m in model.named_modules() if isinstance(m, BATCHNORM_TYPES)]
    return dict(zip(paths, pairs, strict=True))


def decoded(
    model: nn.Module, target: Target, recovered: Recovered, name: str, public: Tensor, seed: int = 0
) -> Tensor:
    """Return the images (B, C, H, W), normalised, that a decoder makes of one recovered tensor.

    public: (M, C, H, W) normalised photographs that it learns from.
    """
    front = Front(model, [name], statistics_of(target, model))
    return decode(_decoder(front, name, target, public, seed), recovered.tensors[name])


def _decoder(front: Front, name: str, target: Target, public: Tensor, seed: int) -> Decoder:
    low, high = target.box
    generator = Generator().manual_seed(seed)
    return linear_decoder(front, name, low, high, public, ridge=RIDGE, generator=generator)


@dataclass(frozen=True)
class _Maker:
    """Makes images of what the walk recovered, by the best means that it allows."""

    model: nn.Module
    network: Network
    peeled: Peeled
    target: Target
    public: Tensor
    seed: int

    def images(self) -> tuple[Tensor, str, tuple[str, ...], Tensor | None, Tensor | None]:
        """Return images, method, sources, residuals, and what the decoder alone makes."""
        image = self.network.nodes[0]
        deepest = self.peeled.frontier()
        if image in deepest:
            return self.network.values[image], "solved", (image.name,), None, None
        if not deepest:
            return self._nothing()
        source = deepest[0]
        stem = self._stem(source)
        front = self._front([node.name for node in deepest])
        decoder = self._decoder(front, source.name)
        alone = mean_decoding(decoder, self.target.batch_size)
        names = tuple(node.name for node in deepest)
        if stem is not None:
            found = self._residual(front, stem)
            return stem, "stem", (source.name,), found, alone
        start = decode(decoder, self.network.values[source])
        numbers = sum(self.network.values[node][0].numel() for node in deepest)
        if numbers < WORTH_MATCHING * start[0].numel():
            return start, "decoded", names, self._residual(front, start), alone
        matched = self._match(front, deepest, start)
        return matched.images, "activations", names, matched.residual, alone

    def _nothing(self) -> tuple[Tensor, str, tuple[str, ...], Tensor | None, Tensor | None]:
        """Return the public mean, or what the uncertified features of the head decode to."""
        mean = self.public.double().mean(0).expand(self.target.batch_size, -1, -1, -1)
        if not self.peeled.layers:
            return mean, "nothing", (), None, mean
        name = self.peeled.layers[0].name
        decoder = self._decoder(self._front([name]), name)
        alone = mean_decoding(decoder, self.target.batch_size)
        return decode(decoder, self.peeled.tensors()[name]), "decoder", (name,), None, alone

    def _front(self, names: Sequence[str]) -> Front:
        return Front(self.model, names, statistics_of(self.target, self.model))

    def _decoder(self, front: Front, name: str) -> Decoder:
        return _decoder(front, name, self.target, self.public, self.seed)

    def _match(self, front: Front, nodes: Sequence[fx.Node], start: Tensor) -> Matched:
        low, high = self.target.box
        targets = {node.name: self.network.values[node] for node in nodes}
        how = POOLED if self._pools_before(nodes[0]) else WHOLE
        return match_activations(
            front, targets, low, high, start, adam_steps=how.adam_steps, rate=how.rate,
            lbfgs_steps=how.lbfgs_steps, total_variation=how.total_variation,
        )  # fmt: skip

    def _pools_before(self, node: fx.Node) -> bool:
        """Tell whether a pooling lies between the image and a tensor, itself included."""
        return any(
            operation_name(before) in MAXIMA | AVERAGES
            for before in self.network.nodes[: self.network.nodes.index(node) + 1]
        )

    def _residual(self, front: Front, images: Tensor) -> Tensor:
        """Return how far the images' own activations are from the recovered ones, (B,)."""
        squares, sizes = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for name, value in front(images).items():
                target = self.peeled.tensors()[name]
                squares = squares + (value - target).flatten(1).square().sum(1)
                sizes = sizes + target.flatten(1).square().sum(1)
        return (squares / sizes).sqrt()

    def _error_of(self, node: fx.Node) -> float:
        """Estimate the relative error of a recovered tensor by what it leaves of the gradient."""
        return next(layer.residual for layer in self.peeled.layers if layer.name == node.name)

    def _stem(self, pool: fx.Node) -> Tensor | None:
        """Solve image → convolution → BatchNorm → ReLU → max-pooling for the image, if it is so."""
        network, chain = self.network, [pool]
        while chain[-1] is not network.nodes[0]:
            sources = network.inputs(chain[-1])
            if len(sources) != 1 or len(chain) > 5:
                return None
            chain.append(sources[0])
        kinds = [operation_name(node) for node in chain[:-1]]
        if kinds not in (
            ["maxpool2d", "relu", "batchnorm2d", "conv2d"],
            ["maxpool2d", "relu", "conv2d"],
        ):
            return None
        layer, norm = chain[kinds.index("conv2d")], None
        conv = network.module(layer)
        try:
            geometry = geometry_of(conv, str(layer.target))
            if "batchnorm2d" in kinds:
                norm = network.batchnorm(chain[2])
        except StoppedError:
            return None
        sides = pooling_sides(network, pool)
        lengths = [geometry.kernel, geometry.stride, geometry.padding, *(sides or ())]
        if sides is None or any(rows != columns for rows, columns in lengths):
            return None
        scale = torch.ones_like(conv.weight[:, 0, 0, 0]) if norm is None else norm.scale
        shift = torch.zeros_like(scale) if norm is None else norm.shift
        if conv.bias is not None:
            shift = shift + scale * conv.bias
        low, high = (bound.double() for bound in self.target.box)
        found = stem_posterior(
            network.values[pool], conv.weight, scale, shift, self.target.image_shape,
            conv=Convolution(geometry.stride[0], geometry.padding[0]),
            pool=Pooling(*(side[0] for side in sides)),
            low=low, high=high, error=max(POOLED_ERROR, self._error_of(pool)),
        )  # fmt: skip
        return found.images
