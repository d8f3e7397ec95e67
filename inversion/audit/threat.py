"""What the attacker of a run has, as data: a table, and the letter of a published taxonomy.

The letters are the threat models of Carletti, Foggia, Mazzocca, Parrella and Vento, "SoK: Gradient
Inversion Attacks in Federated Learning" (USENIX Security 2025). Each grants some of seven kinds of
knowledge and power; docs/threat.md says which, and how they are read here.
"""

from dataclasses import dataclass

from inversion.audit.inputs import Case
from inversion.audit.settings import Settings
from inversion.audit.withhold import ASSUMED, normalisation_in_words
from inversion.settings import AttackSettings
from models.batchnorm import batchnorm_layers
from models.target import Target

#: Letter → name, of the passive attackers of the taxonomy. F, G and H manipulate the model or
#: choose clients, which nothing here does.
PASSIVE = {
    "A": "eavesdropper",
    "B": "informed eavesdropper",
    "C": "parameter-aware eavesdropper",
    "D": "data-enhanced eavesdropper",
    "E": "statistical-informed eavesdropper",
}
#: Names of tensors or colours that a line lists.
LISTED = 2
#: What, whether the attacker has it ("yes", "no", "given" by the auditor, "withheld"), a detail.
Row = tuple[str, str, str]


@dataclass(frozen=True)
class ThreatModel:
    """Says what the attacker of one run has, and which published attacker is allowed as much."""

    #: The first letter of PASSIVE that grants all that the attack uses.
    letter: str
    #: What needs that letter, in words.
    reason: str
    #: One row per kind of knowledge.
    rows: tuple[Row, ...]

    @property
    def lines(self) -> list[str]:
        """The table as printed, a line each."""
        name = max(len(row[0]) for row in self.rows)
        has = max(len(row[1]) for row in self.rows)
        head = (
            f"what the attacker has: threat model {self.letter}, {PASSIVE[self.letter]} "
            f"({self.reason})"
        )
        return [head, *(f"  {row[0]:<{name}}  {row[1]:<{has}}  {row[2]}" for row in self.rows)]

    @property
    def entry(self) -> dict:
        """The entry `threat` of result.json."""
        return {
            "letter": self.letter,
            "name": PASSIVE[self.letter],
            "reason": self.reason,
            "rows": [list(row) for row in self.rows],
        }


def threat_model(case: Case, settings: Settings) -> ThreatModel:
    """Tell what the attacker of this run has: by the case, and by what the settings make of it."""
    letter, reason = _letter(case, settings)
    rows = (
        _sent(case, settings),
        _tensors(case),
        _statistics(case, settings.attack),
        _labels(case, settings),
        ("batch", "yes", f"{case.target.batch_size} images {case.target.image_shape}"),
        _normalisation(case),
        _network(case),
        _training(case),
        _protection(case),
        _images(case, settings),
    )
    return ThreatModel(letter, reason, rows)


# The rows ----------------------------------------------------------------------------------


def _sent(case: Case, settings: Settings) -> Row:
    scale, local = settings.inputs.gradient_scale, case.target.local
    what, detail = "gradient", "of one batch"
    if local is not None:
        what, detail = "update", f"of {local.steps} local step(s) at rate {local.lr:g}"
    if scale != 1:
        detail += f", divided by its factor {scale:g}"
    if settings.inputs.shuffled:
        detail += ", its numbers shuffled"
    return what, "yes", detail


def _tensors(case: Case) -> Row:
    parameters = dict(case.objective.model.named_parameters())
    missing = [name for name, p in parameters.items() if not p.requires_grad]
    numbers = f"{sum(g.numel() for g in case.target.gradient):,} numbers"
    masks = case.target.sent
    if masks is not None:
        numbers = f"{sum(int(mask.sum()) for mask in masks):,} of {numbers}"
    if not missing:
        return "tensors", "yes", f"all {len(parameters)}, {numbers}"
    listed = ", ".join(missing[:LISTED]) + (", …" if len(missing) > LISTED else "")
    sent = len(parameters) - len(missing)
    return "tensors", "yes", f"{sent} of {len(parameters)}, {numbers}; not {listed}"


def _statistics(case: Case, attack: AttackSettings) -> Row:
    what = "BN statistics"
    if not batchnorm_layers(case.objective.model):
        return what, "no", "the network has no BatchNorm layer"
    used = _uses_of_statistics(case, attack)
    if case.target.bn_mean is not None:
        return what, "yes", f"of the batch, sent; {'; '.join(used) or 'not used'}"
    has = "withheld" if "bn" in case.withheld else "no"
    detail = f"{case.withheld['bn']}; " if has == "withheld" else ""
    return what, has, f"{detail}{'; '.join(used) or 'only the running ones of the network'}"


