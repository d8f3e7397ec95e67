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
    WithoutMemory,
    architectures,
    build_model,
    load_weights,
    misfits,
    some,
)
from models.checkpoint import without_wrapper
from models.gradient import trainable_parameters
from utils.errors import InputError


@dataclass(frozen=True)
class Protection:
    """What the client did to the gradient before sending it, as it tells.

    mode: "batch" clips the mean gradient, "per-sample" every sample's. clip: their largest norm C,
    None without clipping. sigma: standard deviation of the noise in every number sent.

    Of "per-sample" alone, where (ε, delta)-differential privacy follows: noise_multiplier
    sigma · B / C; epsilon over `steps` such gradients, each of a share `sample_rate` of the
    client's data; None where there is no bound or none was told.
    """

    mode: str
    sigma: float
    clip: float | None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    steps: int | None = None
    sample_rate: float | None = None

    @property
    def guarantee(self) -> str:
        """What differential privacy follows, in words."""
        if self.mode == "batch":
            return (
                "this carries no differential-privacy guarantee: the batch is clipped, not each "
                "image"
            )
        if self.epsilon is None:
            why = (
                "epsilon is not told or too large"
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
    """What differential privacy follows of all that a client sent, with what it does not cover.

    model: with the weights that the client started from. uploads_bn: it sent the batch's BatchNorm
    statistics as well.
    """
    lines = [protection.guarantee]
    if uploads_bn:
        lines.append(
            "the BatchNorm statistics beside it are not protected: what was sent as a whole "
            "carries no guarantee"
        )
    if protection.epsilon is not None and uses_learned_statistics(model, train_mode):
        lines.append(
            "the running statistics of BatchNorm in the network are not covered: where private "
            "images made them, epsilon does not hold for those"
        )
    return lines


@dataclass(frozen=True)
class Target:
    """All that an attacker sees of one client step.

    gradient: one tensor a trainable parameter, in the model's order. image_shape: (C, H, W).
    mean, std: (C, 1, 1), the normalisation of the images. train_mode: BatchNorm used batch
    statistics. trainable: names of the trainable parameters. bn_mean, bn_var: mean and biased
    variance of the whole batch at the input of every BatchNorm layer, one (C_l,) tensor each,
    or None when the client did not send them. label_smoothing: the share ε of every label that the
    loss moved evenly to all classes. protection: noise and clipping, None without. replace_bn: what
    stands in the place of the architecture's BatchNorm layers, a name in BATCHNORM_REPLACEMENTS.
    resolution: relative rounding error of the gradient's numbers as they were sent, None for that
    of the narrowest type that holds them.
    """

    gradient: tuple[Tensor, ...]
    batch_size: int
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: Tensor
    std: Tensor
    arch: str
    state_dict: dict[str, Tensor]
    train_mode: bool
    trainable: tuple[str, ...]
    bn_mean: tuple[Tensor, ...] | None = None
    bn_var: tuple[Tensor, ...] | None = None
    label_smoothing: float = 0.0
    protection: Protection | None = None
    replace_bn: str | None = None
    resolution: float | None = None

    def unscaled(self, scale: float) -> "Target":
        """The target with its gradient divided by `scale`, by which the client multiplied it.

        What `protection` says is of the gradient before. Numbers divided are no finer than they
        were sent.
        """
        if scale == 1:
            return self
        gradient = tuple(g / scale for g in self.gradient)
        return replace(self, gradient=gradient, resolution=rounding_error(self.gradient))

    @property
    def network(self) -> str:
        """The architecture in words."""
        return self.arch if self.replace_bn is None else f"{self.arch} with {self.replace_bn}"

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest normalised value of a valid colour, (C, 1, 1) each."""
        return -self.mean / self.std, (1 - self.mean) / self.std


@dataclass(frozen=True)
class Update:
    """What a client computes for a batch; gradient, bn_mean and bn_var as in `Target`."""

    gradient: tuple[Tensor, ...]
    bn_mean: tuple[Tensor, ...] | None = None
    bn_var: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class GroundTruth:
    """For scoring only: the private batch, x (B, C, H, W) normalised, y (B,).

    control: what the client would have sent for other images with the same labels, if stored.
    decoys: (B, N, C, H, W) of uint8, images that could have been in each one's place, if stored.
    """

    x: Tensor
    y: Tensor
    control: Update | None = None
    decoys: Tensor | None = None

    def unscaled(self, scale: float) -> "GroundTruth":
        """The same with the control's gradient divided by `scale`: it comes of the same client."""
        if self.control is None or scale == 1:
            return self
        gradient = tuple(_wide(g) / scale for g in self.control.gradient)
        return replace(self, control=replace(self.control, gradient=gradient))


def _wide(g: Tensor) -> Tensor:
    """As it is, or in float32 where it is in half precision: the attack computes in no less."""
    return g.to(torch.promote_types(torch.float32, g.dtype))


def rounding_error(gradient: Sequence[Tensor]) -> float:
    """Relative rounding error of the numbers, told by the narrowest type that holds them all."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if all(torch.equal(g.to(dtype).to(g.dtype), g) for g in gradient):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float64).eps


def target_from_checkpoint(checkpoint: dict) -> Target:
    """The attacker's view of a loaded checkpoint (utils/checkpoint.py); reads no truth.

    Half-precision gradients are widened to float32: the attack computes in no less. Gradients
    that stand in another order than the network's are put into it by their names.
    """
    setup = checkpoint["dataset_setup"]
    dtype = torch.float32
    for g in checkpoint["target_gradient"]:
        dtype = torch.promote_types(dtype, g.dtype)
    order = gradient_order(checkpoint)
    gradient = tuple(checkpoint["target_gradient"][place].to(dtype) for place in order)
    names = [without_wrapper(name) for name in checkpoint.get("trainable") or ()]
    if len(names) == len(order):
        names = [names[place] for place in order]

    def per_channel(values):
        return torch.as_tensor(values, dtype=dtype).view(-1, 1, 1)

    record = checkpoint.get("protection")
    bn_mean, bn_var = checkpoint.get("bn_mean_list"), checkpoint.get("bn_var_list")
    return Target(
        gradient=gradient,
        batch_size=int(checkpoint["batch_size"]),
        image_shape=tuple(int(side) for side in setup["size"]),
        num_classes=int(setup["n_classes"]),
        mean=per_channel(setup["mean"]),
        std=per_channel(setup["std"]),
        arch=checkpoint["arch"],
        state_dict={without_wrapper(k): v for k, v in checkpoint["state_dict"].items()},
        train_mode=not checkpoint["model_eval"],
        trainable=tuple(names),
        bn_mean=tuple(bn_mean) if bn_mean else None,
        bn_var=tuple(bn_var) if bn_var else None,
        label_smoothing=float(checkpoint.get("label_smoothing", 0.0)),
        protection=Protection(**record) if record else None,
        replace_bn=checkpoint.get("replace_bn"),
    )


def gradient_order(checkpoint: dict) -> list[int]:
    """Places of `target_gradient` in the order of the network's parameters.

    By the names in `trainable`; the network's order is that of its state dict. As they stand where
    there are no names, other names or no such network: `check_fits` then refuses.
    """
    places = range(len(checkpoint["target_gradient"]))
    names = checkpoint.get("trainable")
    if not names or len(names) != len(places):
        return list(places)
    of_network = [without_wrapper(name) for name in checkpoint["state_dict"]]
    if checkpoint["arch"] in architectures():
        setup = checkpoint["dataset_setup"]
        size = tuple(setup["size"])
        try:
            outline = outline_of(
                checkpoint["arch"], setup["n_classes"], size, checkpoint.get("replace_bn")
            )
        except InputError:
            return list(places)
        of_network = list(outline.state_dict())
    position = {name: place for place, name in enumerate(of_network)}
    names = [without_wrapper(name) for name in names]
    if not position.keys() >= set(names):
        return list(places)
    return sorted(places, key=lambda place: position[names[place]])


def truth_from_checkpoint(truth: dict, checkpoint: dict | None = None) -> GroundTruth | None:
    """The truth in a loaded checkpoint or truth file, None where it holds none.

    checkpoint: the one that a truth file belongs to, whose order of gradients the control has.
    """
    if truth.get("x_true") is None or truth.get("y_true") is None:
        return None
    control = truth.get("control")
    if control is not None:
        mean, var = control.get("bn_mean_list"), control.get("bn_var_list")
        owner = truth if checkpoint is None else checkpoint
        places = range(len(control["target_gradient"]))
        if "target_gradient" in owner:
            places = gradient_order(owner)
        control = Update(
            tuple(control["target_gradient"][place] for place in places),
            tuple(mean) if mean else None,
            tuple(var) if var else None,
        )
    return GroundTruth(truth["x_true"], truth["y_true"].long(), control, truth.get("decoys"))


@functools.lru_cache(maxsize=4)
def outline_of(
    arch: str, num_classes: int, image_shape: tuple[int, int, int], replace_bn: str | None
) -> nn.Module:
    """The network with names, shapes and dtypes but without memory; to be read only.

    A file's word on its sizes costs nothing here, whatever it is.

    Raises InputError when there is no such network.
    """
    if arch not in architectures():
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
            return _build(arch, num_classes, image_shape, replace_bn)
    except (InputError, RuntimeError, TypeError, OverflowError) as error:
        raise InputError(
            f"{arch} cannot be built for images {image_shape} and {num_classes} classes: "
            f"{' '.join(str(error).split())[:160]}"
        ) from error


def _build(arch, num_classes, image_shape, replace_bn) -> nn.Module:
    model = build_model(arch, num_classes, image_shape)
    if replace_bn is not None:
        replace_batchnorm(model, replace_bn)
    return model


def check_fits(target: Target, source: str = "--checkpoint") -> None:
    """Raise InputError, naming `source`, unless weights and gradient are of the architecture.

    Builds nothing large and reads no numbers.
    """
    try:
        outline = outline_of(target.arch, target.num_classes, target.image_shape, target.replace_bn)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    problems = misfits(target.state_dict, outline.state_dict())
    if problems:
        raise InputError(
            f"{source}: its weights are not those of {target.arch} for {target.num_classes} "
            f"classes: {problems}; capture it anew with training.py"
        )
    known = dict(outline.named_parameters())
    unknown = [name for name in target.trainable if name not in known]
    if unknown:
        raise InputError(f"{source}: {target.arch} has no parameter {some(unknown, 1)}")
    chosen = {n: p for n, p in known.items() if not target.trainable or n in target.trainable}
    _check_sent(chosen, batchnorm_layers(outline), target, source)


def model_of(target: Target) -> nn.Module:
    """Build the attacked network with the weights the client started from.

    Raises InputError when the weights do not fit the architecture.
    """
    check_fits(target)
    model = _build(target.arch, target.num_classes, target.image_shape, target.replace_bn)
    load_weights(model, target.state_dict)
    if target.trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in target.trainable)
    return model.to(target.gradient[0].dtype)


def check_gradient_fits(model: nn.Module, target: Target) -> None:
    """Raise InputError, naming the parameter, unless the target's tensors fit the model."""
    _check_sent(trainable_parameters(model), batchnorm_layers(model), target, "--checkpoint")


def _check_sent(
    parameters: dict[str, nn.Parameter], layers: list[nn.Module], target: Target, source: str
) -> None:
    """As `check_gradient_fits`, for these trainable parameters and BatchNorm layers."""
    for (name, parameter), g in zip(parameters.items(), target.gradient, strict=False):
        if g.shape != parameter.shape:
            raise InputError(
                f"{source}: the gradient of {name} has shape {tuple(g.shape)}, the parameter "
                f"{tuple(parameter.shape)}; it was taken of another model than {target.arch}"
            )
    if len(parameters) != len(target.gradient):
        surplus = list(parameters)[len(target.gradient) :]
        which = f"; none for {surplus[0]}" if surplus else ""
        raise InputError(
            f"{source}: {len(target.gradient)} gradient tensors for {len(parameters)} "
            f"trainable parameters of {target.arch}{which}"
        )
    names = [without_wrapper(name) for name in parameters]
    if set(names) == set(target.trainable) and tuple(names) != target.trainable:
        raise InputError(
            f"{source}: its gradient is in another order than the parameters of {target.arch}; "
            "put it into that of `trainable`"
        )
    if target.bn_mean is None:
        return
    if not len(target.bn_mean) == len(target.bn_var) == len(layers):
        raise InputError(
            f"{source}: BN statistics of {len(target.bn_mean)} means and "
            f"{len(target.bn_var)} variances for {len(layers)} BN layers of {target.arch}"
        )
    for place, (layer, *pair) in enumerate(zip(layers, target.bn_mean, target.bn_var, strict=True)):
        if any(values.shape != (layer.num_features,) for values in pair):
            raise InputError(
                f"{source}: its BN statistics of layer {place} have shape "
                f"{tuple(pair[0].shape)}, but the layer {layer.num_features} channels; they are "
                f"not of {target.arch}"
            )
