"""What the attacker sees (`Target`) and what only scoring sees (`GroundTruth`)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.batchnorm import (
    BATCHNORM_REPLACEMENTS,
    batchnorm_layers,
    replace_batchnorm,
    uses_learned_statistics,
)
from models.build import (
    Builder,
    WithoutMemory,
    build_model,
    is_known,
    load_weights,
    misfits,
    some,
    without_wrapper,
)
from models.choices import SPARSE_MODES
from models.gradient import ClientLoss, Update, trainable_parameters
from models.guarantee import NO_PRIVACY, bound_sentence, described
from models.local import LocalSteps
from models.user_network import UserNetwork, probe
from utils.errors import InputError


@dataclass(frozen=True)
class Protection:
    """Records what the client did to the gradient before sending it, as it reports.

    The fields from `noise_multiplier` to `mu` concern "per-sample" alone, from which
    differential privacy follows. They are None where there is no bound or the client reported none.
    """

    #: "batch" clips the batch's mean gradient, "per-sample" every sample's; the other names in
    #: PROTECTION_MODES are those of `--defence`.
    mode: str
    #: Standard deviation of the noise in every entry sent, ≥ 0; for "svt" before the cut.
    sigma: float
    #: Largest Euclidean norm C that clipping leaves, > 0; None without clipping.
    clip: float | None
    #: sigma · B / C.
    noise_multiplier: float | None = None
    #: ε for `steps` such gradients together.
    epsilon: float | None = None
    #: δ of (ε, δ), in (0, 1).
    delta: float | None = None
    #: Number of gradients that ε is for.
    steps: int | None = None
    #: Probability in (0, 1] that a sample of the client's data is in a batch.
    sample_rate: float | None = None
    #: μ of Gaussian differential privacy of one such gradient, without subsampling.
    mu: float | None = None
    #: The kept share ("topk", "random", "svt"), the percentile, or the bits per entry ("int8",
    #: "sign").
    amount: float | None = None
    #: Largest magnitude γ that the client let an entry have, > 0; None where it cut none.
    largest: float | None = None

    @property
    def description(self) -> str:
        """Say in a few words what the client did."""
        return described(
            self.mode, sigma=self.sigma, clip=self.clip, amount=self.amount, largest=self.largest
        )

    @property
    def guarantee(self) -> str:
        """Say which differential privacy follows."""
        if self.mode in NO_PRIVACY:
            return f"this carries no differential-privacy guarantee: {NO_PRIVACY[self.mode]}"
        if self.epsilon is None:
            why = (
                "epsilon is not reported or too large"
                if self.sigma
                else "without noise epsilon is infinite"
            )
            return f"this carries no differential-privacy guarantee: {why}"
        return (
            f"noise multiplier {self.noise_multiplier:.4g}: epsilon {self.epsilon:.4g} at delta "
            f"{self.delta:g} over {self.steps} step(s) of sample rate {self.sample_rate:g}, for "
            "one sample more or less, the batch size being public"
        )


def guarantee_lines(
    protection: Protection, model: nn.Module, *, train_mode: bool, uploads_bn: bool
) -> list[str]:
    """Say which differential privacy follows for all that a client sent, and what it leaves out.

    model: the network with the weights that the client started from. uploads_bn: whether the
    client sent the batch's BatchNorm statistics as well.
    """
    lines = [protection.guarantee]
    if uploads_bn:
        lines.append(
            "the BatchNorm statistics sent with it are not protected, so the message as a whole "
            "carries no guarantee"
        )
    elif protection.mu is not None:
        lines.append(bound_sentence(protection.mu, protection.steps or 1))
    if protection.epsilon is not None and uses_learned_statistics(model, train_mode):
        lines.append(
            "the running statistics of BatchNorm in the network are not covered: where private "
            "images made them, epsilon does not hold for those"
        )
    return lines


@dataclass(frozen=True)
class Target:
    """Holds all that an attacker sees of one client step."""

    #: One tensor per trainable parameter, in the model's order.
    gradient: tuple[Tensor, ...]
    #: Images in the batch, B.
    batch_size: int
    #: (C, H, W).
    image_shape: tuple[int, int, int]
    #: Classes of the network.
    num_classes: int
    #: Mean of the normalisation of the images, (C, 1, 1).
    mean: Tensor
    #: Standard deviation of that normalisation, (C, 1, 1).
    std: Tensor
    #: Name of the architecture (models/build.py).
    arch: str
    #: Weights that the client started from.
    state_dict: dict[str, Tensor]
    #: Whether BatchNorm used the batch's statistics.
    train_mode: bool
    #: Names of the trainable parameters, in the order of `gradient`; empty where the file has none.
    trainable: tuple[str, ...]
    #: Mean of the whole batch at the input of every BatchNorm layer, (C_l,) each; None if not sent.
    bn_mean: tuple[Tensor, ...] | None = None
    #: Biased variance at the same places.
    bn_var: tuple[Tensor, ...] | None = None
    #: Share ε in [0, 1) of every label that the loss moved evenly to all classes.
    label_smoothing: float = 0.0
    #: Noise and clipping; None without.
    protection: Protection | None = None
    #: What replaces the architecture's BatchNorm layers, a name in BATCHNORM_REPLACEMENTS, or None.
    replace_bn: str | None = None
    #: Relative rounding error of the gradient's entries as they were sent; None for that of the
    #: narrowest type that holds them.
    resolution: float | None = None
    #: A name in LOSS_KINDS (models/choices.py).
    loss_kind: str = "cross-entropy"
    #: Builds the network in the place of `arch`, which is then a name to show; None by that name.
    builder: Builder | None = None
    #: How the client stepped, where it sent the update of several local steps; `gradient` is then
    #: the mean gradient (w_before − w_after) / (lr · T). None for one gradient.
    local: LocalSteps | None = None

    @property
    def weight_change(self) -> tuple[Tensor, ...]:
        """Return w_after − w_before of every trainable parameter, −lr · T · gradient.

        Raises ValueError where one gradient was sent.
        """
        if self.local is None:
            raise ValueError("one gradient was sent, no update of weights")
        return tuple(-self.local.lr * self.local.steps * g for g in self.gradient)

    @property
    def loss(self) -> ClientLoss:
        """Return how the client took its loss."""
        return ClientLoss(self.train_mode, self.label_smoothing, self.loss_kind)

    @property
    def sent(self) -> tuple[Tensor, ...] | None:
        """Return what was sent of a sparse update: bool masks like `gradient`; None for all of it.

        An entry that is 0 counts as not sent, since nothing tells the two apart.
        """
        how = self.protection
        if how is None or how.mode not in SPARSE_MODES:
            return None
        if how.mode in ("topk", "random") and how.amount == 1:
            return None
        masks = tuple(g != 0 for g in self.gradient)
        return None if all(mask.all() for mask in masks) else masks

    def unscaled(self, scale: float) -> "Target":
        """Divide the gradient by `scale`, by which the client multiplied it.

        `protection` describes the gradient before that multiplication. `resolution` stays that of
        the entries as they were sent, since a division makes none of them finer.
        """
        if scale == 1:
            return self
        gradient = tuple(g / scale for g in self.gradient)
        sent = self.resolution or rounding_error(self.gradient)
        return replace(self, gradient=gradient, resolution=sent)

    @property
    def network(self) -> str:
        """Name the architecture and what replaces its BatchNorm layers."""
        return self.arch if self.replace_bn is None else f"{self.arch} with {self.replace_bn}"

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest normalised value of a valid colour, (C, 1, 1) each."""
        return -self.mean / self.std, (1 - self.mean) / self.std


