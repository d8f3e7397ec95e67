"""Reconstructs the labels of a batch from its gradient, by the method that applies.

A method is a function in LABEL_FUNCTIONS that takes `Evidence` and returns an `Estimate`, the
number of samples of every class; what it needs is the record of the same name in
`inversion.settings.LABEL_METHODS`. Their measured accuracies: docs/results.md.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
from inversion.labels.published import (
    bias_corrected,
    e2egi,
    gradinversion,
    idlg,
    ilrg,
    llg,
)
from inversion.settings import AUTO, LABEL_METHODS
from models.build import find_head
from models.gradient import couples_samples, trainable_parameters
from models.target import Target


@dataclass(frozen=True)
class LabelInputs:
    """Holds what a label method may use besides the target."""

    #: The attacked network; it is left as it was.
    model: nn.Module
    #: (N, C, H, W) normalised public images without labels; 128 or more make the regime sure.
    public: Tensor | None = None
    #: Normalised images (N, C, H, W) and labels (N,) of the attacker's own.
    auxiliary: tuple[Tensor, Tensor] | None = None
    #: Whether the attacker knows that labels are drawn evenly from all classes.
    uniform_labels: bool = False


@dataclass(frozen=True)
class LabelResult:
    """Holds the labels of a batch as a method reconstructed them."""

    #: (B,) integers, in ascending order.
    labels: Tensor
    #: (C,) the least number of samples of every class.
    lower_bounds: Tensor
    #: Whether the lower bounds are facts; otherwise they are likely.
    certain: bool
    #: The method that was used, a name in LABEL_METHODS.
    method: str
    #: Why this method was used, and what the reader of the labels should know.
    reason: str
    #: "homogeneous" or "saturated", as the method judged the head; None if it does not distinguish.
    regime: str | None
    #: Wall time that the reconstruction took.
    seconds: float


#: name in LABEL_METHODS → function.
LABEL_FUNCTIONS: dict[str, Callable[[Evidence], Estimate]] = {
    "e2egi": e2egi,
    "idlg": idlg,
    "gradinversion": gradinversion,
    "llg": llg,
    "bias-corrected": bias_corrected,
    "ilrg": ilrg,
    "counts": counts,
    "counts-aux": auxiliary_counts,
    "counts-bn": auxiliary_counts,
}


def choose_method(
    target: Target, auxiliary: tuple[Tensor, Tensor] | None, model: nn.Module
) -> tuple[str, str]:
    """Choose the method that suits what is at hand.

    `counts-bn` with uploaded BN statistics and at least 20 auxiliary images of every class,
    `counts-aux` with auxiliary images in eval mode unless the model's BatchNorm uses batch
    statistics there too, else `counts`. auxiliary: as in `LabelInputs`. Returns a name in
    LABEL_METHODS and the reason in words.
    """
    if auxiliary is None:
        return "counts", "no auxiliary images given"
    smallest = int(torch.bincount(auxiliary[1], minlength=target.num_classes).min())
    if target.bn_mean is not None and smallest >= IMAGES_FOR_BN:
        return "counts-bn", f"BN statistics were uploaded, {smallest} auxiliary images per class"
    if not (target.train_mode or couples_samples(model, target.train_mode)):
        return "counts-aux", "auxiliary images, BatchNorm in eval mode"
    return "counts", (
        "with batch statistics auxiliary images help only with uploaded BN statistics and "
        f"{IMAGES_FOR_BN} images per class"
    )


def reconstruct_labels(target: Target, inputs: LabelInputs, method: str = AUTO) -> LabelResult:
    """Reconstruct the labels of the target's batch by `method`, a name in LABEL_METHODS or AUTO.

    Nothing is changed, neither the target nor the model nor the images.

    Raises ValueError where the method does not apply: another loss than cross-entropy, no linear
    head, layers behind it, auxiliary images or uploaded statistics that are missing;
    ScaledGradientError where the gradient is too long for any batch of B samples.
    """
    begin = time.perf_counter()
    if target.loss_kind != "cross-entropy":
        raise ValueError(
            "the published counts rest on softmax cross-entropy, whose outputs sum to 1 per image; "
            "under binary cross-entropy the gradient of the head's bias is the mean of the "
            "outputs' probabilities minus that of the labels, and tells only the two together"
        )
    method, reason = _applicable(target, inputs, method)
    needs = LABEL_METHODS[method]
    evidence = gather_evidence(
        inputs.model,
        target,
        public=inputs.public,
        auxiliary=inputs.auxiliary if needs.needs_auxiliary else None,
        use_uploaded_bn=needs.needs_uploaded_bn,
        uniform_labels=inputs.uniform_labels,
    )
    with_bias = with_bias_gradient(evidence)
    if target.local is None:  # local steps may weigh some images more than others
        check_scale(with_bias)
    try:
        estimate = LABEL_FUNCTIONS[method](evidence)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"the equations of {method} have no solution here") from error
    if estimate.remark:
        reason = f"{reason}; {estimate.remark}"
    if evidence.defence:
        reason = f"{reason}; {evidence.defence}"
    bounds, certain = lower_bounds(with_bias)
    if target.local is not None:
        certain = False
        reason = (
            f"{reason}; an update of {target.local.steps} local steps is no gradient, so that "
            "counts and bounds are likely at best"
        )
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


def _applicable(target: Target, inputs: LabelInputs, method: str) -> tuple[str, str]:
    """Return the method that `method` comes to for this target and model, and why."""
    reason = "asked for"
    if method == AUTO:
        method, reason = choose_method(target, inputs.auxiliary, inputs.model)
    name, _ = find_head(inputs.model)
    has_bias_gradient = f"{name}.bias" in trainable_parameters(inputs.model)
    if LABEL_METHODS[method].needs_bias_gradient and not has_bias_gradient:
        return "counts", f"the head has no bias gradient, which {method} needs"
    return method, reason
