"""One client of a sweep: simulated, attacked by every attack, scored, told as a row."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from inversion.audit.attack import Attacked, attack
from inversion.audit.controls import run_controls
from inversion.audit.inputs import Case, Sealed, labels_from_gradient, load_inputs
from inversion.audit.report import finish_of, score
from inversion.audit.settings import Settings
from inversion.audit.sweep.row import Job, Result, Row
from inversion.audit.truth import TruthCheck, check_truth_gradient
from inversion.audit.verdict import ALPHA, STRENGTH, corrected
from inversion.settings import AttackSettings
from models.checkpoint import save
from models.guarantee import composed_mu, reconstruction_bound
from utils import metrics
from utils.console import Silent
from utils.device import choose_device
from utils.errors import FaultError, InputError, StateError, is_out_of_memory, one_line
from utils.images import eight_bit
from utils.journal import FORGETFUL, Journal
from utils.matching import label_numbers
from utils.script import Interrupts
from utils.shard import ALONE

#: (parameter, value, repeat, decoys per image and image of the batch, device) → checkpoint with its
#: truth, and the command that makes such a one. It raises InputError for what cannot be captured.
Simulate = Callable[[str, str, int, int, torch.device], tuple[dict, str]]


@dataclass(frozen=True)
class Found:
    """Holds one attack on a client, scored."""

    settings: AttackSettings
    attacked: Attacked
    #: The entry `metrics` of result.json.
    scores: Mapping

    @property
    def strength(self) -> tuple[int, float]:
        """Order attacks, the strongest first."""
        verdict, above = self.scores["verdict"], self.scores["leakage"]
        mean = above[verdict["metric"]]["mean"] if above else -float("inf")
        return STRENGTH.index(verdict["verdict"]), -mean


def decoys_per_image(attempts: int) -> int:
    """Return how many decoys each image needs, per image of the batch, to be identified alone.

    With N candidates each, B images and `attempts` attacks the lowest corrected p of one image
    is about attempts · B / N; a quarter more, because the test draws its cases.
    """
    return int(np.ceil(1.25 * attempts / ALPHA))


def attacks_of(settings: AttackSettings, tv: Sequence[float], repeat: int) -> list[AttackSettings]:
    """Return the attacks on a client, one per weight of total variation, with the repeat's seed.

    A weight at the last iteration keeps its ratio to the first one.
    """
    first = replace(settings, first_seed=settings.first_seed + repeat * settings.num_seeds)
    before, end = settings.weights.priors.get("tv", 0.0), settings.weights.priors_end.get("tv")
    found = []
    for weight in tv:
        priors = {**settings.weights.priors, "tv": weight}
        priors = {name: value for name, value in priors.items() if value != 0}
        ends = {} if end is None or weight == 0 else {"tv": end / before * weight}
        weights = replace(settings.weights, priors=priors, priors_end=ends)
        found.append(replace(first, weights=weights))
    return found or [first]


def run_job(
    settings: Settings,
    simulate: Simulate,
    job: Job,
    folder: Path,
    interrupts: Interrupts,
    journal: Journal = FORGETFUL,
) -> Result | None:
    """Simulate and attack one client; None where it was interrupted.

    folder: where its checkpoint is written. journal: where its attacks are saved on their way.
    What cannot be captured or attacked is a row with the reason.
    """
    start = time.perf_counter()
    try:
        result = _attacked(settings, simulate, job, folder, interrupts, journal)
    except StateError:
        raise
    except (InputError, FaultError) as error:
        result = Result(Row(job.value, job.repeat, reason=one_line(error)))
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        result = Result(Row(job.value, job.repeat, reason="out of memory"))
    if result is None:
        return None
    return replace(result, row=replace(result.row, seconds=time.perf_counter() - start))


def _attacked(
    settings: Settings,
    simulate: Simulate,
    job: Job,
    folder: Path,
    interrupts: Interrupts,
    journal: Journal,
) -> Result | None:
    """Do the work of `run_job`; raises what ends it."""
    sweep = settings.sweep
    assert sweep is not None  # it has jobs
    device = choose_device(settings.inputs.gpu, 0)
    checkpoint, command = simulate(
        sweep.parameter, job.value, job.repeat, decoys_per_image(sweep.attempts), device
    )
    path = folder / f"{sweep.parameter}={_file_name(job.value)}-{job.repeat}-checkpoint.pth.tar"
    save(checkpoint, str(path))
    settings = replace(
        settings,
        inputs=replace(settings.inputs, checkpoint=str(path), truth=None),
        scoring=replace(settings.scoring, metric=True, controls=True),
    )
    case, sealed = load_inputs(settings, Silent(), ALONE, 0)
    assert sealed is not None  # it is scored
    found: list[Found] = []
    for number, attack_settings in enumerate(attacks_of(settings.attack, sweep.tv, job.repeat)):
        theirs = case.attacked_by(attack_settings, case.target)
        one = _scored(
            replace(settings, attack=attack_settings), theirs, sealed, interrupts, sweep.attempts,
            journal.under(str(number)),
        )  # fmt: skip
        if one is None:
            return None
        found.append(one)
    best = min(found, key=lambda one: one.strength)
    row = Row(job.value, job.repeat, reason=None, client=command)
    row = replace(row, **client_fields(settings, case, sealed), **_of_attack(best, found))
    order = [image["reconstruction"] for image in best.scores["images"]]
    images = best.attacked.images[order]
    return Result(row, eight_bit(sealed.colours).numpy(), eight_bit(images).numpy())


def _scored(
    settings: Settings,
    case: Case,
    sealed: Sealed,
    interrupts: Interrupts,
    tests: int,
    journal: Journal,
) -> Found | None:
    """Run one attack of `tests` with its controls, and score it; None where it was interrupted."""
    attacked = attack(
        settings.attack, case, interrupts, Silent(), print_freq=settings.print_freq,
        journal=journal.under("attack"),
    )  # fmt: skip
    if attacked.interrupted:
        return None
    if attacked.failed:
        raise FaultError("no seed had a finite loss at its start: nothing was reconstructed")
    finish = finish_of(settings.attack, case, sealed, attacked)
    controls = run_controls(
        settings.attack, case, sealed, attacked, interrupts, Silent(),
        print_freq=settings.print_freq, journal=journal.under("controls"),
    )  # fmt: skip
    if interrupts.signal is not None:
        return None
    scores, _ = score(settings.scoring, case, sealed, attacked, finish, controls, tests=tests)
    return Found(settings.attack, attacked, scores)


def client_fields(settings: Settings, case: Case, sealed: Sealed) -> dict:
    """Describe the client and what it sent."""
    protection, check = case.target.protection, sealed.check
    assert check is not None  # load_inputs saw to it
    labels, method = _labels(settings, case, sealed)
    candidates = None if sealed.truth.decoys is None else sealed.truth.decoys.shape[1] + 1
    mu = _mu(case)
    return {
        "batch_size": case.target.batch_size,
        "protection": None if protection is None else dict(vars(protection)),
        "epsilon": None if protection is None or case.uploads_bn else protection.epsilon,
        "mu": mu,
        "bound": reconstruction_bound(1 / candidates, mu) if mu and candidates else None,
        "candidates": candidates,
        "cosine": 1 - _distance_from_gradient(case, sealed, check),
        "label_accuracy": labels,
        "label_method": method,
    }


def _distance_from_gradient(case: Case, sealed: Sealed, check: TruthCheck) -> float:
    """Return the cosine distance of what was sent from the true images' gradient, before steps.

    check: its comparison with the truth, which of local steps compares with the truth's steps.
    """
    if case.target.local is None:
        return check.distance
    one_step = replace(case.target, local=None)
    x, y = sealed.images_for(case), sealed.truth.y.to(case.device)
    return check_truth_gradient(case.objective.model, one_step, x, y).distance


def _mu(case: Case) -> float | None:
    """Return μ of all gradients that the client's ε is for; None where nothing bounds attackers."""
    protection = case.target.protection
    if protection is None or protection.mu is None or case.uploads_bn:
        return None  # batch statistics are sent as they are
    return composed_mu(protection.mu, protection.steps or 1)


