"""Labels of a batch from its gradient: the published rules, and counts by the identity.

A method looks at `Evidence` and gives the number of samples of every class. Accuracies that belong
to each of them, measured: docs/results.md.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from inversion.labels.auxiliary_counts import IMAGES_FOR_BN, auxiliary_counts
from inversion.labels.counts import (
    Estimate,
    check_scale,
    counts,
    lower_bounds,
    round_counts,
    with_bias_gradient,
)
from inversion.labels.evidence import Evidence, gather_evidence
from models.build import find_head
from models.gradient import couples_samples, trainable_parameters
from models.target import Target


@dataclass(frozen=True)
class LabelInputs:
    """What a method may use besides the target.

    model: the attacked network. public: (N, C, H, W) normalised public images without labels, at
    least 128 for a sure regime. auxiliary: normalised images (N, C, H, W) and labels (N,) of the
    attacker's own. uniform_labels: labels are known to be drawn uniformly from all classes.
    """

    model: nn.Module
    public: Tensor | None = None
    auxiliary: tuple[Tensor, Tensor] | None = None
    uniform_labels: bool = False


@dataclass(frozen=True)
class LabelResult:
    """labels: (B,) integers, ascending. lower_bounds: (C,) least number of every class; `certain`
    says whether that is a fact or likely. method: the one used, reason: why. regime: what the
    method took the head for, None where it makes no difference to it."""

    labels: Tensor
    lower_bounds: Tensor
    certain: bool
    method: str
    reason: str
    regime: str | None
    seconds: float


def e2egi(evidence: Evidence, inputs: LabelInputs) -> Estimate:
    """E2EGI's rule (JBHI 2023): row sums s, a label's share m = C · max s / B."""
    s = evidence.weight_grad.sum(1)
    m = evidence.num_classes * s.max().clamp(min=0) / evidence.batch_size
    return Estimate(_one_by_one(s, m, evidence.batch_size))


def idlg(evidence: Evidence, inputs: LabelInputs) -> Estimate:
    """iDLG (arXiv 2001.02610): one label for every negative row sum, topped up at random."""
    s, total = evidence.weight_grad.sum(1), evidence.batch_size
    n = torch.zeros(len(s), dtype=torch.long)
    n[s.argsort()[: min(total, int((s < 0).sum()))]] = 1
    missing = total - int(n.sum())
    drawn = torch.randint(len(s), (missing,), generator=Generator().manual_seed(0))
    return Estimate(n + torch.bincount(drawn, minlength=len(s)))


def gradinversion(evidence: Evidence, inputs: LabelInputs) -> Estimate:
    """GradInversion (arXiv 2104.07586): the B classes with the smallest entry in their row of G.

    Where B > C every class gets ⌊B / C⌋ and the smallest one more.
    """
    order = evidence.weight_grad.min(1).values.argsort()
    n = torch.full((len(order),), evidence.batch_size // len(order))
    n[order[: evidence.batch_size % len(order)]] += 1
    return Estimate(n)


def llg(evidence: Evidence, inputs: LabelInputs) -> Estimate:
    """LLG (arXiv 2105.09369): row sums s, a share m = Σ_{s<0} s · (1 + 1/C) / B."""
    s = evidence.weight_grad.sum(1)
    m = -s.clamp(max=0).sum() * (1 + 1 / evidence.num_classes) / evidence.batch_size
    return Estimate(_one_by_one(s, m, evidence.batch_size))


def bias_corrected(evidence: Evidence, inputs: LabelInputs) -> Estimate:
    """LLG's rule on the bias gradient, with m = Σ_{g<0} g / B."""
    g = with_bias_gradient(evidence).bias_grad
    return Estimate(
        _one_by_one(g, -g.clamp(max=0).sum() / evidence.batch_size, evidence.batch_size)
    )


def _one_by_one(scores: Tensor, share: Tensor, total: int) -> Tensor:
    """One label for every negative score, the smallest first; then again and again for the
    smallest, every label given adding `share` ≥ 0. Counts (C,) that sum to `total`."""
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


def ilrg(evidence: Evidence, inputs: LabelInputs) -> Estimate:
    """iLRG (Ma et al., ICLR 2023): embeddings G_k / g_k give every class's probabilities P_k, and
    B g = (Pᵀ − I) n with Σ n = B is solved by the pseudo-inverse."""
    e = with_bias_gradient(evidence)
    g = torch.where(e.bias_grad == 0, torch.inf, e.bias_grad)
    p = e.probabilities((e.weight_grad / g[:, None]).clamp(-1e10, 1e10))
    count = e.num_classes
    system = torch.cat([p.T - torch.eye(count, dtype=torch.float64), torch.ones(1, count).double()])
    right = e.batch_size * torch.cat([e.bias_grad, torch.ones(1).double()])
    n = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:, 0]
    none = torch.zeros(count, dtype=torch.long)
    return Estimate(round_counts(n.clamp(min=0), none, e.batch_size))


