"""Protects the gradient before the client sends it, and computes which privacy follows."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from models.comparing import float64_norm
from models.gradient import CHUNK_BYTES, ClientLoss, per_sample_gradients
from utils.shard import ALONE, Shard, sum_tensors


@dataclass(frozen=True)
class Protected:
    """A protected gradient, and Euclidean norms before and after, of all its tensors together."""

    #: As sent.
    gradient: tuple[Tensor, ...]
    #: Norm of the batch's mean gradient before any protection.
    norm: float
    #: Norm after clipping, without the noise.
    clipped_norm: float
    #: Norm of what is sent.
    sent_norm: float
    #: (B,) norms of every sample's gradient before clipping; None unless samples were clipped.
    sample_norms: Tensor | None = None

    def record(self) -> dict:
        """Return the norms by the names that checkpoints give them."""
        return {
            "mean": self.norm,
            "clipped": self.clipped_norm,
            "sent": self.sent_norm,
            "samples": self.sample_norms,
        }


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism: clip to a norm, then add noise."""

    #: Standard deviation of the noise per entry of the mean gradient, ≥ 0.
    sigma: float
    #: Largest Euclidean norm that clipping leaves, > 0; None for no clipping.
    clip: float | None
    #: Source of the noise, on the CPU so that it is the same on every device, and in the same
    #: state on every process.
    generator: Generator


def protect_batch(gradient: Sequence[Tensor], how: Mechanism) -> Protected:
    """Clip the batch's mean gradient, read as one vector, and add noise, as E2EGI (2023) does.

    No differential privacy follows: one image can change the mean gradient by any amount below
    2 · clip, however large the batch, because no person's own part is clipped.
    """
    norm = float64_norm(gradient)
    factor = 1.0 if how.clip is None else min(1.0, how.clip / max(norm, 1e-12))
    clipped = [g * factor for g in gradient]
    sent = _with_noise(clipped, how)
    return Protected(sent, norm, float64_norm(clipped), float64_norm(sent))


def protect_per_sample(
    gradient: Sequence[Tensor],
    how: Mechanism,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: ClientLoss,
    shard: Shard = ALONE,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Protected:
    """Clip every sample's gradient, average over the batch, and add noise.

    This is DP-SGD (Abadi et al., 2016). gradient: that of the whole batch without protection, for
    its norm alone. x: (B, C, H, W) normalised, y: (B,), the whole batch. The sum of the clipped
    gradients changes by `clip` at most with one sample, so the noise multiplier is
    sigma · B / clip; `epsilon` computes which privacy follows.

    Raises ValueError where samples have no gradients of their own (BatchNorm in train mode).
    """
    clip = how.clip
    assert clip is not None  # train/settings.py refuses per-sample protection without it
    totals = [torch.zeros_like(g) for g in gradient]
    norms = [x.new_zeros(0, dtype=torch.float64)]
    for chunk in per_sample_gradients(
        model, shard.split(x), shard.split(y), loss, chunk_bytes=chunk_bytes
    ):
        norms.append(sample_norms(chunk))
        factors = clip_factors(norms[-1], clip)
        for total, g in zip(totals, chunk, strict=True):
            total += torch.tensordot(factors.to(g), g, 1)
    clipped = [total / len(x) for total in sum_tensors(totals, shard)]
    sent = _with_noise(clipped, how)
    all_norms = shard.gather(torch.cat(norms), len(x)).cpu()
    return Protected(
        sent, float64_norm(gradient), float64_norm(clipped), float64_norm(sent), all_norms
    )


def sample_norms(chunk: Sequence[Tensor]) -> Tensor:
    """Compute the norm (n,) of every sample's gradient in float64; chunk: tensors (n, *shape)."""
    return sum(g.flatten(1).double().square().sum(1) for g in chunk).sqrt()


def clip_factors(norms: Tensor, clip: float) -> Tensor:
    """Compute the factors, at most 1, that bring gradients of these norms down to `clip`."""
    return (clip / norms.clamp(min=1e-12)).clamp(max=1.0)


#: Rényi orders beside opacus' own, for very little and very much noise.
LOW_ORDERS = [1 + k / 100 for k in range(1, 10)]
HIGH_ORDERS = [96, 128, 256, 512, 1024]
#: Noise multiplier below which ε is infinite: its squares would underflow.
SMALLEST_MULTIPLIER = 1e-12


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Compute ε of (ε, delta)-differential privacy after `steps` gradients of DP-SGD, by opacus.

    Rényi accounting of the Poisson-subsampled Gaussian mechanism (Mironov et al., 2019) between
    data sets that differ by one sample more or less. The batch size B, by which the sum is divided,
    is fixed and public. noise_multiplier ≥ 0: noise in the sum of clipped gradients over their
    largest norm. sample_rate in (0, 1]: probability that a sample of the client is in a batch; 1 is
    no subsampling. delta in (0, 1). Infinite without noise. Where a sample is replaced, not added,
    the sum changes by twice as much: give half the multiplier. Batches of fixed size drawn
    without replacement have another bound than these at sample_rate < 1.
    """
    from opacus.accountants import RDPAccountant  # two seconds that only this needs

    if noise_multiplier < SMALLEST_MULTIPLIER:
        return math.inf
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    alphas = [*LOW_ORDERS, *RDPAccountant.DEFAULT_ALPHAS, *HIGH_ORDERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beyond these orders the bound is only less tight
        return max(0.0, float(accountant.get_epsilon(delta, alphas=alphas)))


def _with_noise(gradient: Sequence[Tensor], how: Mechanism) -> tuple[Tensor, ...]:
    return tuple(
        g + how.sigma * torch.randn(g.shape, generator=how.generator, dtype=g.dtype).to(g.device)
        for g in gradient
    )
