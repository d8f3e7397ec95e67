"""The client's defences: what each makes of the gradient of a batch, by its published definition.

Sparsification, quantisation and NVFlare's filters are here; clipping and noise are in
train/privacy.py. None of those here gives differential privacy (models/guarantee.py says why).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from models.comparing import float64_norm
from models.gradient import ClientLoss
from train.privacy import Mechanism, Protected, protect_batch, protect_per_sample
from train.settings import ProtectionSettings
from utils.errors import InputError
from utils.shard import Shard

#: Values per sign that `rounded_to_int8` rounds to; −128 is left out, so that it is symmetric.
INT8_LEVELS = 127
#: Passes over the entries after which the sparse vector technique gives up.
MOST_PASSES = 300


@dataclass(frozen=True)
class Step:
    """Holds what a client computed of one batch, before any defence."""

    #: The batch's gradient, one tensor per trainable parameter.
    gradient: tuple[Tensor, ...]
    model: nn.Module
    #: (B, C, H, W) normalised, the whole batch on every process.
    x: Tensor
    #: (B,) labels.
    y: Tensor
    loss: ClientLoss
    shard: Shard


def largest_entries(gradient: Sequence[Tensor], share: float) -> tuple[Tensor, ...]:
    """Keep the entries that are largest in magnitude over all tensors together, and 0 elsewhere.

    share in (0, 1]: so many of all n entries are kept, ⌈share · n⌉ exactly. This is the selection
    of Aji and Heafield, "Sparse communication for distributed gradient descent" (2017), and of Deep
    Gradient Compression (Lin et al., 2018). Both add what was not sent to the next gradient; this
    is a first step, to which nothing is added.
    """
    flat = _flat(gradient)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.abs().topk(kept_count(share, len(flat)), sorted=False).indices] = True
    return _like(flat * kept, gradient)


def random_entries(
    gradient: Sequence[Tensor], share: float, generator: Generator
) -> tuple[Tensor, ...]:
    """Keep entries that are drawn at random, all equally likely, and 0 elsewhere.

    share in (0, 1]: ⌈share · n⌉ of all n entries are kept, as they are: nothing is rescaled by
    1 / share. Of Shokri and Shmatikov, "Privacy-preserving deep learning" (2015), this is the
    random selection, without their threshold.
    """
    flat = _flat(gradient)
    order = torch.randperm(len(flat), generator=generator)[: kept_count(share, len(flat))]
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order] = True
    return _like(flat * kept.to(flat.device), gradient)


def above_percentile(
    gradient: Sequence[Tensor], percentile: float, gamma: float
) -> tuple[Tensor, ...]:
    """Keep entries of at least a percentile of all magnitudes, and cut them to [−gamma, gamma].

    percentile in [0, 100], interpolated linearly over the entries of all tensors; gamma > 0. This
    is NVFlare's PercentilePrivacy. It divides a client's weight difference by the number of local
    steps, filters, and multiplies by it again, so that gamma bounds the mean difference per step;
    here the gradient takes its place. As there, a parameter that is a single number is sent as it
    is.
    """
    magnitudes = torch.cat([g.detach().abs().flatten().double() for g in gradient]).cpu().numpy()
    cutoff = float(np.percentile(magnitudes, percentile))
    return tuple(
        g.clone()
        if g.dim() == 0
        else torch.where(g.double().abs() >= cutoff, g.clamp(-gamma, gamma), torch.zeros_like(g))
        for g in gradient
    )


def sparse_vector(
    gradient: Sequence[Tensor],
    fraction: float,
    epsilon: float,
    noise_var: float,
    gamma: float,
    tau: float,
    generator: Generator,
) -> tuple[Tensor, ...]:
    """Keep entries that the sparse vector technique selects, with noise, and 0 elsewhere.

    This is NVFlare's SVTPrivacy. With n = ⌈fraction · entries⌉ and noise Lap(b) of scale b: the
    threshold is tau + Lap(2 gamma / epsilon). An entry g is accepted where
    min(|g|, gamma) + Lap(4 gamma n / epsilon₂) reaches it, with epsilon₂ = epsilon (2 n)^(2/3);
    the others are asked again until n are accepted. Of those n are drawn with replacement, as by
    default there, so that fewer than n differ. What is sent is g + Lap(2 gamma / noise_var), cut to
    [−gamma, gamma]. A parameter that is a single number is sent as it is.

    Raises InputError where the threshold is too far above gamma for n entries to be accepted.
    """
    flat = _flat(gradient).double().cpu()
    count = kept_count(fraction, len(flat))
    threshold = tau + _laplace(1, 2 * gamma / epsilon, generator).item()
    scale = 4 * gamma * count / (epsilon * (2 * count) ** (2 / 3))
    magnitudes, rejected = flat.abs().clamp(max=gamma), torch.arange(len(flat))
    accepted = torch.empty(0, dtype=torch.long)
    for _ in range(MOST_PASSES):
        asked = magnitudes[rejected] + _laplace(len(rejected), scale, generator)
        accepted = torch.cat([accepted, rejected[asked >= threshold]])
        rejected = rejected[asked < threshold]
        if len(accepted) >= count:
            break
    else:
        raise InputError(
            f"--defence svt: after {MOST_PASSES} passes {len(accepted)} of {count} entries reach "
            "the threshold; give a smaller TAU or a larger GAMMA"
        )
    drawn = accepted[torch.randint(len(accepted), (count,), generator=generator)].unique()
    noise = _laplace(len(drawn), laplace_scale(gamma, noise_var), generator)
    sent = torch.zeros_like(flat)
    sent[drawn] = (flat[drawn] + noise).clamp(-gamma, gamma)
    made = _like(sent, gradient)
    return tuple(g.clone() if g.dim() == 0 else s for g, s in zip(gradient, made, strict=True))


def laplace_scale(gamma: float, noise_var: float) -> float:
    """Return the scale of the noise that `sparse_vector` adds to what it sends."""
    return 2 * gamma / noise_var


def rounded_to_int8(gradient: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Round every tensor to the nearest of 255 evenly spaced values.

    Uniform symmetric quantisation with the tensor's largest magnitude as scale: the step is
    max|g| / 127. The rounding is deterministic, to the nearest and of halves to the even; QSGD
    (Alistarh et al., 2017), which rounds at random so that the mean is right, is another.
    """
    return tuple(map(_int8, gradient))


