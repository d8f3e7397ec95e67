"""Collects what an attacker knows about the labels: the head's gradient, and public features."""

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from models.batchnorm import (
    batchnorm_layers,
    normalises_by_batch,
    set_statistics,
    uses_batch_statistics,
)
from models.build import find_head
from models.gradient import gradient_mode, trainable_parameters
from models.target import Target, rounding_error

#: Noise images that stand in where there is no public photograph.
NOISE_IMAGES = 32
#: Images that pass through the network at once where BatchNorm does not couple them.
CHUNK = 64


@dataclass(frozen=True)
class Auxiliary:
    """Holds labelled images of the attacker's own as the attacked network sees them; float64."""

    #: (N, d) inputs of the head.
    features: Tensor
    #: (N,) integers.
    labels: Tensor
    #: (N, c) spatial means at the input of the last BatchNorm layer, if bn_mean is to be used.
    bn_inputs: Tensor | None = None
    #: (c,) mean of the client's batch at that input, which it uploaded.
    bn_mean: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """Holds all that the label methods look at, in float64 on the CPU. No method changes it."""

    #: G (C, d), the gradient of the head's weight.
    weight_grad: Tensor
    #: g (C,), the gradient of the head's bias or a stand-in for it; None if the head has no bias.
    bias_grad: Tensor | None
    #: W (C, d), the head's weight.
    weight: Tensor
    #: b (C,), the head's bias; zeros if it has none.
    bias: Tensor
    #: B, the number of samples.
    batch_size: int
    #: ε in [0, 1) of the client's loss.
    label_smoothing: float = 0.0
    #: Standard deviation of the noise that the client added to every entry of the gradient.
    sigma: float = 0.0
    #: Clipping scaled the gradient down by a factor that is not known.
    clipped: bool = False
    #: The clipping factor that was divided out; None if none was.
    clip_factor: float | None = None
    #: Each sample's gradient was clipped separately, so the factors differ.
    clipped_per_sample: bool = False
    #: Relative rounding error of the gradient's entries.
    resolution: float = 2.0**-24
    #: (N, d) features of unlabelled public images at the attacked network's head.
    public: Tensor | None = None
    #: (M, d) features of noise images there, which stand in for public ones.
    noise: Tensor | None = None
    #: Labelled images, for the methods that need them.
    auxiliary: Auxiliary | None = None
    #: The inputs of the head are never negative.
    non_negative: bool = True
    #: Labels are known to be drawn evenly from all classes.
    uniform_labels: bool = False
    #: bias_grad was not sent: it is a stand-in, made by `counts.with_bias_gradient`.
    is_surrogate: bool = False
    #: Standard deviation of the noise in such a stand-in.
    surrogate_sigma: float = 0.0
    #: What the client's defence took from the head's gradient, in words; empty where nothing.
    defence: str = ""
    #: Only the signs of the entries are the gradient's.
    signs_only: bool = False

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return len(self.weight)

    @property
    def known_bias_grad(self) -> Tensor:
        """g or its stand-in (C,).

        Raises ValueError where there is neither; `counts.with_bias_gradient` adds a stand-in.
        """
        if self.bias_grad is None:
            raise ValueError("needs the gradient of the head's bias")
        return self.bias_grad

    @property
    def bias_sigma(self) -> float:
        """Standard deviation of the noise in every entry of bias_grad."""
        return self.surrogate_sigma if self.is_surrogate else self.sigma

    @cached_property
    def hard_bias_grad(self) -> Tensor:
        """(g + ε/C) / (1 − ε) = q / (1 − ε) − n / B (C,): g itself without label smoothing."""
        return (self.known_bias_grad + self.label_smoothing / self.num_classes) / (
            1 - self.label_smoothing
        )

    @cached_property
    def shared_embedding(self) -> Tensor:
        """h̄ = Gᵀg / gᵀg (d,): the features if all samples had the same; 0 where g = 0."""
        g = self.known_bias_grad
        square = g.square().sum()
        if not square > 0:
            return torch.zeros(self.weight.shape[1], dtype=torch.float64)
        return self.weight_grad.T @ g / square

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the head's softmax outputs (..., C) for features (..., d)."""
        return (features @ self.weight.T + self.bias).softmax(-1)

    def scaled(self, factor: float) -> "Evidence":
        """Return the evidence with gradient and noise divided by `factor`, a clipping factor."""
        return replace(
            self,
            weight_grad=self.weight_grad / factor,
            bias_grad=self.known_bias_grad / factor,
            sigma=self.sigma / factor,
            surrogate_sigma=self.surrogate_sigma / factor,
            clipped=False,
            clip_factor=factor,
        )


