"""The published rules for the labels of a batch, each as its paper states it.

Every rule reads the gradient of the classifier head in `Evidence` and returns an `Estimate`, whose
counts are (C,) integers ≥ 0 that sum to B. None of them knows noise, clipping or label smoothing;
the counts of inversion/labels/counts.py do.
"""

import torch
from torch import Generator, Tensor

from inversion.labels.counts import Estimate, round_counts, with_bias_gradient
from inversion.labels.evidence import Evidence


def e2egi(evidence: Evidence) -> Estimate:
    """Apply E2EGI's rule (JBHI 2023): row sums s of G, and m = C · max s / B per label."""
    s = evidence.weight_grad.sum(1)
    m = evidence.num_classes * s.max().clamp(min=0) / evidence.batch_size
    return Estimate(_one_by_one(s, m, evidence.batch_size))


def idlg(evidence: Evidence) -> Estimate:
    """Apply iDLG's rule (arXiv 2001.02610): one label per negative row sum, the rest at random."""
    s, total = evidence.weight_grad.sum(1), evidence.batch_size
    n = torch.zeros(len(s), dtype=torch.long)
    n[s.argsort()[: min(total, int((s < 0).sum()))]] = 1
    missing = total - int(n.sum())
    drawn = torch.randint(len(s), (missing,), generator=Generator().manual_seed(0))
    return Estimate(n + torch.bincount(drawn, minlength=len(s)))


def gradinversion(evidence: Evidence) -> Estimate:
    """Apply GradInversion's rule (arXiv 2104.07586).

    The batch holds the B classes with the smallest entry in their row of G, one sample each. Where
    B > C every class gets ⌊B / C⌋ samples and those with the smallest entries one more.
    """
    order = evidence.weight_grad.min(1).values.argsort()
    n = torch.full((len(order),), evidence.batch_size // len(order))
    n[order[: evidence.batch_size % len(order)]] += 1
    return Estimate(n)


def llg(evidence: Evidence) -> Estimate:
    """Apply LLG's rule (arXiv 2105.09369): row sums s, m = Σ_{s<0} s · (1 + 1/C) / B per label."""
    s = evidence.weight_grad.sum(1)
    m = -s.clamp(max=0).sum() * (1 + 1 / evidence.num_classes) / evidence.batch_size
    return Estimate(_one_by_one(s, m, evidence.batch_size))


def bias_corrected(evidence: Evidence) -> Estimate:
    """Apply LLG's rule to the bias gradient g instead, with m = Σ_{g<0} g / B per label."""
    g = with_bias_gradient(evidence).known_bias_grad
    return Estimate(
        _one_by_one(g, -g.clamp(max=0).sum() / evidence.batch_size, evidence.batch_size)
    )


def ilrg(evidence: Evidence) -> Estimate:
    """Apply iLRG (Ma et al., ICLR 2023).

    The embeddings G_k / g_k give the probabilities P_k of every class, and B g = (Pᵀ − I) n with
    Σ n = B is solved for the counts n by the pseudo-inverse.

    Raises torch.linalg.LinAlgError where that fails.
    """
    e = with_bias_gradient(evidence)
    bias_grad = e.known_bias_grad
    g = bias_grad.masked_fill(bias_grad == 0, torch.inf)
    p = e.probabilities((e.weight_grad / g[:, None]).clamp(-1e10, 1e10))
    count = e.num_classes
    system = torch.cat([p.T - torch.eye(count, dtype=torch.float64), torch.ones(1, count).double()])
    right = e.batch_size * torch.cat([bias_grad, torch.ones(1).double()])
    n = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:, 0]
    none = torch.zeros(count, dtype=torch.long)
    return Estimate(round_counts(n.clamp(min=0), none, e.batch_size))


def _one_by_one(scores: Tensor, share: Tensor, total: int) -> Tensor:
    """Deal out `total` labels by scores (C,), of which negative ones show that a class occurs.

    First one label per negative score, the smallest scores first; then always one to the smallest
    score. Every label adds `share` ≥ 0 to its score. Returns counts (C,) that sum to `total`.
    """
    scores = scores.clone()
    n = torch.zeros(len(scores), dtype=torch.long)
    first = scores.argsort()[: min(total, int((scores < 0).sum()))]
    n[first] += 1
    scores[first] += share
    for _ in range(total - len(first)):
        k = scores.argmin()
        n[k] += 1
        scores[k] += share
    return n
