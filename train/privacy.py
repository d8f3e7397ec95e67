"""What the client does to its gradient before it sends it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Protected:
    """gradient: as sent. norm: Euclidean norm before. clipped_norm: after clipping, without the
    noise. sent_norm: of what is sent."""

    gradient: tuple[Tensor, ...]
    norm: float
    clipped_norm: float
    sent_norm: float


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
    sent = tuple(
        g + sigma * torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device)
        for g in clipped
    )
    return Protected(sent, norm, _norm(clipped), _norm(sent))


def _norm(gradient: Sequence[Tensor]) -> float:
    return sum(g.double().square().sum().item() for g in gradient) ** 0.5
