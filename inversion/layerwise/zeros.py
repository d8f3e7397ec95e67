"""Tells the zeros of a ReLU's output in an estimate whose error differs from place to place."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Probability of being positive below which a free entry is pinned to zero, and standard deviations
#: of the pull at the other pinned ones from which one is freed.
SURE, FREED = 0.02, 4.0
#: Entries that the general scatter counts for at every position and in every channel.
POSITION_PRIOR, CHANNEL_PRIOR = 1.0, 10.0


def scatter(u: Tensor, counted: Tensor) -> Tensor:
    """Return the variance of u's error where u should be 0, (B, I, H, W), from its negatives.

    u: (B, I, H, W); counted: 0/1. Half of the zeros are negative by error. The variance is that of
    the 3×3 positions around, all channels together, times a factor of the channel.
    """
    negative = ((u < 0) & (counted > 0)).to(u)
    square = negative * u.square()
    general = square.sum() / negative.sum().clamp_min(1)
    window = u.new_ones(1, 1, 3, 3)

    def around(values: Tensor) -> Tensor:
        return F.conv2d(values.sum(1, keepdim=True), window, padding=1)

    local = (around(square) + POSITION_PRIOR * general) / (around(negative) + POSITION_PRIOR)
    local = local.clamp_min(1e-300)
    shares = (square / local).sum((0, 2, 3), keepdim=True) + CHANNEL_PRIOR
    return local * shares / (negative.sum((0, 2, 3), keepdim=True) + CHANNEL_PRIOR)


def positive_probability(m: Tensor, variance: Tensor, share: Tensor, square: Tensor) -> Tensor:
    """Return the probability that an entry is positive, by Bayes' rule.

    m: estimate with a normal error of this variance; share, square: a priori, an entry is positive
    with the probability `share`, and then distributed as |N(0, square)|. All broadcast.
    """
    whole = square + variance
    depth = m * (square / (whole * variance)).sqrt()
    positive = math.log(2) - 0.5 * (m.square() / whole + whole.log())
    positive = positive + torch.special.log_ndtr(depth)
    zero = -0.5 * (m.square() / variance + variance.log())
    return torch.sigmoid(positive - zero + (share / (1 - share)).log())


def find_zeros(u: Tensor, free: Tensor, push: Tensor) -> Tensor:
    """Return 1 where u (B, I, H, W), a ReLU's output with an error, counts as 0.

    free: 0/1, entries that were solved for; the others are 0 now. push: minus the gradient of half
    the sum of squares by u: how hard the equations pull at an entry that is held.
    """
    variance = scatter(u, free).expand_as(u).clamp_min(1e-300)
    clear = (u > 2 * variance.sqrt()).to(u)
    square = (clear * u.square()).sum((0, 2, 3), keepdim=True)
    square = square / clear.sum((0, 2, 3), keepdim=True).clamp_min(1)
    negatives = (((u < 0) & (free > 0)).to(u)).sum((0, 2, 3), keepdim=True)
    off = 2 * negatives + (1 - free).sum((0, 2, 3), keepdim=True)
    share = (1 - off / u[:, 0].numel()).clamp(0.05, 0.95)
    positive = positive_probability(u, variance, share, square.clamp_min(1e-300))
    pulled = push > FREED * scatter(push, 1 - free).sqrt()
    return torch.where(free > 0, positive < SURE, ~pulled).to(u)