def counts_by_identity(evidence: Evidence, inputs: LabelInputs) -> Estimate:
    """The identity n_k = B (q_k − g_k): `inversion.counts.counts`."""
    return counts(evidence, uniform_labels=inputs.uniform_labels)


def counts_with_auxiliary(evidence: Evidence, inputs: LabelInputs) -> Estimate:
    """Counts by labelled auxiliary images: `inversion.auxiliary_counts`."""
    return auxiliary_counts(evidence)


#: `--label-method`: name → function(evidence, inputs) → Estimate.
LABEL_STRATEGIES: dict[str, Callable[[Evidence, LabelInputs], Estimate]] = {
    "e2egi": e2egi,
    "idlg": idlg,
    "gradinversion": gradinversion,
    "llg": llg,
    "bias-corrected": bias_corrected,
    "ilrg": ilrg,
    "counts": counts_by_identity,
    "counts-aux": counts_with_auxiliary,
    "counts-bn": counts_with_auxiliary,
}

#: `--label-method auto`: choose as `choose_method` says.
AUTO = "auto"


def choose_method(
    target: Target, auxiliary: tuple[Tensor, Tensor] | None, model: nn.Module
) -> tuple[str, str]:
    """The method that suits what is at hand, a name in LABEL_STRATEGIES, and why.

    `counts-bn` with uploaded BN statistics and at least 20 auxiliary images of every class,
    `counts-aux` with auxiliary images in eval mode unless the model's BatchNorm uses batch
    statistics there too, else `counts`.
    """
    if auxiliary is None:
        return "counts", "no auxiliary images given"
    smallest = int(torch.bincount(auxiliary[1], minlength=target.num_classes).min())
    if target.bn_mean is not None and smallest >= IMAGES_FOR_BN:
        return "counts-bn", f"BN statistics were uploaded, {smallest} auxiliary images a class"
    if not (target.train_mode or couples_samples(model, target.train_mode)):
        return "counts-aux", "auxiliary images, BatchNorm in eval mode"
    return "counts", (
        "with batch statistics auxiliary images help only with uploaded BN statistics and "
        f"{IMAGES_FOR_BN} images a class"
    )


def _has_bias_gradient(model: nn.Module) -> bool:
    name, _ = find_head(model)
    return f"{name}.bias" in trainable_parameters(model)


def reconstruct_labels(target: Target, inputs: LabelInputs, method: str = AUTO) -> LabelResult:
    """Reconstruct the labels of the target's batch by `method`, a name in LABEL_STRATEGIES or auto.

    Nothing is changed, neither the target nor the model nor the images.

    Raises ValueError where the method does not apply: no linear head, layers behind it, auxiliary
    images or uploaded statistics that are missing; ScaledGradientError where the gradient is too
    long for any batch of B samples.
    """
    begin = time.perf_counter()
    reason = "asked for"
    if method == AUTO:
        method, reason = choose_method(target, inputs.auxiliary, inputs.model)
    if method in ("counts-aux", "counts-bn") and not _has_bias_gradient(inputs.model):
        method, reason = "counts", f"the head has no bias gradient, which {method} needs"
    use_bn = method == "counts-bn"
    if use_bn and target.bn_mean is None:
        raise ValueError("the client uploaded no BatchNorm statistics")
    evidence = gather_evidence(
        inputs.model,
        target,
        public=inputs.public,
        auxiliary=inputs.auxiliary if method.startswith("counts-") else None,
        use_uploaded_bn=use_bn,
    )
    with_bias = with_bias_gradient(evidence)
    check_scale(with_bias)
    try:
        estimate = LABEL_STRATEGIES[method](evidence, inputs)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"the equations of {method} have no solution here") from error
    if estimate.remark:
        reason = f"{reason}; {estimate.remark}"
    bounds, certain = lower_bounds(with_bias)
    if not certain and bounds.sum() > target.batch_size:  # what is likely, but cannot be
        bounds = round_counts(estimate.counts.double(), bounds, target.batch_size)
    return LabelResult(
        labels=torch.repeat_interleave(torch.arange(evidence.num_classes), estimate.counts),
        lower_bounds=bounds,
        certain=certain,
        method=method,
        reason=reason,
        regime=estimate.regime,
        seconds=time.perf_counter() - begin,
    )