def _labels(settings: Settings, case: Case, sealed: Sealed) -> tuple[float | None, str]:
    """Return the accuracy of the labels from the gradient, and their method or why there are none.

    The attack goes by them only where the settings ask for that.
    """
    found = case.labels
    if found is None:
        try:
            found = labels_from_gradient(settings.inputs, case.target, case.objective.model)
        except InputError as error:
            return None, one_line(error)
    return metrics.label_accuracy(*label_numbers(found.labels, sealed.truth.y)), found.method


def _of_attack(best: Found, found: Sequence[Found]) -> dict:
    """Describe the strongest attack, with the verdicts of all."""
    scores, verdict = best.scores, best.scores["verdict"]
    metric, above = verdict["metric"], scores["leakage"]
    recovered = best.attacked.recovered
    certified = [] if recovered is None else recovered.certified
    return {
        "tv": best.settings.weights.priors.get("tv", 0.0),
        "verdict": verdict["verdict"],
        "sentence": verdict["sentence"],
        "p": corrected(verdict["p"], verdict["tests"]),
        "smallest_p": corrected(verdict["smallest_p"], verdict["tests"]),
        "identified": verdict["identified"],
        "metric": metric,
        "leakage": above[metric]["images"] if above else (),
        "lowest_control": _lowest_control(scores, metric),
        "arrived": scores["attack"]["arrived"],
        "scores": {name: _values(scores["images"], name) for name in ("psnr", "ssim")},
        "controls": {name: _best_control(scores, name) for name in ("psnr", "ssim")},
        "deepest": certified[-1].name if certified else None,
        "certified": None if recovered is None else len(certified),
        "attempts": [
            {
                "tv": one.settings.weights.priors.get("tv", 0.0),
                "verdict": one.scores["verdict"]["verdict"],
                "p": corrected(one.scores["verdict"]["p"], len(found)),
            }
            for one in found
        ],
    }


def _values(images: Sequence[Mapping], metric: str) -> list[float]:
    """Return a metric per image; the PSNR of an exact image is that which counts in a mean."""
    return [metrics.PSNR_CEILING if image[metric] is None else image[metric] for image in images]


def _best_control(scores: Mapping, metric: str) -> list[float]:
    """Return per image the best value of its controls."""
    return [max(values) for values in _control_values(scores, metric)]


def _lowest_control(scores: Mapping, metric: str) -> list[float]:
    """Return per image how far its lowest control stands above its best one, which is at most 0."""
    return [min(values) - max(values) for values in _control_values(scores, metric)]


def _control_values(scores: Mapping, metric: str) -> list[tuple[float, ...]]:
    """Return per image the values of its controls; there are none without a control."""
    of_all = [
        [metrics.PSNR_CEILING if value is None else value for value in control["images"][metric]]
        for control in (scores["controls"] or {}).values()
        if metric in control["images"]
    ]
    return list(zip(*of_all, strict=True))


def _file_name(value: str) -> str:
    return value.replace("/", "_").replace(":", "_")[:60]
