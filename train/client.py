"""One client: its network, the update it computes for a batch, and the protection of that."""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from models.batchnorm import batchnorm_layers, replace_batchnorm
from models.build import build_model, check_known, find_head, init_head
from models.gradient import (
    ClientLoss,
    Update,
    couples_samples,
    forward_failure,
)
from models.guarantee import gaussian_mu
from models.pretrained import load_pretrained
from models.target import Protection
from models.user_network import load_user_network, probe
from train.defences import PROTECTIONS, Step, laplace_scale
from train.local import sent_update
from train.privacy import Protected, epsilon
from train.settings import ClientSettings, NetworkSettings, ProtectionSettings
from utils.errors import InputError, naming, one_line
from utils.shard import Shard
from utils.streams import stream


def bare_network(
    settings: NetworkSettings, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Build the architecture with random weights. Raises InputError, naming the flag."""
    if settings.model is not None:
        with naming(f"--model {settings.model}"):
            user = load_user_network(settings.model)
            model = user(num_classes, image_shape)
            probe(model, num_classes, image_shape, user.path)
            return model
    with naming(f"--arch {settings.arch}"):
        check_known(settings.arch)
    sides = f"{image_shape[1]}"
    if image_shape[1] != image_shape[2]:
        sides += f"x{image_shape[2]}"
    with naming(f"--image-size {sides}"):
        return build_model(settings.arch, num_classes, image_shape)


def without_batchnorm(model: nn.Module, settings: NetworkSettings) -> int:
    """Replace every BatchNorm layer as the settings ask; return how many there were.

    Raises InputError where there was none.
    """
    assert settings.replace_bn is not None  # both callers have asked
    count = replace_batchnorm(model, settings.replace_bn)
    if not count:
        raise InputError(f"--replace-bn: {settings.arch} has no BatchNorm layer; leave it out")
    return count


def network(
    settings: NetworkSettings,
    num_classes: int,
    image_shape: tuple[int, int, int],
    say: Callable[[str], None],
) -> nn.Module:
    """Build the network the client trains: architecture, weights, head. `say` prints one line."""
    torch.manual_seed(settings.seed)
    model = bare_network(settings, num_classes, image_shape)
    head_name, head = _head_of(model, settings)
    if settings.pretrained is None:
        say(f"model: {settings.arch} with random weights (no --pretrained given)")
    else:
        _load(model, settings, head_name, num_classes, say)
    if settings.replace_bn is not None:
        count = without_batchnorm(model, settings)
        lost = " and the running statistics of the weights dropped" if settings.pretrained else ""
        say(f"  {count} BatchNorm layers replaced by {settings.replace_bn}{lost}")
    if head is None:
        say("  no head: the outputs of no linear layer and of no convolution are the logits")
        return model
    init_head(model, settings.head_init)
    say(f"  head {head_name} {tuple(head.weight.shape)}: {settings.head_init}")
    return model


def _head_of(model: nn.Module, settings: NetworkSettings) -> tuple[str, Any]:
    """Find the classifier head: its name and module, or nothing where it is to be kept.

    Raises InputError where there is none to initialise.
    """
    try:
        return find_head(model)
    except ValueError as error:
        if settings.head_init == "keep":
            return "", None
        raise InputError(
            f"--outlayer-state {settings.head_init}: {settings.arch}: {error}; give keep"
        ) from error


def _load(model, settings: NetworkSettings, head_name: str, num_classes: int, say) -> None:
    """Load the weights of --pretrained and report what they leave open."""
    assert settings.pretrained is not None  # `network` has asked
    with naming(f"--pretrained {settings.pretrained}"):
        loaded = load_pretrained(model, settings.pretrained)
    say(f"model: {settings.arch} with the weights of {settings.pretrained}")
    for remark in loaded.remarks:
        say(f"  {remark}")
    if settings.head_init == "keep" and not loaded.has_head:
        raise InputError(
            f"--outlayer-state keep: {settings.pretrained} has no head for {num_classes} classes; "
            "give normal or kaiming_uniform"
        )
    if settings.head_init != "keep" and loaded.has_head:
        say(f"  the file's head {head_name} is overwritten; --outlayer-state keep keeps it")


def check_network(settings: ClientSettings, model: nn.Module) -> None:
    """Raise InputError where the network cannot do what the settings ask."""
    arch = settings.network.arch
    if settings.upload_bn and not batchnorm_layers(model):
        raise InputError(f"--upload-bn: {arch} has no BatchNorm layer; leave it out")
    protection = settings.protection
    if protection is None or protection.mode != "per-sample":
        return
    if couples_samples(model, settings.train_mode):
        also = "" if couples_samples(model, False) else ", or --model-eval"
        given = settings.record.get("defence")
        flag = "--dp-mode per-sample" if given is None else f"--defence {given}"
        raise InputError(
            f"{flag}: BatchNorm by batch statistics mixes the samples of the batch, "
            f"so none of {arch} has a gradient of its own to clip; give --replace-bn "
            f"groupnorm{also}"
        )


def check_processes(
    settings: ClientSettings, model: nn.Module, x: Tensor, num_classes: int
) -> None:
    """Raise InputError unless the network can process the batch `x` (B, C, H, W)."""
    error = forward_failure(model, x, settings.train_mode, num_classes)
    if error is None:
        return
    text = one_line(error)
    if len(x) == 1 and "more than 1 value per channel" in text:
        raise InputError(
            "--batch-size 1: BatchNorm has no batch statistics of one value; give --model-eval, a "
            "larger batch or a larger --image-size"
        ) from error
    raise InputError(
        f"{settings.network.flag}: cannot process images {tuple(x.shape[1:])}: {text[:160]}"
    ) from error


def settings_loss(settings: ClientSettings) -> ClientLoss:
    """Return how the client takes its loss."""
    return ClientLoss(settings.train_mode, settings.label_smoothing, settings.loss)


@dataclass(frozen=True)
class Sent:
    """Holds what the client sends for one batch."""

    #: The update, with its gradient protected where the settings ask for it.
    update: Update
    #: Norms before and after the protection; None without.
    protected: Protected | None


def update(
    settings: ClientSettings,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    noise: Generator | None,
    shard: Shard,
    images: str = "this batch",
) -> Sent:
    """Compute what the client sends for a batch, protected if the settings ask for it.

    x: (B, C, H, W) normalised, y: its labels, on the model's device, the whole batch on every
    process. noise: source of the noise, which a second batch draws from in turn; None without
    protection. images: what the batch is called in a message.

    Raises InputError where the gradient is not finite or zero.
    """
    loss = settings_loss(settings)
    sent = sent_update(settings, model, x, y, loss, shard)
    _check_gradient(settings.network.flag, sent.gradient, images)
    if settings.protection is None:
        return Sent(sent, None)
    step = Step(sent.gradient, model, x, y, loss, shard)
    assert noise is not None  # protection_of makes it
    protected = PROTECTIONS[settings.protection.mode](step, settings.protection, noise)
    return Sent(replace(sent, gradient=protected.gradient), protected)


def _check_gradient(network: str, gradient: Sequence[Tensor], images: str) -> None:
    if not all(torch.isfinite(g).all() for g in gradient):
        raise InputError(
            f"{network}: the gradient of {images} is not finite; check the weights and the images"
        )
    if not any(g.any() for g in gradient):
        raise InputError(
            f"{network}: the gradient of {images} is zero: the network is already certain of "
            "every label; give other weights"
        )


def noise_generator(protection: ProtectionSettings, seed: int) -> Generator:
    """Make the source of the noise, on the CPU. seed: that of the run.

    Its stream is another than that of the weights, and than any that an attacker with the same seed
    draws from. For an ε the noise must be unknown and drawn afresh every time, so the operating
    system gives the seed unless --noise-seed asks for a run that can be repeated.
    """
    if protection.noise_seed is not None:
        seed = protection.noise_seed
    elif protection.mode == "per-sample":
        seed = secrets.randbits(31)
    return stream("noise of the protection", seed)


def protection_of(settings: ClientSettings) -> tuple[Protection | None, Generator | None]:
    """Record what the settings do to the gradient, and make the source of their noise."""
    how = settings.protection
    if how is None:
        return None, None
    return _record_of(how, settings.batch.size), noise_generator(how, settings.network.seed)


def _record_of(how: ProtectionSettings, batch_size: int) -> Protection:
    """Record a protection with the ε and μ that follow."""
    if how.mode == "batch":
        return Protection("batch", how.sigma, how.clip)
    if how.mode != "per-sample":
        return _record_of_filter(how)
    assert how.clip is not None  # train/settings.py refuses per-sample protection without it
    multiplier = how.sigma * batch_size / how.clip
    bound = epsilon(multiplier, how.sample_rate, how.steps, how.delta)
    return Protection(
        mode="per-sample",
        sigma=how.sigma,
        clip=how.clip,
        noise_multiplier=multiplier,
        epsilon=None if math.isinf(bound) else bound,
        delta=how.delta,
        steps=how.steps,
        sample_rate=how.sample_rate,
        mu=gaussian_mu(multiplier),
    )


def _record_of_filter(how: ProtectionSettings) -> Protection:
    """Record a defence from which no differential privacy follows."""
    bits = {"int8": 8.0, "sign": 1.0}
    amount = bits[how.mode] if how.mode in bits else how.amounts[0]
    sigma, largest = 0.0, None
    if how.mode == "percentile":
        _, largest = how.amounts
    elif how.mode == "svt":
        _, _, noise_var, largest, _ = how.amounts
        sigma = math.sqrt(2) * laplace_scale(largest, noise_var)
    return Protection(how.mode, sigma, None, amount=amount, largest=largest)