def gather_evidence(
    model: nn.Module,
    target: Target,
    *,
    public: Tensor | None = None,
    auxiliary: tuple[Tensor, Tensor] | None = None,
    use_uploaded_bn: bool = False,
    uniform_labels: bool = False,
) -> Evidence:
    """Collect what the target's gradient tells about its labels.

    model: the attacked network (`models.target.model_of`); it is left as it was. public:
    (N, C, H, W) normalised public images without labels; without them noise stands in. auxiliary:
    normalised images (N, C, H, W) and labels (N,) of the attacker's own. use_uploaded_bn: look at
    the auxiliary images through the batch statistics that the client uploaded. uniform_labels:
    labels are known to be drawn evenly from all classes.

    Raises ValueError where the label methods do not apply: no linear head, a head whose weight is
    not trained, or layers behind the head; also for use_uploaded_bn without uploaded statistics.
    """
    if use_uploaded_bn and target.bn_mean is None:
        raise ValueError("the client uploaded no BatchNorm statistics")
    name, head = _linear_head(model, target)
    gradients = dict(zip(trainable_parameters(model), target.gradient, strict=True))
    if f"{name}.weight" not in gradients:
        raise ValueError(f"the gradient of the head's weight {name}.weight was not sent")
    weight_grad = _double(gradients[f"{name}.weight"])
    bias_grad = gradients.get(f"{name}.bias")

    images = public
    if images is None:
        generator = Generator().manual_seed(0)
        images = torch.randn(NOISE_IMAGES, *target.image_shape, generator=generator)
    probe, _ = features_of(model, images, target.train_mode)
    seen = None
    if auxiliary is not None:
        seen = _auxiliary(model, target, auxiliary, use_uploaded_bn)

    protection = target.protection
    bias = head.bias if head.bias is not None else torch.zeros(len(head.weight))
    return Evidence(
        weight_grad=weight_grad,
        bias_grad=None if bias_grad is None else _double(bias_grad),
        weight=_double(head.weight),
        bias=_double(bias),
        batch_size=target.batch_size,
        label_smoothing=target.label_smoothing,
        sigma=_deviation(target, [gradients[f"{name}.weight"], bias_grad]),
        clipped=_was_clipped(target),
        clipped_per_sample=protection is not None and protection.mode == "per-sample",
        resolution=target.resolution or rounding_error([gradients[f"{name}.weight"]]),
        public=None if public is None else probe,
        noise=probe if public is None else None,
        auxiliary=seen,
        non_negative=bool((probe >= 0).all()),
        uniform_labels=uniform_labels,
        defence=_defence(target),
        signs_only=protection is not None and protection.mode == "sign",
    )


def _defence(target: Target) -> str:
    """Say what a defence took from the gradient that the label methods do not know."""
    how = target.protection
    if how is None:
        return ""
    if how.mode == "int8":
        return "the gradient was rounded to 8 bits, which counts as noise"
    if how.mode == "sign":
        return (
            "of the gradient only signs were sent: that a class occurs can be read, not how often"
        )
    if target.sent is None and how.largest is None:
        return ""
    cut = "" if how.largest is None else f" and the others cut to ±{how.largest:g}"
    return (
        f"entries of the gradient were left out{cut} ({how.mode}): the methods take them for 0, so "
        "counts are not to be relied on, nor that a class is absent"
    )