def _int8(g: Tensor) -> Tensor:
    step = g.abs().amax() / INT8_LEVELS if g.numel() else g.new_zeros(())
    return (g / step).round() * step if step > 0 else g.clone()


def scaled_signs(gradient: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the sign of every entry times the mean magnitude of its tensor; sign 0 is 0.

    signSGD (Bernstein et al., 2018) sends the signs; the scale ‖g‖₁ / n per tensor is that of
    EF-signSGD (Karimireddy et al., 2019), whose memory of earlier errors is empty in a first step.
    """
    return tuple(g.sign() * g.abs().mean() for g in gradient)


def kept_count(share: float, entries: int) -> int:
    """Return how many of so many entries a share in (0, 1] is: rounded up, but for rounding."""
    return min(entries, max(1, math.ceil(share * entries * (1 - 1e-12))))


def _laplace(count: int, scale: float, generator: Generator) -> Tensor:
    """Draw (count,) Laplace numbers in float64, as a random sign times an exponential number."""
    sizes = torch.empty(count, dtype=torch.float64).exponential_(generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return scale * sizes * signs


def _flat(gradient: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.detach().flatten() for g in gradient])


def _like(flat: Tensor, gradient: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cut a vector into tensors of the shapes, types and devices of the gradient's."""
    parts = flat.split([g.numel() for g in gradient])
    return tuple(part.reshape(g.shape).to(g) for part, g in zip(parts, gradient, strict=True))


# The registry ------------------------------------------------------------------------------

#: (what a step computed, how to defend it, source of random numbers) → what is sent.
DefenceFunction = Callable[[Step, ProtectionSettings, Generator], Protected]


def _filter(function: Callable[..., tuple[Tensor, ...]], *, draws: bool = False) -> DefenceFunction:
    """Make a defence of a function of the gradient and the amounts of the command line."""

    def defend(step: Step, how: ProtectionSettings, generator: Generator) -> Protected:
        sent = function(step.gradient, *how.amounts, *([generator] if draws else []))
        before = float64_norm(step.gradient)
        return Protected(sent, before, before, float64_norm(sent))

    return defend


def _batch(step: Step, how: ProtectionSettings, generator: Generator) -> Protected:
    return protect_batch(step.gradient, Mechanism(how.sigma, how.clip, generator))


def _per_sample(step: Step, how: ProtectionSettings, generator: Generator) -> Protected:
    mechanism = Mechanism(how.sigma, how.clip, generator)
    return protect_per_sample(
        step.gradient, mechanism, step.model, step.x, step.y, step.loss, step.shard
    )


#: Mode in PROTECTION_MODES → what does it.
PROTECTIONS: dict[str, DefenceFunction] = {
    "batch": _batch,
    "per-sample": _per_sample,
    "topk": _filter(largest_entries),
    "random": _filter(random_entries, draws=True),
    "percentile": _filter(above_percentile),
    "svt": _filter(sparse_vector, draws=True),
    "int8": _filter(rounded_to_int8),
    "sign": _filter(scaled_signs),
}
