"""What an attacker knows about the labels: the head's gradient, and features of public images."""

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from models.batchnorm import batchnorm_layers, normalises_by_batch, uses_batch_statistics
from models.build import find_head
from models.gradient import gradient_mode, trainable_parameters
from models.target import Target, rounding_error

#: Noise images that stand in where there is no public photograph.
NOISE_IMAGES = 32
#: Images that pass through the network at once where BatchNorm does not couple them.
CHUNK = 64


@dataclass(frozen=True)
class Auxiliary:
    """Labelled images of the attacker's own, as the attacked network sees them.

    features: (N, d) inputs of the head. labels: (N,). bn_inputs: (N, c) spatial means at the last
    BatchNorm layer's input, and bn_mean: (c,) the client's uploaded batch mean there, where
    uploaded statistics are used.
    """

    features: Tensor
    labels: Tensor
    bn_inputs: Tensor | None = None
    bn_mean: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """All that the label methods look at, in float64 on the CPU. None of them changes it.

    weight_grad: G (C, d), gradient of the head's weight. bias_grad: g (C,) of its bias, None where
    the head has none. weight, bias: W (C, d), b (C,). batch_size: B. label_smoothing: ε in [0, 1).
    sigma: standard deviation of noise added to the gradient. clipped: the gradient was scaled
    down by an unknown factor; clip_factor: the one that was divided out; clipped_each: it was every
    sample's gradient, by a factor of its own. resolution: relative
    rounding error of the gradient's numbers. public: (N, d) features of unlabelled public images,
    noise: (M, d) of noise images, as the attacked network makes them. non_negative: the head's
    inputs are never negative. is_surrogate: bias_grad is no gradient that was sent, but a stand-in
    (inversion/counts.py), with noise of surrogate_sigma.
    """

    weight_grad: Tensor
    bias_grad: Tensor | None
    weight: Tensor
    bias: Tensor
    batch_size: int
    label_smoothing: float = 0.0
    sigma: float = 0.0
    clipped: bool = False
    clip_factor: float | None = None
    clipped_each: bool = False
    resolution: float = 2.0**-24
    public: Tensor | None = None
    noise: Tensor | None = None
    auxiliary: Auxiliary | None = None
    non_negative: bool = True
    is_surrogate: bool = False
    surrogate_sigma: float = 0.0

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.weight)

    @property
    def bias_sigma(self) -> float:
        """Standard deviation of the noise in bias_grad."""
        return self.surrogate_sigma if self.is_surrogate else self.sigma

    @cached_property
    def hard_bias_grad(self) -> Tensor:
        """(g + ε/C) / (1 − ε) = q / (1 − ε) − n / B (C,): g itself without label smoothing."""
        return (self.bias_grad + self.label_smoothing / self.num_classes) / (
            1 - self.label_smoothing
        )

    @cached_property
    def shared_embedding(self) -> Tensor:
        """h̄ = Gᵀg / gᵀg (d,): the features, were they the same for every sample; 0 for g = 0."""
        square = self.bias_grad.square().sum()
        if not square > 0:
            return torch.zeros(self.weight.shape[1], dtype=torch.float64)
        return self.weight_grad.T @ self.bias_grad / square

    def probabilities(self, features: Tensor) -> Tensor:
        """Softmax outputs (..., C) of the head for features (..., d)."""
        return (features @ self.weight.T + self.bias).softmax(-1)

    def scaled(self, factor: float) -> "Evidence":
        """The evidence with gradient and noise divided by `factor`."""
        return replace(
            self,
            weight_grad=self.weight_grad / factor,
            bias_grad=self.bias_grad / factor,
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
) -> Evidence:
    """Collect what the target's gradient says about its labels.

    model: the attacked network (`models.target.model_of`); it is left as it was. public:
    (N, C, H, W) normalised public images without labels; without them noise stands in. auxiliary:
    normalised images (N, C, H, W) and labels (N,) of the attacker's own. use_uploaded_bn: look at
    the auxiliary images through the batch statistics that the client uploaded.

    Raises ValueError where the label methods do not apply: no linear head, a head whose weight is
    not trained, or layers behind the head.
    """
    name, head = find_head(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the classifier head {name} of {target.arch} is a {type(head).__name__}; labels are "
            "read off the gradient of a linear head that gives the logits"
        )
    gradients = dict(zip(trainable_parameters(model), target.gradient, strict=True))
    if f"{name}.weight" not in gradients:
        raise ValueError(f"the gradient of the head's weight {name}.weight was not sent")
    weight_grad = _double(gradients[f"{name}.weight"])
    bias_grad = gradients.get(f"{name}.bias")

    noise = None
    if public is None:
        generator = Generator().manual_seed(0)
        noise = torch.randn(NOISE_IMAGES, *target.image_shape, generator=generator)
    probe = features_of(model, noise if public is None else public, target.train_mode)[0]
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
        sigma=protection.sigma if protection else 0.0,
        clipped=_was_clipped(target),
        clipped_each=protection is not None and protection.mode == "per-sample",
        resolution=target.resolution or rounding_error([gradients[f"{name}.weight"]]),
        public=None if public is None else probe,
        noise=None if noise is None else probe,
        auxiliary=seen,
        non_negative=bool((probe >= 0).all()),
    )


def features_of(model: nn.Module, images: Tensor, train_mode: bool) -> tuple[Tensor, Tensor | None]:
    """Inputs of the classifier head, and spatial means at the input of the last BatchNorm layer.

    images: (N, C, H, W) normalised. Where BatchNorm uses batch statistics they pass as one
    batch. Returns (N, d) and (N, c), or None without BatchNorm, float64 on the CPU.

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


def _auxiliary(model, target, auxiliary, use_uploaded_bn) -> Auxiliary:
    images, labels = auxiliary
    if not use_uploaded_bn:
        features, _ = features_of(model, images, target.train_mode)
        return Auxiliary(features, labels.long())
    if uses_batch_statistics(model, target.train_mode):
        model = copy.deepcopy(model)
        layers = batchnorm_layers(model)
        for layer, mean, var in zip(layers, target.bn_mean, target.bn_var, strict=True):
            if normalises_by_batch(layer, target.train_mode):
                # the client's statistics in place of the auxiliary batch's
                layer.register_buffer("running_mean", mean.to(next(model.parameters())))
                layer.register_buffer("running_var", var.to(next(model.parameters())))
    features, bn_inputs = features_of(model, images, train_mode=False)
    return Auxiliary(features, labels.long(), bn_inputs, _double(target.bn_mean[-1]))


def _double(values: Tensor) -> Tensor:
    return values.detach().double().cpu()


def _was_clipped(target: Target) -> bool:
    """Whether clipping may have scaled the gradient down: its norm then equals the bound.

    With noise true unless the norm is below the bound by three standard deviations.
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
