"""Moments of one-dimensional tilted distributions, and the Gaussian sites that match them.

Expectation propagation (Minka, 2001) replaces every factor that is not Gaussian by a site: a
precision τ and a precision times mean ν. A site is fitted to the tilted distribution, the product
of the factor and the cavity, which is the Gaussian that all other factors make.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Bound of standardised limits: beyond it densities underflow.
FARTHEST = 30.0


@dataclass(frozen=True)
class Sites:
    """Holds Gaussian factors exp(ν x − τ x² / 2), elementwise."""

    #: τ ≥ 0.
    precision: Tensor
    #: ν, the precision times the mean.
    shift: Tensor


def no_sites(like: Tensor) -> Sites:
    """Return sites that say nothing, of `like`'s shape."""
    return Sites(torch.zeros_like(like), torch.zeros_like(like))


def cavity(mean: Tensor, variance: Tensor, sites: Sites) -> tuple[Tensor, Tensor]:
    """Divide the sites out of Gaussians of the given moments: the mean and variance left."""
    precision = (1 / variance - sites.precision).clamp_min(1e-12)
    return (mean / variance - sites.shift) / precision, 1 / precision


def matching_sites(
    mean: Tensor, variance: Tensor, cavity_mean: Tensor, cavity_variance: Tensor, largest: Tensor
) -> Sites:
    """Return the sites that turn cavities into Gaussians of the given moments.

    A tilted distribution wider than its cavity would need a negative precision: its site says
    nothing. largest: upper limit of the precisions.
    """
    precision = torch.minimum((1 / variance - 1 / cavity_variance).clamp_min(0), largest)
    shift = mean * (1 / cavity_variance + precision) - cavity_mean / cavity_variance
    return Sites(precision, torch.where(precision > 0, shift, 0))


def damped(old: Sites, new: Sites, share: Tensor) -> Sites:
    """Move sites by `share`, (B, 1, 1, 1), of the way from old to new."""
    return Sites(
        torch.lerp(old.precision, new.precision, share), torch.lerp(old.shift, new.shift, share)
    )


def log_density(x: Tensor) -> Tensor:
    """Return the logarithm of the standard normal density."""
    return -0.5 * x.square() - 0.9189385332046727


def below(mean: Tensor, variance: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Truncate normal distributions from above at `bound`, which may be infinite.

    Returns the mean, the variance, and the logarithm of the share below the bound.
    """
    deviation = variance.sqrt()
    limit = ((bound - mean) / deviation).clamp(-FARTHEST, FARTHEST)
    log_share = torch.special.log_ndtr(limit)
    ratio = (log_density(limit) - log_share).exp()
    narrowing = (1 - limit * ratio - ratio.square()).clamp_min(1e-8)
    return mean - deviation * ratio, variance * narrowing, log_share


def between(mean: Tensor, variance: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Truncate normal distributions to [low, high]: the mean and the variance.

    The interval is mirrored to the upper side, where differences of the distribution function
    keep their digits. An interval far from the mean is treated as one at FARTHEST.
    """
    deviation = variance.sqrt()
    a, b = (low - mean) / deviation, (high - mean) / deviation
    mirrored = a + b < 0
    a, b = torch.where(mirrored, -b, a), torch.where(mirrored, -a, b)
    excess = (a - FARTHEST).clamp_min(0)
    a, b = a - excess, b - excess
    log_above = torch.special.log_ndtr(-a)
    log_share = log_above + torch.log1p(-(torch.special.log_ndtr(-b) - log_above).exp())
    at_a, at_b = (log_density(a) - log_share).exp(), (log_density(b) - log_share).exp()
    offset = at_a - at_b
    narrowing = (1 + a * at_a - b * at_b - offset.square()).clamp_min(1e-8)
    moved = mean + deviation * torch.where(mirrored, -offset, offset)
    return moved.clamp(low, high), variance * narrowing


def group_softmax(logits: Tensor, group: Tensor, num_groups: int, rest: float) -> Tensor:
    """Return the softmax of the logits within each group, elementwise; 0 where the group is −1.

    rest: weight of "none of them", beside the exponentials of the logits.
    """
    chosen = group >= 0
    numbers, values = group[chosen], logits[chosen]
    highest = values.new_zeros(num_groups).scatter_reduce(
        0, numbers, values, "amax", include_self=False
    )
    weights = (values - highest[numbers]).exp()
    totals = (rest * (-highest).clamp_max(700).exp()).index_add(0, numbers, weights)
    result = torch.zeros_like(logits)
    result[chosen] = weights / totals[numbers]
    return result


def maximum_moments(
    mean: Tensor,
    variance: Tensor,
    bound: Tensor,
    group: Tensor,
    num_groups: int,
    noise_variance: Tensor,
    rest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tilted moments of variables of which one per group attains its bound.

    All variables lie below their bounds, which may be infinite, and the one that attains it does
    so up to noise. That variable u attains it has the probability, within its group,
    p ∝ N(bound; m, v + noise) / Φ((bound − m) / √v), with m, v the cavity's moments. Its tilted
    distribution is the mixture p N(bound, noise) + (1 − p) N(m, v) below the bound. Variables of
    group −1 attain nothing. That none of a group attains it, because values are wrong, has the
    weight `rest`, relative to a variable whose density at the bound is 1 / √noise.

    Returns the probabilities, the means and the variances.
    """
    low_mean, low_variance, log_share = below(mean, variance, bound)
    spread = variance + noise_variance
    target = torch.where(group >= 0, bound, 0)
    logits = -0.5 * ((target - mean).square() / spread + (spread / noise_variance).log())
    p = group_softmax(logits - log_share, group, num_groups, rest)
    tilted_mean = p * target + (1 - p) * low_mean
    between_both = p * (1 - p) * (target - low_mean).square()
    return p, tilted_mean, p * noise_variance + (1 - p) * low_variance + between_both
