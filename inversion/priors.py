"""Computes priors on images: what the attacker expects of them, whatever the gradient.

Every prior takes a `Candidate` and returns a differentiable scalar, the same number whatever
the batch size for images alike. A new prior is one function and one line in
PRIOR_FUNCTIONS, and one record in `inversion.settings.PRIORS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """Holds the candidate images, and what priors compare them with."""

    #: (B, C, H, W) normalised images.
    x: Tensor
    #: (mean, var) of the batch at the input of every BatchNorm layer, each (C_l,), on the graph.
    #: Empty unless a prior that `needs_moments` has a weight.
    moments: Sequence[tuple[Tensor, Tensor]] = ()
    #: The moments that they are pulled to, likewise.
    target_moments: Sequence[tuple[Tensor, Tensor]] = ()
    #: (B, C, H, W) images; None outside the combination rounds of MLCO.
    consensus: Tensor | None = None


def total_variation(candidate: Candidate) -> Tensor:
    """Return the anisotropic total variation (Rudin et al., 1992).

    It is the mean absolute difference of horizontal neighbours plus that of vertical neighbours,
    over batch, channels and pixels; ≥ 0, 0 for flat images.
    """
    differences = (candidate.x.diff(dim=-1), candidate.x.diff(dim=-2))
    return sum((d.abs().mean() for d in differences if d.numel()), candidate.x.new_zeros(()))


def bn_statistics(candidate: Candidate) -> Tensor:
    """Return the BatchNorm-statistics prior (DeepInversion, Yin et al., 2020).

    It is Σ over BN layers of ‖mean − mean*‖₂ + ‖var − var*‖₂, with the batch's mean and biased
    variance at the layer's input; ≥ 0.
    """
    return sum(
        torch.linalg.vector_norm(mean - target_mean) + torch.linalg.vector_norm(var - target_var)
        for (mean, var), (target_mean, target_var) in zip(
            candidate.moments, candidate.target_moments, strict=True
        )
    )


def l2_norm(candidate: Candidate) -> Tensor:
    """Return the mean over the images of ‖x_i‖₂ (GradInversion, Yin et al., 2021), ≥ 0."""
    return torch.linalg.vector_norm(candidate.x.flatten(1), dim=1).mean()


def group_consistency(candidate: Candidate) -> Tensor:
    """Return the mean of (x − consensus)² over all elements (GradInversion, Yin et al., 2021), ≥ 0.

    Needs a consensus (`settings.Prior.needs_consensus`).
    """
    assert candidate.consensus is not None
    return (candidate.x - candidate.consensus).square().mean()


#: name in `inversion.settings.PRIORS` → function.
PRIOR_FUNCTIONS: dict[str, Callable[[Candidate], Tensor]] = {
    "tv": total_variation,
    "bn": bn_statistics,
    "group": group_consistency,
    "norm": l2_norm,
}
