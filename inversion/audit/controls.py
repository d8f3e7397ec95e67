"""The same attack without the client's gradient, to set its scores beside."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from inversion.audit.attack import Attacked, asked_to_stop, attack
from inversion.audit.inputs import PUBLIC_IMAGES, Case, Sealed
from inversion.audit.scoring import OTHER_GRADIENT
from inversion.audit.settings import ScoringSettings
from inversion.settings import AttackSettings
from models.target import Target, Update
from utils.console import Reporter, duration
from utils.errors import InputError, StateError
from utils.image_files import public_photographs
from utils.journal import FORGETFUL, Journal
from utils.script import Stop

#: Controls run unasked where the attack takes less, in seconds.
CONTROL_SECONDS = 600


@dataclass(frozen=True)
class Control:
    """Holds what an attack without the client's gradient made."""

    #: (B, C, H, W) in [0, 1].
    images: Tensor
    #: 0 where there was nothing to run, as are the seconds.
    iterations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Controls:
    """Holds the controls that ran, by name, and in words what is missing of them."""

    found: dict[str, Control] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def images(self) -> dict[str, Tensor]:
        """Name → (B, C, H, W) in [0, 1]."""
        return {name: control.images for name, control in self.found.items()}


#: Before the controls have run, or where they do not.
NOT_RUN = Controls(missing=["the controls were not run"])


def controls_wanted(
    scoring: ScoringSettings, case: Case, attacked: Attacked, reporter: Reporter
) -> bool:
    """Return whether to run controls after this attack; the answer is the same on every process."""
    if attacked.interrupted or attacked.failed:
        return False
    if not scoring.metric or scoring.controls is not None:
        return bool(scoring.controls)
    if case.processes.objects(attacked.seconds)[0] > CONTROL_SECONDS:
        reporter.say(
            f"controls: left out, since the attack took over {duration(CONTROL_SECONDS)}; give "
            "--controls to have them"
        )
        return False
    return True


def run_controls(
    settings: AttackSettings,
    case: Case,
    sealed: Sealed,
    attacked: Attacked,
    interrupts: Stop,
    reporter: Reporter,
    *,
    print_freq: int,
    journal: Journal = FORGETFUL,
) -> Controls:
    """Run the same attack as `attacked` without the client's gradient, in three ways.

    "prior only": no gradient, the priors alone, BN to running statistics, since those of the batch
    are the client's too. After a layerwise attack "decoder only" stands in its place: what its
    decoder makes of the mean activation of public photographs. "other gradient": everything as in
    the attack, on the gradient (and BN statistics) of other images with the same labels. "mean
    image": of the public photographs. The labels are those of the attack. A control that cannot be
    run or is interrupted is left out with a printed note, and is missing in the result.

    journal: as in `attack`; each control is a part of it.
    """
    target = case.target
    mean = public_photographs(PUBLIC_IMAGES, target.image_shape).mean(0)
    controls = Controls({"mean image": Control(mean.expand(target.batch_size, -1, -1, -1))})
    plans = []
    if attacked.recovered is None:
        settings = replace(settings, method="matching")
        plans = [("prior only", settings.without_gradient(), target)]
    elif attacked.recovered.decoder_only is not None:
        settings = replace(settings, method="layerwise")
        controls.found["decoder only"] = Control(case.images(attacked.recovered.decoder_only))
    if sealed.truth.control is not None:
        plans.append((OTHER_GRADIENT, settings, _with_update(target, sealed.truth.control)))
    else:
        reporter.say(
            "controls: the checkpoint holds no gradient of other images; capture with training.py "
            "--with-control to compare with one"
        )
    for name, changed, theirs in plans:
        if controls.missing and asked_to_stop(case, interrupts):
            controls.missing.append(f"control {name} was not run")
            continue
        try:
            found = attack(
                changed, case.attacked_by(changed, theirs), interrupts, reporter,
                print_freq=print_freq, title=f"control, {name}: ",
                journal=journal.under(name),
            )  # fmt: skip
        except StateError:
            raise
        except InputError as error:
            reporter.say(f"control, {name}: left out: {error}")
            controls.missing.append(f"control {name} could not be run")
            continue
        if found.interrupted:
            reporter.say(f"control, {name}: interrupted, left out")
            controls.missing.append(f"control {name} was interrupted")
            continue
        outcome, seconds = found.outcome, found.seconds
        controls.found[name] = Control(found.images, outcome.iterations, seconds)
        stopped = (
            f", ended early: {outcome.final.reason}" if outcome.final.reason is not None else ""
        )
        done = "iterations" if found.recovered is None else "tensors"
        reporter.say(
            f"control, {name}: {outcome.iterations} {done} in {duration(seconds)}{stopped}"
        )
    return controls


def _with_update(target: Target, sent: Update) -> Target:
    """Return the target of a client that sent `sent`."""
    return replace(target, gradient=sent.gradient, bn_mean=sent.bn_mean, bn_var=sent.bn_var)