def _deviation(target: Target, of_head: list[Tensor | None]) -> float:
    """Return the standard deviation of noise in the head's gradient; rounding to 8 bits is noise.

    The larger one where weight and bias were rounded to different steps.
    """
    how = target.protection
    if how is None:
        return 0.0
    steps = [0.0]
    if how.mode == "int8":
        steps += [g.abs().max().item() / 127 for g in of_head if g is not None]
    return math.hypot(how.sigma, max(steps) / math.sqrt(12)) if max(steps) else how.sigma


def _linear_head(model: nn.Module, target: Target) -> tuple[str, nn.Linear]:
    """Return the classifier head and its name; raises ValueError if it is no linear layer."""
    name, head = find_head(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the classifier head {name} of {target.arch} is a {type(head).__name__}; labels are "
            "read off the gradient of a linear head that gives the logits"
        )
    return name, head


def features_of(model: nn.Module, images: Tensor, train_mode: bool) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of the classifier head, and those of the last BatchNorm layer.

    images: (N, C, H, W) normalised. Where BatchNorm uses batch statistics they pass as one
    batch. Returns (N, d), and of BatchNorm's inputs the spatial means (N, c), or None without
    BatchNorm; float64 on the CPU.

    Raises ValueError when the head's outputs are not the logits.
    """
    _, head = find_head(model)
    layers = batchnorm_layers(model)
    inputs, outputs, moments = [], [], []

    def see_head(_, args, output):
        inputs.append(args[0])
        outputs.append(output)

    def see_batchnorm(_, args):
        moments.append(args[0].flatten(2).mean(2) if args[0].dim() > 2 else args[0])

    handles = [head.register_forward_hook(see_head)]
    if layers:
        handles.append(layers[-1].register_forward_pre_hook(see_batchnorm))
    like = next(model.parameters())
    coupled = uses_batch_statistics(model, train_mode)
    try:
        with torch.no_grad(), gradient_mode(model, train_mode):
            for part in images.split(len(images) if coupled else CHUNK):
                logits = model(part.to(like))
                if logits.shape != outputs[-1].shape or not torch.equal(logits, outputs[-1]):
                    raise ValueError(
                        "layers follow the classifier head: its outputs are not the logits"
                    )
    finally:
        for handle in handles:
            handle.remove()
    return _double(torch.cat(inputs)), _double(torch.cat(moments)) if moments else None


def _auxiliary(
    model: nn.Module, target: Target, auxiliary: tuple[Tensor, Tensor], use_uploaded_bn: bool
) -> Auxiliary:
    """Look at the auxiliary images through the attacked network."""
    images, labels = auxiliary
    if not use_uploaded_bn:
        features, _ = features_of(model, images, target.train_mode)
        return Auxiliary(features, labels.long())
    assert target.bn_mean is not None
    assert target.bn_var is not None
    if uses_batch_statistics(model, target.train_mode):
        model = copy.deepcopy(model)
        layers = batchnorm_layers(model)
        like = next(model.parameters())
        for layer, mean, var in zip(layers, target.bn_mean, target.bn_var, strict=True):
            if normalises_by_batch(layer, target.train_mode):
                # the client's statistics in place of the auxiliary batch's
                set_statistics(layer, mean.to(like), var.to(like))
    features, bn_inputs = features_of(model, images, train_mode=False)
    return Auxiliary(features, labels.long(), bn_inputs, _double(target.bn_mean[-1]))


def _double(values: Tensor) -> Tensor:
    return values.detach().double().cpu()


def _was_clipped(target: Target) -> bool:
    """Return whether clipping may have scaled the gradient down: its norm then equals the bound.

    With noise the answer is true unless the norm lies three standard deviations below the bound.
    """
    protection = target.protection
    if protection is None or protection.clip is None:
        return False
    if protection.mode == "per-sample":
        return True
    square = sum(g.double().square().sum().item() for g in target.gradient)
    count, variance = sum(g.numel() for g in target.gradient), protection.sigma**2
    deviation = variance * math.sqrt(2 * count)
    return square - count * variance + 3 * deviation > (0.99 * protection.clip) ** 2
