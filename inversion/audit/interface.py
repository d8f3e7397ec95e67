"""An audit from Python: a network and a recorded gradient in, a verdict and pictures out.

It does what run.py does with a checkpoint, from the same functions and under the same rules, for
any `nn.Module`. docs/python.md has a recipe per question.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from inversion.audit.attack import Attacked, attack
from inversion.audit.certificate import Certificate, certificate_of
from inversion.audit.controls import NOT_RUN, Controls, controls_wanted, run_controls
from inversion.audit.flags import parser
from inversion.audit.inputs import (
    PUBLIC_IMAGES,
    Case,
    Sealed,
    check_case,
    make_case,
    public_images,
)
from inversion.audit.report import Report, finish_of, score
from inversion.audit.settings import Settings, settings_from
from inversion.audit.threat import ThreatModel, threat_model
from inversion.audit.truth import check_truth_gradient
from inversion.audit.withhold import WITHHELD, withhold, withhold_from_control
from inversion.labels.reconstruct import LabelInputs, LabelResult, reconstruct_labels
from inversion.settings import AttackSettings, Loop, Weights
from models import checkpoint as checkpoints
from models.checkpoint import Task, make_checkpoint
from models.gradient import ClientLoss, Update, whole_batch_gradient
from models.local import LocalSteps
from models.reading import target_from_checkpoint, truth_from_checkpoint
from models.target import GroundTruth, Protection, Target
from utils.console import Reporter, Silent
from utils.errors import InputError
from utils.files import claim_folder
from utils.images import eight_bit, normalise
from utils.matching import label_numbers
from utils.script import Interrupts
from utils.shard import ALONE

#: The settings of the demo: gradient matching by sign Adam, with total variation in the box.
MATCHING = AttackSettings(
    Weights(priors={"tv": 1e-4}, priors_end={"tv": 1e-6}),
    Loop(steps=3000, lr=0.05, signed=True, keep_best=True),
    boxed=True,
)
#: Solving the gradient layer by layer; nothing but `max_memory` can be chosen.
LAYERWISE = AttackSettings(Weights(), Loop(steps=1, lr=1.0), method="layerwise")
#: Decoys per image that `ground_truth` takes where the pool has as many.
DECOYS = 99


@dataclass(frozen=True)
class Audit:
    """Holds an attack that has run and, where there was a truth, its scores and verdict."""

    settings: Settings
    case: Case
    #: None without a truth, as are the scores.
    sealed: Sealed | None
    attacked: Attacked
    #: The entry `metrics` of result.json.
    scores: dict | None
    #: What run.py would print of the scores.
    text: str
    controls: Controls
    #: Of a layerwise attack, else None.
    certificate: Certificate | None

    @property
    def verdict(self) -> str:
        """One of the four verdicts, or "not judged" without a truth."""
        return "not judged" if self.scores is None else self.scores["verdict"]["verdict"]

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, with its limits."""
        if self.scores is None:
            return "not judged: no truth was given"
        return self.scores["verdict"]["sentence"]

    @property
    def images(self) -> Tensor:
        """The reconstructions as colours, (B, C, H, W); in the order of the truth, if there is one.

        By the pairing of the scores; without a truth in the order of `case.y`, their labels.
        """
        if self.scores is None:
            return self.attacked.images
        return self.attacked.images[[entry["reconstruction"] for entry in self.scores["images"]]]

    @property
    def threat(self) -> ThreatModel:
        """What the attacker had."""
        return threat_model(self.case, self.settings)

    def save(self, folder: str | Path) -> Path:
        """Write the pictures and figures of run.py into `folder`, or `folder-2`, …; return it."""
        place = claim_folder(folder)
        report = Report(place, self.settings, self.case, self.sealed, None, None)
        report.write_attack(self.attacked, self.scores, self.certificate)
        if self.scores is not None and self.controls.found:
            report.write_controls(self.attacked, self.scores, self.controls, self.certificate)
        return place