@dataclass(frozen=True)
class GroundTruth:
    """Holds the private batch and what was captured beside it; for scoring only."""

    #: The images, (B, C, H, W), normalised.
    x: Tensor
    #: Their labels: classes (B,), or (B, K) where the client's loss is binary cross-entropy.
    y: Tensor
    #: What the client would have sent for other images with the same labels, if stored.
    control: Update | None = None
    #: Images that could have been in the place of each one, (B, N, C, H, W) of uint8, if stored.
    decoys: Tensor | None = None

    def unscaled(self, scale: float) -> "GroundTruth":
        """Divide the control's gradient by `scale`: it is the same client's."""
        if self.control is None or scale == 1:
            return self
        gradient = tuple(_wide(g) / scale for g in self.control.gradient)
        return replace(self, control=replace(self.control, gradient=gradient))


def _wide(g: Tensor) -> Tensor:
    """Widen half precision to float32, which is the least that the attack computes in."""
    return g.to(torch.promote_types(torch.float32, g.dtype))


def rounding_error(gradient: Sequence[Tensor]) -> float:
    """Estimate the relative rounding error of a gradient by the narrowest type that holds it."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if all(torch.equal(g.to(dtype).to(g.dtype), g) for g in gradient):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float64).eps


@functools.lru_cache(maxsize=4)
def outline_of(
    arch: str, num_classes: int, image_shape: tuple[int, int, int], replace_bn: str | None,
    builder: Builder | None = None,
) -> nn.Module:  # fmt: skip
    """Build the network with names, shapes and dtypes but without memory; to be read only.

    So sizes that a file claims cost nothing here, however large they are. builder: builds it in the
    place of `arch`; one whose function reads its own weights has its network built with memory.

    Raises InputError when there is no such network.
    """
    if builder is None and not is_known(arch):
        raise InputError(
            f"its network '{some([arch])}' is not one that models/build.py knows; add it there, "
            "or attack it from Python"
        )
    if replace_bn is not None and replace_bn not in BATCHNORM_REPLACEMENTS:
        raise InputError(
            f"BatchNorm was replaced by '{some([replace_bn])}', which is not one of "
            f"{', '.join(BATCHNORM_REPLACEMENTS)}"
        )
    try:
        with WithoutMemory():
            return _build(arch, num_classes, image_shape, replace_bn, builder)
    except (InputError, RuntimeError, TypeError, OverflowError) as error:
        if builder is not None:
            return _build(arch, num_classes, image_shape, replace_bn, builder)
        raise InputError(
            f"{arch} cannot be built for images {image_shape} and {num_classes} classes: "
            f"{' '.join(str(error).split())[:160]}"
        ) from error


def _build(arch, num_classes, image_shape, replace_bn, builder) -> nn.Module:
    if builder is None:
        model = build_model(arch, num_classes, image_shape)
    else:
        model = builder(num_classes, image_shape)
    if replace_bn is not None:
        replace_batchnorm(model, replace_bn)
    return model


def check_fits(target: Target) -> None:
    """Raise InputError unless weights and gradient are those of the architecture.

    Builds nothing large and reads no entries.
    """
    outline = outline_of(
        target.arch, target.num_classes, target.image_shape, target.replace_bn, target.builder
    )
    problems = misfits(target.state_dict, outline.state_dict())
    if problems:
        raise InputError(
            f"its weights are not those of {target.arch} for {target.num_classes} classes: "
            f"{problems}; capture it anew with training.py"
        )
    known = dict(outline.named_parameters())
    unknown = [name for name in target.trainable if name not in known]
    if unknown:
        raise InputError(f"{target.arch} has no parameter {some(unknown, 1)}")
    chosen = {n: p for n, p in known.items() if not target.trainable or n in target.trainable}
    _check_sent(chosen, batchnorm_layers(outline), target)


def model_of(target: Target) -> nn.Module:
    """Build the attacked network with the weights the client started from.

    Raises InputError when the weights do not fit the architecture, or when a network of the user's
    makes no logits of such images (`probe`).
    """
    check_fits(target)
    task, builder = (target.num_classes, target.image_shape), target.builder
    model = _build(target.arch, *task, target.replace_bn, builder)
    load_weights(model, target.state_dict)
    if builder is not None:
        probe(model, *task, builder.path if isinstance(builder, UserNetwork) else "")
    if target.trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in target.trainable)
    return model.to(target.gradient[0].dtype)


def check_gradient_fits(model: nn.Module, target: Target) -> None:
    """Raise InputError, naming the parameter, unless the target's tensors fit the model."""
    _check_sent(trainable_parameters(model), batchnorm_layers(model), target)