def _uses_of_statistics(case: Case, attack: AttackSettings) -> list[str]:
    """Say what the attack does with statistics of BatchNorm, running ones or the batch's."""
    target, uses = case.target, []
    if case.bn_source is not None:
        which = "those of the batch" if case.bn_source == "batch" else "the network's running ones"
        uses.append(f"the BN prior pulls to {which}")
    if attack.bn_coupling == "forced":
        uses.append("BatchNorm is forced to them")
    if attack.method != "matching" and target.train_mode and target.bn_mean is not None:
        uses.append("the layers are solved with them")
    if case.labels is not None and case.labels.method == "counts-bn":
        uses.append("the labels are found with them")
    return uses


def _labels(case: Case, settings: Settings) -> Row:
    if case.labels is None:
        where = "from the truth" if settings.inputs.labels is None else "by hand"
        return "labels", "given", where
    has = "withheld" if "labels" in case.withheld else "no"
    prior = ", known to be drawn evenly" if settings.inputs.uniform_labels else ""
    return "labels", has, f"reconstructed from the gradient by {case.labels.method}{prior}"


def _normalisation(case: Case) -> Row:
    if "normalisation" not in case.withheld:
        return "normalisation", "yes", normalisation_in_words(case.target)
    detail = f"{ASSUMED:g} is assumed; {case.withheld['normalisation']}"
    return "normalisation", "withheld", detail


def _network(case: Case) -> Row:
    target = case.target
    return "network", "yes", f"{target.network}, {target.num_classes} classes, with its weights"


def _training(case: Case) -> Row:
    target = case.target
    kind = "binary cross-entropy" if target.loss_kind == "bce" else "cross-entropy"
    mode = f"{'train' if target.train_mode else 'eval'} mode, mean {kind}"
    smoothing = f", label smoothing {target.label_smoothing:g}" if target.label_smoothing else ""
    return "loss", "yes", mode + smoothing


def _protection(case: Case) -> Row:
    protection = case.target.protection
    if protection is not None:
        return "protection", "yes", f"reported: {protection.description}"
    if case.protected:
        return "protection", "withheld", f"none is assumed; {case.withheld['protection']}"
    return "protection", "no", "the client reports none"


def _images(case: Case, settings: Settings) -> Row:
    uses = _uses_of_images(case, settings)
    return "other images", "yes" if uses else "no", "; ".join(uses) or "none of any kind"


def _uses_of_images(case: Case, settings: Settings) -> list[str]:
    """Say for what the attack uses images that are none of the client's."""
    uses = []
    if settings.attack.method != "matching":
        uses.append("public photographs, for the decoder")
    if settings.inputs.label_images is not None:
        uses.append("labelled images of its own, for the labels")
    elif case.labels is not None:
        uses.append("public photographs, for the labels")
    if settings.search is not None:
        uses.append("a simulated batch of its own, for the settings")
    return uses


# The letter --------------------------------------------------------------------------------


def _letter(case: Case, settings: Settings) -> tuple[str, str]:
    """Return the first letter that grants all that the attack uses, and what needs it."""
    target = case.target
    distribution = _uses_of_statistics(case, settings.attack)
    if settings.inputs.uniform_labels:
        distribution.append("labels are drawn evenly")
    for letter, needs in (
        ("E", distribution),
        ("D", _uses_of_images(case, settings)),
        ("C", _training_details(target, settings)),
        ("B", _knowledge_of_images(settings.attack)),
    ):
        if needs:
            return letter, needs[0]
    return "A", "nothing but what was sent and the network"


def _training_details(target: Target, settings: Settings) -> list[str]:
    """Name what the attacker knows of the client's training beyond its batch and its mode."""
    details = []
    if target.local is not None:
        details.append("number and rate of the local steps are known")
    if target.label_smoothing:
        details.append("the client's label smoothing is known")
    if target.protection is not None:
        details.append("the client's protection is known")
    if settings.inputs.gradient_scale != 1:
        details.append("the client's loss scale is known")
    return details


def _knowledge_of_images(attack: AttackSettings) -> list[str]:
    """Name what the attack takes for granted about images in general."""
    names = [name for name in attack.prior_names if name != "bn"]
    known = [f"priors on images: {', '.join(names)}"] if names else []
    return [*known, "the range of colours is known"] if attack.boxed else known