def audit_gradient(
    model: nn.Module,
    gradient: Update | Sequence[Tensor] | Mapping[str, Tensor],
    task: Task,
    settings: AttackSettings = MATCHING,
    *,
    truth: GroundTruth | None = None,
    labels: Sequence[int] | Tensor | None = None,
    steps: int | None = None,
    protection: Protection | None = None,
    local: LocalSteps | None = None,
    without: Sequence[str] = (),
    controls: bool = True,
    quiet: bool = True,
) -> Audit:
    """Attack a recorded gradient of one batch, and judge what was found.

    model: the network with the weights that the client started from, of any class; it is left as it
    was, and the attack runs where its parameters lie. gradient, task, protection and local: as for
    `models.checkpoint.make_checkpoint`. settings: MATCHING, LAYERWISE or your own; steps: in the
    place of its number of iterations. truth: the batch and what scoring needs besides
    (`ground_truth`); without it nothing is judged. labels: (B,) class indices that the attack goes
    by, or (B, K) numbers under binary cross-entropy; without them those of the truth, or else they
    are reconstructed from the gradient. without: names in WITHHELD, of what the attacker is not
    given. controls: whether the same attack runs again without the client's gradient. quiet: print
    nothing.

    Raises InputError for what does not fit together, or cannot be attacked.
    """
    if steps is not None:
        settings = replace(settings, loop=replace(settings.loop, steps=steps))
    parts = _checked_parts(without, labels)
    checkpoint = make_checkpoint(
        model, gradient, task, protection=protection, truth=truth, local=local
    )
    sent = target_from_checkpoint(checkpoint)
    target, withheld = withhold(sent, parts)
    device = next(model.parameters()).device
    own = copy.deepcopy(model).to(target.gradient[0].dtype)
    truth = truth_from_checkpoint(checkpoint)
    found, y = _labels(own, target, truth, labels, "labels" in parts)
    case = make_case(settings, own, target, y, found, device, ALONE)
    case = replace(case, withheld=withheld)
    check_case(settings, case, "model", "model")
    chosen = _settings(settings, labels, found, parts, scored=truth is not None, controls=controls)
    sealed = None
    if truth is not None:
        sealed = _sealed(withhold_from_control(truth, parts), sent, case)
    with Interrupts() as interrupts:
        return _run(chosen, case, sealed, interrupts, Silent() if quiet else Reporter())


def ground_truth(
    model: nn.Module,
    task: Task,
    images: Tensor,
    labels: Sequence[int] | Tensor,
    pool: Tensor,
    pool_labels: Sequence[int] | Tensor,
    *,
    send: Callable[[Tensor, Tensor], Update | Sequence[Tensor]] | None = None,
    seed: int = 0,
) -> GroundTruth:
    """Put together what a verdict needs: the batch, the gradient of other images, and decoys.

    images: (B, C, H, W) of the batch as colours in [0, 1]; labels: (B,), or (B, K) under binary
    cross-entropy. pool: (N, C, H, W) in [0, 1], other images that could have been in the batch;
    pool_labels: their labels. One image of the pool with the same label stands for each of the
    batch in the control, and up to DECOYS more are its decoys; `seed` draws them, none twice. send:
    what the client sends for normalised images (B, C, H, W) and labels (B,), with its protection if
    it has one; None for the plain gradient.

    Raises InputError where the pool has too few images of a label.
    """
    dtype = next(model.parameters()).dtype
    mean, std = (torch.as_tensor(v, dtype=dtype).view(-1, 1, 1) for v in (task.mean, task.std))
    y, of_pool = (labels_as_tensor(values, task.loss) for values in (labels, pool_labels))
    others, decoys = _drawn(*label_numbers(y, of_pool), seed)
    x_others = normalise(pool[others], mean, std).to(next(model.parameters()).device)
    if send is None:
        control = whole_batch_gradient(model, x_others, y.to(x_others.device), task.loss)
    else:
        sent = send(x_others, y.to(x_others.device))
        control = sent if isinstance(sent, Update) else Update(tuple(sent))
    stored = eight_bit(pool[decoys]) if decoys.numel() else None
    return GroundTruth(normalise(images, mean, std), y, control, stored)


# The parts ---------------------------------------------------------------------------------


def _checked_parts(without: Sequence[str], labels) -> tuple[str, ...]:
    """Return the withheld parts in their order; raise InputError for others."""
    unknown = [name for name in without if name not in WITHHELD]
    if unknown:
        raise InputError(f"without {unknown[0]}: unknown; choose from {', '.join(WITHHELD)}")
    if "labels" in without and labels is not None:
        raise InputError("labels: are withheld; give them or withhold them")
    return tuple(name for name in WITHHELD if name in without)