def _check_sent(
    parameters: dict[str, nn.Parameter], layers: list[nn.Module], target: Target
) -> None:
    """Check as `check_gradient_fits` does, for these trainable parameters and BatchNorm layers."""
    for (name, parameter), g in zip(parameters.items(), target.gradient, strict=False):
        if g.shape != parameter.shape:
            raise InputError(
                f"the gradient of {name} has shape {tuple(g.shape)}, the parameter "
                f"{tuple(parameter.shape)}; it was taken of another model than {target.arch}"
            )
    if len(parameters) != len(target.gradient):
        surplus = list(parameters)[len(target.gradient) :]
        which = f"; none for {surplus[0]}" if surplus else ""
        raise InputError(
            f"{len(target.gradient)} gradient tensors for {len(parameters)} trainable parameters "
            f"of {target.arch}{which}"
        )
    names = [without_wrapper(name) for name in parameters]
    if set(names) == set(target.trainable) and tuple(names) != target.trainable:
        raise InputError(
            f"its gradient is in another order than the parameters of {target.arch}; put it into "
            "that of `trainable`"
        )
    if target.bn_mean is None:
        return
    means, variances = target.bn_mean, target.bn_var or ()
    if not len(means) == len(variances) == len(layers):
        raise InputError(
            f"BN statistics of {len(means)} means and {len(variances)} variances for "
            f"{len(layers)} BN layers of {target.arch}"
        )
    for place, (layer, *pair) in enumerate(zip(layers, means, variances, strict=True)):
        if any(values.shape != (layer.num_features,) for values in pair):
            raise InputError(
                f"its BN statistics of layer {place} have shape {tuple(pair[0].shape)}, but the "
                f"layer {layer.num_features} channels; they are not of {target.arch}"
            )
