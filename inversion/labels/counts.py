"""Counts how often each class occurs in a batch, by the gradient of the classifier head alone.

The gradient of the mean cross-entropy by the logits' bias is g_k = q_k − n_k / B with q_k the
mean predicted probability of class k, so that n_k = B (q_k − g_k) exactly: only q is missing. An
untrained or fresh head gives nearly the same probabilities to every sample (the homogeneous
regime), and q follows from one shared embedding. A trained head is nearly always sure of itself
(the saturated regime), and only bounds and plausible spreads are left.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inversion.labels.evidence import Evidence

#: Spread of the logits over samples from which on a head counts as trained (saturated).
SPREAD_LIMIT = 1.0
#: The same limit for the spread guessed from the gradient, where there are no public images.
GUESSED_SPREAD_LIMIT = 0.7
#: Standard errors by which noise widens the bounds.
NOISE_MARGIN = 4.0
#: Labels by which rounding may shift −B g_k, for gradients in float32.
ROUNDING_MARGIN = 1e-3
#: Factor by which the length of a stand-in for the bias gradient may be off.
SURROGATE_ERROR = 10.0
#: Relative distance of an estimated scale from a power of two, up to which it is taken for that
#: power, and up to which the message names the power.
SAME_SCALE, NEAR_SCALE = 0.01, 0.1
#: Distance of the quartiles of an estimated scale over the scale, above which it is not believed.
SCALE_SPREAD = 0.1
#: The largest scale that is looked for.
LARGEST_SCALE = 1e30


@dataclass(frozen=True)
class Estimate:
    """Tells how often a label method finds each class in the batch."""

    #: (C,) integers ≥ 0 that sum to B.
    counts: Tensor
    #: "homogeneous" or "saturated", as the method judged the head; None if it does not distinguish.
    regime: str | None = None
    #: What the reader of the counts should know, in words.
    remark: str = ""


class ScaledGradientError(ValueError):
    """Says that the gradient is longer than that of any mean cross-entropy."""

    def __init__(self, message: str, scale: float | None):
        super().__init__(message)
        #: What to divide the gradient by; None where only a lower bound of it is known.
        self.scale = scale


# Certain lower bounds ----------------------------------------------------------------------


def lower_bounds(evidence: Evidence) -> tuple[Tensor, bool]:
    """Return the least number of samples of every class, and whether that is certain.

    n_k > −B g_k because probabilities are positive; a class whose row of G has a negative entry
    occurs, where features are never negative. The bounds are certain if the bias gradient was sent
    whole and holds no noise, otherwise likely. Returns (C,) integers from 0 to B + 1, which stands
    for every number above B.

    Raises ValueError without a bias gradient (`with_bias_gradient` adds one).
    """
    e = evidence
    bounds = torch.maximum(_bias_bounds(e), _occurs(e).long())
    return bounds, not (e.sigma or e.is_surrogate or e.defence)


def _bias_bounds(e: Evidence) -> Tensor:
    """Return the lower bounds that the bias gradient alone implies.

    An entry that was left out is 0 and bounds nothing. Of a sign follows one sample, since q_k > 0.
    """
    if e.signs_only:
        negative = (e.known_bias_grad < 0) & (not (e.is_surrogate or e.label_smoothing))
        return negative.long()
    slack = NOISE_MARGIN * e.bias_sigma + (0.5 / e.batch_size if e.is_surrogate else 0.0)
    counts = -e.batch_size * (e.hard_bias_grad + slack / (1 - e.label_smoothing))
    if e.resolution < 1e-12 and not (slack or e.label_smoothing):
        nearest = counts.round()
        # a saturated class makes −B g_k an integer but for rounding
        whole = (counts - nearest).abs() < 1e-9 * e.batch_size
        bounds = torch.where(whole, nearest, counts.floor() + 1)
    else:
        bounds = (counts - ROUNDING_MARGIN - e.resolution * counts.abs()).ceil()
    return bounds.clamp(0, e.batch_size + 1).long()


def check_scale(evidence: Evidence) -> None:
    """Refuse a gradient that no batch of B samples can have, whatever its labels.

    All lower bounds together are at most B. Noise widens this limit by its margin, and a stand-in
    for the bias gradient, whose length is a guess, by SURROGATE_ERROR. A scale below 1 breaks no
    bound and is not noticed.

    Signs alone have no scale, and are not checked.

    Raises ScaledGradientError where a scale explains the gradient, ValueError where none does, and
    ValueError without a bias gradient.
    """
    e = evidence
    if e.signs_only:
        return  # the length is that of the scale
    if e.is_surrogate or e.sigma:
        margin = (NOISE_MARGIN + math.sqrt(2 * math.log(e.num_classes))) * e.bias_sigma
        longest = -e.hard_bias_grad.min().item() - margin / (1 - e.label_smoothing)
        least = longest / (SURROGATE_ERROR if e.is_surrogate else 1.0)
        if least > 1 + ROUNDING_MARGIN:
            raise _scaled(e, least)
    elif _asked_for(e) > e.batch_size:
        occurring = int((e.known_bias_grad < 0).sum())
        if occurring > e.batch_size and not e.label_smoothing:
            raise ValueError(
                f"the bias gradient says that {occurring} classes occur, and the batch has "
                f"{e.batch_size} images: it is of another batch size or another loss"
            )
        raise _scaled(e, _least_scale(e))


def _asked_for(e: Evidence) -> int:
    """Return the least number of labels that explains the bias gradient."""
    return int(_bias_bounds(e).sum())


def _least_scale(e: Evidence) -> float:
    """Return the smallest scale above 1 that must be divided out for B labels to be enough."""
    low = high = 1.0
    while _asked_for(e.scaled(high)) > e.batch_size and high < LARGEST_SCALE:
        low, high = high, 2 * high
    for _ in range(20):
        middle = math.sqrt(low * high)
        if _asked_for(e.scaled(middle)) > e.batch_size:
            low = middle
        else:
            high = middle
    return high


def _scaled(e: Evidence, least: float) -> ScaledGradientError:
    """Make the error for a gradient that is too long by a factor of `least` or more."""
    why = f"its head asks for more labels than a batch of {e.batch_size} has"
    estimate, spread = _absent_scale(e) or (0.0, 0.0)
    if estimate < least or spread > SCALE_SPREAD:
        return ScaledGradientError(
            f"the gradient looks scaled by at least {_three_digits(least):,.10g} ({why})", None
        )
    power = 2.0 ** round(math.log2(estimate))
    if abs(estimate / power - 1) <= SAME_SCALE and power >= least:
        return ScaledGradientError(
            f"the gradient looks scaled by about {power:,.10g}, a power of two as the loss scale "
            f"of mixed precision is ({why})",
            power,
        )
    near = ""
    if abs(estimate / power - 1) <= NEAR_SCALE:
        near = f"; {power:,.10g} lies near, if it is the loss scale of mixed precision"
    estimate = _three_digits(estimate)
    return ScaledGradientError(
        f"the gradient looks scaled by about {estimate:,.10g} ({why}{near})", estimate
    )


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _absent_scale(e: Evidence) -> tuple[float, float] | None:
    """Estimate the factor c of the gradient from absent classes; None if they are too few.

    A class that does not occur has g_k = c q_k, and q is that of the shared embedding, which no
    scale changes: c is the median of g_k / q_k over g_k > 0, weighted by q_k. Needs 30 % of the
    classes. Returns c, and the distance of the quartiles of g_k / q_k over c, which is large if
    classes that occur are among those with g_k > 0.
    """
    g = e.known_bias_grad
    q = e.probabilities(e.shared_embedding) - e.label_smoothing / e.num_classes
    usable = (g > 0) & (q > 0)
    if usable.sum() < 0.3 * e.num_classes:
        return None
    ratios, order = (g[usable] / q[usable]).sort()
    weights = q[usable][order].cumsum(0)
    low, median, high = (
        ratios[(weights >= share * weights[-1]).nonzero()[0, 0]].item()
        for share in (0.25, 0.5, 0.75)
    )
    return median, (high - low) / median


def _occurs(e: Evidence) -> Tensor:
    """Return the classes that a negative entry in their row of G gives away: (C,) of bool.

    No class under label smoothing, which lowers every entry by an amount that is not known.
    """
    if not e.non_negative or e.label_smoothing:
        return torch.zeros(e.num_classes, dtype=torch.bool)
    limit = 0.0
    if e.sigma:
        limit -= e.sigma * math.sqrt(2 * math.log(e.weight_grad.numel() / 0.01))
    return e.weight_grad.min(1).values < limit


def round_counts(x: Tensor, bounds: Tensor, total: int) -> Tensor:
    """Return the integers n ≥ bounds with Σ n = total nearest to x: argmin Σ (n_k − x_k)².

    The result is exact. If the bounds alone exceed `total`, the nearest integers 0 ≤ n ≤ bounds
    are returned instead: the bounds are lowered, most where they stand most above x. x: (C,),
    bounds: (C,) integers ≥ 0. Returns (C,) integers. It takes at most `total` single steps
    whatever the size of x.
    """
    none, all_ = torch.zeros_like(bounds), torch.full_like(bounds, total)
    if bounds.sum() > total:
        return _nearest(x, none, bounds.clamp(max=total), total)
    return _nearest(x, bounds, all_, total)


def _nearest(x: Tensor, low: Tensor, high: Tensor, total: int) -> Tensor:
    """Return the integers low ≤ n ≤ high with Σ n = total nearest to x; Σ low ≤ total ≤ Σ high.

    They are x minus one shift common to all classes, rounded and clamped. Bisection finds the
    shift; classes that step at the same shift get the rest one by one.
    """

    def shifted(shift: float) -> Tensor:
        return (x - shift).round().clamp(low, high)

    few, many = (x - low).max().item() + 1, (x - high).min().item() - 1
    for _ in range(200):
        middle = (few + many) / 2
        if shifted(middle).sum() > total:
            many = middle
        else:
            few = middle
    n = shifted(few)
    while n.sum() < total:
        n[(x - n).masked_fill(n >= high, -torch.inf).argmax()] += 1
    return n.long()


# Estimating what the identity lacks --------------------------------------------------------


def with_bias_gradient(evidence: Evidence) -> Evidence:
    """Return the evidence, with a stand-in for the bias gradient if the head has no bias.

    g := G v with h · v ≈ 1 for every sample: v ∝ (Cov + 0.02 · mean eigenvalue · I)⁻¹ mean of
    public features. Without public images v is the first right singular vector of G, scaled by
    the mean feature of noise images, which is weak.

    Raises ValueError when neither public nor noise features are at hand.
    """
    e = evidence
    if e.bias_grad is not None:
        return e
    if e.public is not None:
        mean = e.public.mean(0)
        covariance = torch.cov(e.public.T, correction=0).view(len(mean), len(mean))
        ridge = 0.02 * covariance.diagonal().mean() + 1e-12
        direction = torch.linalg.solve(covariance + ridge * torch.eye(len(mean)).double(), mean)
    elif e.noise is not None:
        mean = e.noise.mean(0)
        direction = torch.linalg.svd(e.weight_grad, full_matrices=False).Vh[0]
    else:
        raise ValueError("a head without bias needs features of public images or of noise")
    length = mean @ direction
    if not length.abs() > 0:
        length = torch.ones(())
    direction = direction / length
    g = e.weight_grad @ direction
    noise = e.sigma * torch.linalg.vector_norm(direction).item()
    return replace(e, bias_grad=g - g.mean(), is_surrogate=True, surrogate_sigma=noise)


def logit_spread(evidence: Evidence) -> tuple[float, float]:
    """Return how much the logits differ between samples, and the limit of a trained head.

    With public images: rms over samples and classes of (h − mean h) · (w_k − mean w). Without
    them a guess from G_k / g_k of the classes that occur, whose values for trained and untrained
    networks overlap. A head counts as trained if the spread reaches the limit.

    Raises ValueError with neither public images nor a bias gradient.
    """
    e = evidence
    if e.public is not None:
        logits = (e.public - e.public.mean(0)) @ (e.weight - e.weight.mean(0)).T
        return logits.square().mean().sqrt().item(), SPREAD_LIMIT
    present = (e.known_bias_grad < 0).nonzero().flatten()
    if not len(present):
        return 0.0, GUESSED_SPREAD_LIMIT
    g = e.known_bias_grad[present]
    embeddings = e.weight_grad[present] / g[:, None]
    if e.non_negative:
        embeddings = embeddings.clamp(min=0)
    logits = (embeddings - e.shared_embedding) @ e.weight.T  # (|N|, C)
    weights = (g.abs() / g.abs().sum())[:, None]
    centred = logits - (weights * logits).sum(0)
    variance = (weights * centred.square()).sum(0)
    return variance.mean().sqrt().item(), GUESSED_SPREAD_LIMIT


def without_clipping(evidence: Evidence) -> Evidence:
    """Return the evidence with the clipping factor c ≤ 1 divided out.

    The absent classes give c away (`_absent_scale`); if they are too few the evidence is returned
    as it is, still `clipped`.
    """
    if not evidence.clipped:
        return evidence
    found = _absent_scale(evidence)
    return evidence if found is None else evidence.scaled(min(found[0], 1.0))


def clipping_remark(e: Evidence) -> str:
    """Tell the reader what became of clipping; empty if there was none."""
    if e.clipped:
        return "clipping could not be undone, too few classes are absent: expect errors"
    if e.clip_factor is not None and e.clipped_per_sample:
        return (
            f"every sample was clipped by a factor of its own; one of {e.clip_factor:.3g} was "
            "divided out for all: expect errors"
        )
    if e.clip_factor is not None:
        return f"clipping undone by an estimated factor of {e.clip_factor:.3g}"
    return ""


# Counts in each regime ---------------------------------------------------------------------


def homogeneous(evidence: Evidence) -> Tensor:
    """Return real-valued counts (C,) for samples that have nearly the same probabilities.

    They follow from the identity with q = softmax(W h̄ + b), and are then refined twice by an
    embedding per class that seems to occur, fitted to G.
    """
    e, eps = evidence, evidence.label_smoothing
    total, share = e.batch_size, evidence.label_smoothing / e.num_classes
    p_shared = e.probabilities(e.shared_embedding)

    def by_identity(q: Tensor) -> Tensor:
        return total * (q - e.known_bias_grad - share) / (1 - eps)

    x = by_identity(p_shared)
    embeddings = e.shared_embedding.repeat(e.num_classes, 1)
    for _ in range(2):
        found = (x > 0.3).nonzero().flatten()
        if not len(found):
            break
        n = x[found]
        residual = e.probabilities(embeddings[found]).T - share
        residual[found, torch.arange(len(found))] -= 1 - eps
        residual *= n  # (C, |S|)
        rest = total * e.weight_grad - torch.outer(residual.sum(1), e.shared_embedding)
        ridge = 0.01 * residual.square().sum(0).mean() + 1e-12
        system = residual.T @ residual + ridge * torch.eye(len(found)).double()
        fitted = e.shared_embedding + torch.linalg.solve(system, residual.T @ rest)
        embeddings[found] = fitted.clamp(min=0) if e.non_negative else fitted
        q = n @ e.probabilities(embeddings[found]) + (total - n.sum()).clamp(min=0) * p_shared
        x = by_identity(q / q.sum())
    return x.clamp(min=0)


def plausible_spread(evidence: Evidence, bounds: Tensor) -> Tensor:
    """Guess the counts (C,): equal for classes known to occur, fewer for likely absent ones."""
    e = evidence
    present = bounds > 0
    if not present.any():
        return torch.full((e.num_classes,), e.batch_size / e.num_classes, dtype=torch.float64)
    absent = (2 * present.sum() * e.hard_bias_grad).clamp(0, 1).square()
    weights = torch.where(present, 1.0, absent)
    return e.batch_size * weights / weights.sum()


def saturated(evidence: Evidence, bounds: Tensor) -> Tensor:
    """Return real-valued counts (C,) for a trained head that is sure of itself on most samples."""
    e = evidence
    excess = e.batch_size * e.hard_bias_grad
    surplus = torch.where(bounds > 0, excess.clamp(min=0), 0.0)
    return plausible_spread(e, bounds) + (-excess).clamp(min=0) - surplus


def prepared(evidence: Evidence) -> tuple[Evidence, Tensor]:
    """Return the evidence with a bias gradient and without clipping, and the lower bounds (C,).

    The bounds are those of the clipped gradient: a shorter gradient only lowers them.
    """
    e = with_bias_gradient(evidence)
    bounds, _ = lower_bounds(e)
    return without_clipping(e), bounds


def counts(evidence: Evidence) -> Estimate:
    """Count by the identity, in the regime that the spread of the logits shows.

    In the saturated regime with B ≥ 4 C, `uniform_labels` alone says more than the gradient: the
    counts are then equal within the bounds.

    Raises ValueError for a head without bias if neither public nor noise features are at hand.
    """
    e, bounds = prepared(evidence)
    spread, limit = logit_spread(e)
    remark = clipping_remark(e)
    if e.signs_only:  # the classes that occur, evenly; all of them where none is known to
        present = bounds > 0 if (bounds > 0).any() else torch.ones_like(bounds, dtype=torch.bool)
        x = present.double() * e.batch_size / present.sum()
        return Estimate(round_counts(x, bounds, e.batch_size), None, remark)
    if spread < limit:
        return Estimate(round_counts(homogeneous(e), bounds, e.batch_size), "homogeneous", remark)
    x = saturated(e, bounds)
    if e.uniform_labels and e.batch_size >= 4 * e.num_classes:
        x = torch.full_like(x, e.batch_size / e.num_classes)
    return Estimate(round_counts(x, bounds, e.batch_size), "saturated", remark)
