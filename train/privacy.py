"""What the client does to its gradient before it sends it, and what privacy that buys."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from models.gradient import CHUNK_BYTES, per_sample_gradients
from utils.shard import ALONE, Shard, sum_tensors


@dataclass(frozen=True)
class Protected:
    """gradient: as sent. norm: Euclidean norm of the mean gradient before. clipped_norm: after
    clipping, without the noise. sent_norm: of what is sent. sample_norms: (B,) of every sample's
    gradient before clipping, where samples were clipped."""

    gradient: tuple[Tensor, ...]
    norm: float
    clipped_norm: float
    sent_norm: float
    sample_norms: Tensor | None = None


def protect_batch(
    gradient: Sequence[Tensor], sigma: float, clip: float | None, generator: Generator
) -> Protected:
    """Clip the batch's gradient, read as one vector, to norm `clip` and add N(0, sigma²) to it.

    As the original (E2EGI, 2023) does. No differential privacy follows: one image can change the
    mean gradient by any amount below 2 · clip however large the batch, and what is clipped is not
    any person's part. sigma ≥ 0; clip > 0, or None for no clipping. generator: source of the noise,
    on the CPU, so that it is the same on every device.
    """
    norm = _norm(gradient)
    factor = 1.0 if clip is None else min(1.0, clip / max(norm, 1e-12))
    clipped = [g * factor for g in gradient]
    sent = _with_noise(clipped, sigma, generator)
    return Protected(sent, norm, _norm(clipped), _norm(sent))


def protect_per_sample(
    gradient: Sequence[Tensor],
    sigma: float,
    clip: float,
    generator: Generator,
    *,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    train_mode: bool,
    label_smoothing: float = 0.0,
    shard: Shard = ALONE,
    chunk_bytes: int = CHUNK_BYTES,
) -> Protected:
    """Mean over the batch of every sample's gradient clipped to norm `clip`, plus N(0, sigma²).

    DP-SGD (Abadi et al., 2016). gradient: of the whole batch without protection, for its norm
    alone. sigma ≥ 0, the deviation in every number of the mean; clip > 0. The sum of the clipped
    gradients changes by `clip` at most with one sample, so the noise multiplier is
    sigma · B / clip; `epsilon` says what privacy follows. generator: as in `protect_batch`, in the
    same state on every process. x: (B, C, H, W) normalised, y: (B,), the whole batch.

    Raises ValueError where samples have no gradients of their own (BatchNorm in train mode).
    """
    totals = [torch.zeros_like(g) for g in gradient]
    norms = [x.new_zeros(0, dtype=torch.float64)]
    for chunk in per_sample_gradients(
        model,
        shard.split(x),
        shard.split(y),
        train_mode=train_mode,
        label_smoothing=label_smoothing,
        chunk_bytes=chunk_bytes,
    ):
        norms.append(sample_norms(chunk))
        factors = clip_factors(norms[-1], clip)
        for total, g in zip(totals, chunk, strict=True):
            total += torch.tensordot(factors.to(g), g, 1)
    clipped = [total / len(x) for total in sum_tensors(totals, shard)]
    sent = _with_noise(clipped, sigma, generator)
    all_norms = shard.gather(torch.cat(norms), len(x)).cpu()
    return Protected(sent, _norm(gradient), _norm(clipped), _norm(sent), all_norms)


def sample_norms(chunk: Sequence[Tensor]) -> Tensor:
    """Norm (n,) of every sample's gradient, float64; chunk: tensors (n, *shape)."""
    return sum(g.flatten(1).double().square().sum(1) for g in chunk).sqrt()


def clip_factors(norms: Tensor, clip: float) -> Tensor:
    """What gradients of these norms are multiplied with so that none exceeds `clip`; at most 1."""
    return (clip / norms.clamp(min=1e-12)).clamp(max=1.0)


#: Rényi orders beside opacus' own, for very little and very much noise.
LOW_ORDERS = [1 + k / 100 for k in range(1, 10)]
HIGH_ORDERS = [96, 128, 256, 512, 1024]
SMALLEST_MULTIPLIER = 1e-12


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """ε of (ε, delta)-differential privacy after `steps` gradients of DP-SGD, by opacus.

    Rényi accounting of the Poisson-subsampled Gaussian mechanism (Mironov et al., 2019) between
    data sets that differ by one sample more or less, where what the sum is divided by, B, is fixed
    and public. noise_multiplier ≥ 0: noise in the sum of clipped gradients over their largest
    norm. sample_rate in (0, 1]: chance of every sample of the client to be in a batch; 1 is no
    subsampling. delta in (0, 1). Infinite without noise. Where a sample is replaced, not added,
    the sum changes by twice as much: give half the multiplier. Batches of fixed size drawn
    without replacement have another bound than these at sample_rate < 1.
    """
    from opacus.accountants import RDPAccountant  # two seconds that only this needs

    if noise_multiplier < SMALLEST_MULTIPLIER:  # the squares would underflow
        return math.inf

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    alphas = [*LOW_ORDERS, *RDPAccountant.DEFAULT_ALPHAS, *HIGH_ORDERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beyond these orders the bound is only less tight
        return max(0.0, float(accountant.get_epsilon(delta, alphas=alphas)))


def _with_noise(
    gradient: Sequence[Tensor], sigma: float, generator: Generator
) -> tuple[Tensor, ...]:
    return tuple(
        g + sigma * torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device)
        for g in gradient
    )


def _norm(gradient: Sequence[Tensor]) -> float:
    return sum(g.double().square().sum().item() for g in gradient) ** 0.5
