"""The positive control of an audit: the suite's own attack where it must succeed.

An attack that finds nothing shows nothing until the same attack, with the same budget, has found
something where there is something to find.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inversion.audit.inputs import Case, Sealed, make_case
from inversion.audit.suite import (
    FEWEST_ITERATIONS,
    POSITIVE_WEIGHT,
    Done,
    Part,
    Run,
    matching_settings,
    plan_of,
    run_part,
)
from inversion.audit.truth import check_truth_gradient
from inversion.audit.verdict import RECONSTRUCTION
from models.build import build_model
from models.checkpoint import Task, make_checkpoint
from models.gradient import ClientLoss, whole_batch_gradient
from models.reading import target_from_checkpoint, truth_from_checkpoint
from models.target import GroundTruth
from utils.image_files import PUBLIC_PHOTOS, public_photographs
from utils.images import eight_bit, normalise
from utils.journal import reading
from utils.shard import ALONE

#: The network, its images, the longest side of these and the decoys per image.
ARCHITECTURE, IMAGES, LONGEST_SIDE, DECOYS = "lenet", 4, 32, 49
#: Draws the crops; the mean image and the decoders are made of crops of another seed.
CROPS_SEED = 1
#: Mean and standard deviation of the normalisation, of every channel.
MEAN, STD = 0.5, 0.25
#: The part as which it runs; it has no limit of its own on the iterations.
PART = Part("positive control", "matching", POSITIVE_WEIGHT)


@dataclass(frozen=True)
class Positive:
    """Holds what the positive control came to."""

    passed: bool
    #: What ran, in words.
    what: str
    #: What its attack found; None where it had no time.
    done: Done | None
    seconds: float = 0.0

    @property
    def iterations(self) -> int:
        """How many its attack took."""
        return 0 if self.done is None else self.done.iterations

    @property
    def fact(self) -> dict[str, Any]:
        """The same as plain values and tensors, for a journal."""
        return {**vars(self), "done": None if self.done is None else self.done.fact}

    @classmethod
    def of_fact(cls, fact: dict[str, Any]) -> "Positive":
        """Return what a `fact` was made of; raises StateError where it is none."""
        with reading(PART.name):
            done = None if fact["done"] is None else Done.of_fact(PART, fact["done"])
            return cls(**{**fact, "done": done})

    @property
    def entry(self) -> dict:
        """The entry `positive_control` of audit.json."""
        scores = None if self.done is None else self.done.scores
        return {
            "passed": self.passed,
            "what": self.what,
            "verdict": "incomplete" if scores is None else scores["verdict"]["verdict"],
            "leakage": None if scores is None else scores["leakage"],
            "seconds": self.seconds,
        }


def crops(image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the batch, its decoys and other images out of public photographs, all in [0, 1].

    Image i, its decoys and the other image of its label are crops of photograph i, all drawn in
    the same way, so that under the null hypothesis each is as likely to be the true one.

    Returns (B, C, H, W), (B, N, C, H, W) of uint8, (B, C, H, W).
    """
    turns, photographs = DECOYS + 2, len(PUBLIC_PHOTOS)
    drawn = public_photographs(turns * photographs, image_shape, seed=CROPS_SEED)
    drawn = drawn.view(turns, photographs, *drawn.shape[1:])[:, :IMAGES].transpose(0, 1)
    return drawn[:, 0], eight_bit(drawn[:, 2:]), drawn[:, 1]


def positive_case(
    image_shape: tuple[int, int, int], seed: int, device: torch.device, like: Sealed
) -> tuple[Case, Sealed]:
    """Make a client whose gradient gives its batch away: a LeNet, known labels, no defence.

    image_shape: (C, H, W) of the audited images; larger ones are taken at LONGEST_SIDE. seed: of
    the network's weights. like: whose LPIPS scores it too.
    """
    channels, height, width = image_shape
    shape = channels, min(height, LONGEST_SIDE), min(width, LONGEST_SIDE)
    batch, decoys, others = crops(shape)
    mean, std = (torch.full((channels, 1, 1), value) for value in (MEAN, STD))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(ARCHITECTURE, len(PUBLIC_PHOTOS), shape)
    loss, y = ClientLoss(train_mode=False), torch.arange(IMAGES)
    x, x_others = normalise(batch, mean, std), normalise(others, mean, std)
    truth = GroundTruth(x, y, whole_batch_gradient(model, x_others, y, loss), decoys)
    task = Task(
        ARCHITECTURE, IMAGES, shape, len(PUBLIC_PHOTOS), [MEAN] * channels, [STD] * channels, loss
    )
    checkpoint = make_checkpoint(model, whole_batch_gradient(model, x, y, loss), task, truth=truth)
    target, model = target_from_checkpoint(checkpoint), model.to(device)
    settings = matching_settings(target, FEWEST_ITERATIONS, seed)
    case = make_case(settings, model, target, y, None, device, ALONE)
    stored = truth_from_checkpoint(checkpoint)
    assert stored is not None  # it was made above
    check = check_truth_gradient(model, target, x.to(device), y.to(device))
    return case, Sealed(stored, check, True, like.lpips_score, (mean, std))


def positive_control(
    image_shape: tuple[int, int, int],
    iterations: int,
    seconds: float,
    seed: int,
    device: torch.device,
    like: Sealed,
    run: Run,
) -> Positive:
    """Attack the positive control with `iterations`, or as many as fit into `seconds`.

    iterations: the fewest that an audited checkpoint is to get of the longest attack. It passes if
    the verdict, by the same tests and corrections, is that of a reconstruction.
    """
    start = time.perf_counter()
    case, sealed = positive_case(image_shape, seed, device, like)
    plan = plan_of(PART, case, seconds - (time.perf_counter() - start), iterations, run.journal)
    size = "×".join(map(str, case.target.image_shape))
    what = f"{IMAGES} public photographs of {size}, {ARCHITECTURE}, undefended gradient"
    if plan.steps < FEWEST_ITERATIONS:
        short = f"{what}: not {FEWEST_ITERATIONS} iterations fit into its time"
        return Positive(False, short, None)
    settings = matching_settings(case.target, plan.steps, seed)
    done = run_part(PART, settings, case, sealed, plan.seconds, run)
    passed = done.verdict.get("verdict") == RECONSTRUCTION
    taken = time.perf_counter() - start
    return Positive(passed, f"{what}, {plan.steps:,} iterations", done, taken)
