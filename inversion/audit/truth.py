"""What the client's gradient and the attack's objective are at the truth: for the auditor only."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inversion.objective import Losses, Objective
from inversion.settings import Weights
from inversion.surrogate import PLACES
from models.batchnorm import batchnorm_layers
from models.comparing import SAME_BATCH, cosine_distance, joint_norm, same_batch_limit
from models.local import local_gradient
from models.target import Target, rounding_error
from utils.shard import ALONE, Shard

#: Share of a flat batch's distance up to which an update can be that of the same images, where its
#: mini-batches came in another order.
OTHER_ORDER = 0.5
#: Share of its loss that an attack still loses in the second half if it is called unfinished.
STILL_FALLING = 0.1
#: What the reason of a walk names that this run itself ended, by the memory it was given.
MEMORY_LIMIT = "--max-memory"
#: Relative difference of norms up to which they are equal but for rounding.
SAME_NORM = 1e-2
#: Cosine distance and norm ratio of an update of several local steps: it is near, but not as long.
NEAR, AS_LONG = 0.5, (0.5, 2.0)


@dataclass(frozen=True)
class TruthCheck:
    """Compares what the client sent with the gradient of the true images."""

    #: Cosine distance between the two, in [0, 2].
    distance: float
    #: Norm of what was sent over that of the true images' gradient.
    norm_ratio: float
    #: "same", "order" (of mini-batches), "protected", "scaled", "opposite", "unnormalised", "other
    #: mode", "near" or "other".
    kind: str
    #: The finding in plain words.
    finding: str

    @property
    def fits(self) -> bool:
        """Whether what was sent can be the gradient of the true images."""
        return self.kind in ("same", "order", "protected", "scaled")


def check_truth_gradient(
    model: nn.Module,
    target: Target,
    x: Tensor,
    y: Tensor,
    shard: Shard = ALONE,
    chunk_size: int | None = None,
) -> TruthCheck:
    """Compare what the client sent with the gradient of the true images.

    model: the attacked network on the device to compute on. x: (B, C, H, W) true images,
    normalised; y: (B,) their labels; the whole batch on every process. Where the client protected
    its gradient the two differ, and only the figures are given. `same_batch_limit` says how near
    the truth's must be. chunk_size: images to take at a time, where BatchNorm does not couple them.
    """

    def compared(images: Tensor, train_mode: bool = target.train_mode) -> tuple[float, float]:
        gradient = _gradient(model, target, images, y, train_mode, shard, chunk_size)
        sent = [g.to(gradient[0]) for g in target.gradient]
        with torch.no_grad():
            distance = cosine_distance(gradient, sent).item()
            return distance, (joint_norm(sent) / joint_norm(gradient)).item()

    distance, ratio = compared(x)
    figures = f"cosine distance {distance:.2g}, norm ratio {ratio:.3g}"

    def finding(kind: str, words: str) -> TruthCheck:
        return TruthCheck(distance, ratio, kind, f"{words} ({figures})")

    if target.protection is not None:
        return finding("protected", "what was sent is protected, so it is not the truth's gradient")
    flat = x.mean((-2, -1), keepdim=True).expand_as(x)
    resolution = target.resolution or rounding_error(target.gradient)
    of_flat = compared(flat)[0]
    limit = same_batch_limit(of_flat, resolution)
    several = target.local is not None
    if distance <= limit and several and abs(ratio - 1) <= SAME_NORM:
        return finding("same", "what was sent is the update of the truth's local steps")
    in_parts = target.local is not None and target.local.batch is not None
    if in_parts and limit < distance <= OTHER_ORDER * of_flat:
        return finding(
            "order",
            "what was sent is nearly the update of the truth's local steps, as where the "
            "mini-batches came in another order",
        )
    if distance <= limit:
        if abs(ratio - 1) <= SAME_NORM:
            return finding("same", "what was sent is the truth's gradient")
        return finding(
            "scaled",
            f"what was sent is the truth's gradient times {ratio:.3g}, as after one local step "
            "with that rate or under a loss scale; if so, give --gradient-scale",
        )
    if 2 - distance <= SAME_BATCH:
        return finding(
            "opposite",
            "what was sent is the truth's gradient with the opposite sign: a weight difference "
            "after minus before a step is minus the rate times the gradient",
        )
    unnormalised = x * target.std.to(x) + target.mean.to(x)
    normalised = (x - target.mean.to(x)) / target.std.to(x)
    if compared(unnormalised)[0] <= limit:
        return finding(
            "unnormalised",
            "what was sent is the gradient of the true images before normalisation: the network "
            "was fed other images than mean and std say",
        )
    if compared(normalised)[0] <= limit:
        return finding(
            "unnormalised",
            "what was sent is the gradient of the true images after normalisation: x_true holds "
            "images that are not normalised",
        )
    # one image may have no batch statistics
    other_mode = bool(batchnorm_layers(model)) and (target.train_mode or len(x) > 1)
    if other_mode and compared(x, not target.train_mode)[0] <= limit:
        mode = "eval" if target.train_mode else "train"
        return finding(
            "other mode", f"what was sent is the truth's gradient with BatchNorm in {mode} mode"
        )
    if distance < NEAR and not AS_LONG[0] <= ratio <= AS_LONG[1]:
        return finding(
            "near",
            "what was sent points nearly where the truth's gradient does but has another length, "
            "as an update of several local steps has",
        )
    return finding(
        "other",
        "what was sent is not the truth's gradient: it belongs to other images, labels or weights, "
        "or was changed",
    )


def _gradient(model, target, x, y, train_mode, shard, chunk_size) -> tuple[Tensor, ...]:
    """Return the gradient of a batch, or the mean one of its local steps, in the given mode."""
    target = replace(target, train_mode=train_mode)
    if target.local is not None:  # every process takes all steps
        return local_gradient(model, x, y, target.loss, target.local)
    objective = Objective(model, target, y, Weights(), batch_shard=shard)
    if not objective.couples_images:
        objective = objective.in_chunks(chunk_size)
    return objective.gradient(x)


@dataclass(frozen=True)
class Arrival:
    """Holds the attack's objective at the truth and at the reconstruction."""

    truth: Losses
    reconstruction: Losses

    @property
    def arrived(self) -> bool:
        """Whether the reconstruction has an objective as low as the truth's."""
        return self.reconstruction.total <= self.truth.total

    @property
    def reason(self) -> str:
        """Why an attack that found nothing did not, in plain words."""
        at_truth, found = self.truth.total, self.reconstruction.total
        if not self.arrived:
            return (
                f"the optimiser did not arrive: the objective is {at_truth:.4g} at the truth and "
                f"{found:.4g} at the reconstruction; more --epochs, another --lr or more --n-seed "
                "may find more"
            )
        return (
            f"this objective does not single the truth out: it is {at_truth:.4g} there and only "
            f"{found:.4g} at the reconstruction; other weights may, more iterations will not"
        )


