"""The checkpoints of a whole audit: read, paired with their truths, and their labels."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from inversion.audit.budget import Pace
from inversion.audit.inputs import PUBLIC_IMAGES, Case, Sealed, load_inputs, public_images
from inversion.audit.report import notes
from inversion.audit.settings import Settings
from inversion.audit.suite import SUITE, Part, not_applicable, pace_of
from inversion.audit.suite_settings import SuiteSettings
from inversion.labels.reconstruct import LabelInputs, LabelResult, reconstruct_labels
from models import checkpoint as checkpoints
from utils import metrics
from utils.console import Reporter
from utils.errors import InputError, naming, one_line
from utils.files import printable
from utils.shard import ALONE


@dataclass(frozen=True)
class Source:
    """Describes a checkpoint's file."""

    path: str
    #: The sealed truth file that belongs to it; None where it holds its truth itself.
    truth: str | None
    sha256: str
    #: Its id, and when it was captured, as it says; None where it does not.
    id: str | None
    captured: str | None
    #: The client's flags, as the truth's file records them; empty where it does not.
    flags: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return printable(Path(self.path).name)

    @property
    def chosen(self) -> str:
        """How the batch was chosen, in words."""
        flags = self.flags
        if "target_idx" not in flags:
            return "not recorded"
        words = f"batch {flags['target_idx']} of the order that seed {flags.get('seed')} draws"
        distinct = flags.get("distinct_labels")
        return words if distinct is None else f"{words}, {distinct} distinct labels"


@dataclass(frozen=True)
class Subject:
    """Holds a checkpoint that is audited, loaded, checked and timed."""

    source: Source
    settings: Settings
    case: Case
    sealed: Sealed
    #: Name of a part → why the network does not allow it.
    refused: Mapping[str, str]
    pace: Pace

    @property
    def parts(self) -> list[Part]:
        """The parts that can be run."""
        return [part for part in SUITE if part.name not in self.refused]


def load_subjects(settings: SuiteSettings, reporter: Reporter) -> list[Subject]:
    """Load all checkpoints and their truths, and time an iteration on each.

    Raises InputError, naming the file, for what cannot be audited.
    """
    subjects = []
    for source in sources(settings.checkpoints, settings.truths):
        read = settings.reading(source.path, source.truth)
        case, sealed = load_inputs(read, reporter, ALONE, 0)
        assert sealed is not None  # `sources` saw to it
        for line in notes(read, case, sealed):
            reporter.say(f"{source.name}: {line}")
        refused = {p.name: why for p in SUITE if (why := not_applicable(p, case)) is not None}
        subjects.append(Subject(source, read, case, sealed, refused, pace_of(case)))
    return subjects


# Files -------------------------------------------------------------------------------------


def sources(paths: Sequence[str], truths: Sequence[str]) -> list[Source]:
    """Pair every checkpoint with its truth: the one of its id, or its own.

    Without ids, one truth belongs to the one checkpoint. Raises InputError for a checkpoint without
    a truth, and for a truth that belongs to none.
    """
    ids, records = {}, {}
    for path in truths:
        with naming(f"--truth {path}"):
            truth = checkpoints.load_truth(path)
        ids[path], records[path] = _text(truth, "id"), _flags(truth)
    found, used = [], set()
    for path in paths:
        with naming(f"--checkpoint {path}"):
            content = checkpoints.load(path)
        own = [t for t in truths if ids[t] is not None and ids[t] == _text(content, "id")]
        if len(paths) == len(truths) == 1:
            own = list(truths)  # `load_inputs` checks that they belong together
        used |= set(own)
        if not own and content.get("x_true") is None:
            raise InputError(
                f"--audit: {path} holds no truth, without which nothing can be judged; give its "
                "sealed file by --truth"
            )
        flags = records[own[0]] if own else _flags(content)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        number, clock = _text(content, "id"), _text(content, "clock")
        found.append(Source(path, own[0] if own else None, digest, number, clock, flags))
    if surplus := [path for path in truths if path not in used]:
        raise InputError(f"--truth {surplus[0]}: belongs to none of the checkpoints; leave it out")
    return found


def _text(content: Mapping[str, Any], key: str) -> str | None:
    """Return an entry that is text, fit to be printed; None where it is something else."""
    value = content.get(key)
    return printable(value)[:100] if isinstance(value, str) else None


def _flags(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the client's flags that a file records, those of one plain value."""
    flags = content.get("args")
    if not isinstance(flags, dict):
        return {}
    return {
        name: printable(v)[:200] if isinstance(v, str) else v
        for name, v in flags.items()
        if isinstance(v, str | int | float)
    }


# Labels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelFinding:
    """Says what the gradient gives away of the labels."""

    #: Whether the attacks go by labels that they were given.
    known: bool
    #: What the gradient gave; None where no method applies.
    found: LabelResult | None
    #: Why no method applies; empty where one does.
    reason: str
    #: Share of the labels that are right, in [0, 1]; None where no method applies.
    accuracy: float | None
    #: The same share for labels drawn evenly from all classes, in the mean; None for several
    #: labels per image.
    chance: float | None

    @property
    def entry(self) -> dict:
        """The entry `labels` of audit.json."""
        method = f"none: {self.reason}" if self.found is None else self.found.method
        return {
            "known": self.known, "accuracy": self.accuracy, "method": method,
            "chance": self.chance,
        }  # fmt: skip

    @property
    def line(self) -> str:
        """What to print."""
        guess = "" if self.chance is None else f", guessing {100 * self.chance:.1f} %"
        if self.found is None or self.accuracy is None:
            text = f"labels: the gradient gives none ({self.reason}){guess}"
        else:
            text = (
                f"labels from the gradient: {100 * self.accuracy:.1f} % right{guess} "
                f"({self.found.method}, {self.found.seconds:.2f} s)"
            )
        return f"{text}; the attacks go by {'known labels' if self.known else 'these'}"


def label_finding(case: Case, sealed: Sealed) -> LabelFinding:
    """Reconstruct the labels from the gradient, also where the attacks are given them."""
    target, found, reason = case.target, case.labels, ""
    if found is None:
        known = LabelInputs(case.objective.model, public_images(PUBLIC_IMAGES, target))
        try:
            found = reconstruct_labels(target, known)
        except ValueError as error:
            reason = one_line(error)
    y, accuracy, chance = sealed.truth.y, None, None
    if y.dim() == 1:
        chance = chance_of_labels(y, target.num_classes)
        accuracy = None if found is None else metrics.label_accuracy(found.labels, y)
    return LabelFinding(case.labels is None, found, reason, accuracy, chance)


def chance_of_labels(y: Tensor, num_classes: int) -> float:
    """Return the expected `metrics.label_accuracy` of B labels drawn evenly from all classes.

    y: (B,) true labels, n_k of class k; or label vectors (B, K), of which there are 2^K. The drawn
    number of class k is binomial, X ~ (B, 1/K), so the overlap is Σ_k E min(n_k, X) = Σ_k Σ_{j = 1
    … n_k} P(X ≥ j), over B.
    """
    from scipy.stats import binom  # half a second, of an audit alone

    share = 1 / num_classes if y.dim() == 1 else 0.5**num_classes
    counts = y.unique(dim=0, return_counts=True)[1].tolist()
    tail = [float(binom.sf(j, len(y), share)) for j in range(max(counts))]
    return sum(sum(tail[:count]) for count in counts) / len(y)