def _labels(
    model: nn.Module,
    target: Target,
    truth: GroundTruth | None,
    given: Sequence[int] | Tensor | None,
    withheld: bool,
) -> tuple[LabelResult | None, Tensor]:
    """Return the labels (B,) of the attack, after how they were reconstructed, None if known."""
    if given is not None:
        y = labels_as_tensor(given, target.loss)
        checkpoints.check_labels(y, target.batch_size, target.num_classes, target.loss_kind)
        return None, y
    if truth is not None and not withheld:
        return None, truth.y
    public = public_images(PUBLIC_IMAGES, target)
    try:
        found = reconstruct_labels(target, LabelInputs(model, public))
    except ValueError as error:
        raise InputError(f"labels: cannot be reconstructed: {error}; give them") from error
    return found, found.labels


def labels_as_tensor(labels: Sequence | Tensor, loss: ClientLoss) -> Tensor:
    """Return labels as the loss takes them: integers, or under binary cross-entropy floats."""
    y = torch.as_tensor(labels)
    return y.float() if loss.kind == "bce" else y.long()


def _drawn(y: Tensor, pool: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draw for every label of `y` the places of one image, (B,), and of decoys, (B, n)."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    labels, of_pool = map(str, y.tolist()), [str(label) for label in pool.tolist()]
    wanted = Counter(labels)
    places = {label: [i for i in order if of_pool[i] == label] for label in wanted}
    for label, found in places.items():
        if len(found) < wanted[label]:
            raise InputError(
                f"pool: {len(found)} images of label {label} for {wanted[label]} of the batch; "
                "give more"
            )
    others = [places[str(label)].pop() for label in y.tolist()]
    count = min(DECOYS, *(len(found) // wanted[label] for label, found in places.items()))
    decoys = [[places[str(label)].pop() for _ in range(count)] for label in y.tolist()]
    return torch.tensor(others), torch.tensor(decoys, dtype=torch.long)


def _settings(
    attack: AttackSettings, labels, found: LabelResult | None, parts: tuple[str, ...], *,
    scored: bool, controls: bool,
) -> Settings:  # fmt: skip
    """Return settings as a command line of run.py would make them, for the record."""
    base = settings_from(parser().parse_args(["--checkpoint", "-", "--epochs", "1", "--lr", "1"]))
    inputs = replace(
        base.inputs,
        labels=None if labels is None else ",".join(map(str, torch.as_tensor(labels).tolist())),
        labels_from_gradient=found is not None,
        without=parts,
    )
    scoring = replace(base.scoring, metric=scored, controls=controls)
    record = {"interface": "python", "attack": repr(attack), "without": parts}
    return replace(base, attack=attack, inputs=inputs, scoring=scoring, record=record)


def _sealed(truth: GroundTruth, sent: Target, case: Case) -> Sealed:
    """Return what only scoring may see, with the truth's gradient compared with what was sent."""
    sealed = Sealed(truth, None, True, None, (sent.mean, sent.std))
    x, y = sealed.images_for(case), truth.y.to(case.device)
    chunk_size = case.objective.chunk_size
    check = check_truth_gradient(case.objective.model, sent, x, y, chunk_size=chunk_size)
    return replace(sealed, check=check)


def _run(
    settings: Settings,
    case: Case,
    sealed: Sealed | None,
    interrupts: Interrupts,
    reporter: Reporter,
) -> Audit:
    """Attack, run the controls, and score."""
    attacked = attack(settings.attack, case, interrupts, reporter, print_freq=settings.print_freq)
    certificate = certificate_of(case, attacked.recovered, sealed)
    if sealed is None:
        return Audit(settings, case, None, attacked, None, "", NOT_RUN, certificate)
    finish, found = finish_of(settings.attack, case, sealed, attacked), NOT_RUN
    if controls_wanted(settings.scoring, case, attacked, reporter):
        found = run_controls(
            settings.attack, case, sealed, attacked, interrupts, reporter,
            print_freq=settings.print_freq,
        )  # fmt: skip
    scores, text = score(settings.scoring, case, sealed, attacked, finish, found)
    text = "\n".join([*finish.lines, text])
    reporter.say(text)
    return Audit(settings, case, sealed, attacked, scores, text, found, certificate)