def arrival(objective: Objective, found: Tensor, x: Tensor, y: Tensor) -> Arrival:
    """Evaluate the attack's objective at its reconstruction and at the truth.

    found: (B, C, H, W) reconstruction in the order of the objective's labels. x, y: the true
    images, normalised, and their labels. The weights are those of the last iteration. At the truth
    a surrogate of several local steps is where it suits best.
    """
    truly = objective.with_labels(y)
    places = [None] if objective.place is None else PLACES
    at_truth = [truly.at_place(place).value(x, 1.0).floats() for place in places]
    best = min(at_truth, key=lambda losses: losses.total)
    return Arrival(best, objective.value(found, 1.0).floats())


@dataclass(frozen=True)
class Finish:
    """Tells the reader of a verdict how the attack ended."""

    #: Share of the gradient loss that was lost in the second half of the iterations, or None.
    fall: float | None
    #: The objective at the truth and at the reconstruction.
    arrival: Arrival
    #: Why it ended early ("interrupted", "not finite"), None where all iterations ran.
    stopped: str | None = None
    #: Why a layerwise attack went no further; None for one that matched gradients.
    walk: str | None = None

    @property
    def reason(self) -> str:
        """Why an attack that found nothing did not, in plain words."""
        if self.walk is not None:
            end = self.walk or "to the image"
            return f"the gradient was solved layer by layer as far as it goes: {end}"
        return self.arrival.reason

    @property
    def doubt(self) -> str | None:
        """Why an attack that found nothing has shown nothing yet, None where there is no reason."""
        if self.arrival.arrived:
            return None
        if self.stopped is not None:
            return f"the attack ended early ({self.stopped})"
        if self.walk is not None:
            limited = MEMORY_LIMIT in self.walk
            return f"solving ended at a limit of this run: {self.walk}" if limited else None
        if self.fall is None:
            return "the attack had one iteration; give more --epochs"
        if self.fall >= STILL_FALLING:
            return "the attack had not finished: its loss was still falling; give more --epochs"
        return None

    @property
    def lines(self) -> list[str]:
        """What is to be read before any verdict."""
        found, true = self.arrival.reconstruction.gradient, self.arrival.truth.gradient
        lines = [f"gradient loss {found:.4g}, at the truth {true:.4g}"]
        if self.fall is not None and self.fall >= STILL_FALLING:
            lines.append(
                f"the loss was still falling: by {100 * self.fall:.0f} % over the second half of "
                "the iterations; more --epochs may find more"
            )
        return lines


def second_half_fall(losses: Sequence[float]) -> float | None:
    """Return the share of the loss that the second half of a run took off; None for one iteration.

    losses: by iteration, some of them left out evenly. The last iterations alone would say little:
    by then the steps are tiny.
    """
    if len(losses) < 2:
        return None
    half = losses[len(losses) // 2 - 1 :]
    few = max(1, len(half) // 8)
    begin, end = statistics.median(half[:few]), statistics.median(half[-few:])
    return 1 - end / begin if begin > 0 else 0.0
