"""The suite of a whole audit: its parts as data, their attacks' settings, and running one."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from inversion.audit.attack import Attacked, attack
from inversion.audit.budget import ELAPSED, OF_THE_ATTACK, Deadline, Pace, Watch
from inversion.audit.certificate import certificate_of
from inversion.audit.controls import Controls, run_controls
from inversion.audit.inputs import Case, Sealed
from inversion.audit.plan import measured_step
from inversion.audit.report import finish_of, score
from inversion.audit.settings import ScoringSettings
from inversion.audit.verdict import corrected
from inversion.layerwise.attack import target_network
from inversion.optimise import Outcome
from inversion.saved import SavedSeed, plain_seed, seed_from
from inversion.settings import AttackSettings, Loop, Weights
from models.comparing import float64_norm
from models.target import Target
from utils.console import Reporter
from utils.errors import InputError, StateError
from utils.journal import FORGETFUL, Journal, reading
from utils.script import Interrupts


@dataclass(frozen=True)
class Part:
    """Describes one attack of the suite."""

    name: str
    #: "layerwise" or "matching".
    method: str
    #: Share of the time, relative to the other parts'.
    weight: float
    #: Iterations that it runs at most; it leaves the rest of its time to later parts.
    most: int = 0
    #: Whether it takes the prior against noise where the client reports noise.
    resists_noise: bool = False


#: The attacks on every checkpoint, in their order; their number is that of the tests.
SUITE = (
    Part("layerwise", "layerwise", 5.0),
    Part("matching, short", "matching", 1.0, 3_000),
    Part("matching, long", "matching", 3.0, 30_000, resists_noise=True),
)
#: Weight of the positive control, once per audit.
POSITIVE_WEIGHT = 2.0
#: Fewer iterations than these are not worth a run.
FEWEST_ITERATIONS = 2

#: A step below so many seconds is measured again, as the median of several.
QUICK, QUICK_STEPS = 0.2, 9


@dataclass(frozen=True)
class Matching:
    """Holds what matching is set to, for a kind of client: sign Adam in the box, the best kept."""

    #: First step size.
    rate: float
    #: Weight of total variation at the first and at the last iteration.
    tv: float
    tv_end: float
    #: Weight of the BN prior, toward the statistics that the client sent.
    bn: float = 0.0


#: The settings of the README's demo.
PLAIN = Matching(rate=0.05, tv=1e-4, tv_end=1e-6)
#: Where the client sends the statistics of its batch.
WITH_STATISTICS = Matching(rate=0.1, tv=1e-2, tv_end=1e-3, bn=1e-2)
#: Total variation against noise, at the first and at the last iteration, and the least share of
#: noise in what was sent (`noise_share`) from which on it is used.
NOISE_TV, NOISE_FROM = (1e-2, 1e-3), 1e-4


def noise_share(target: Target) -> float:
    """Return the share of noise in what was sent, in [0, 1], by the deviation the client reports.

    √n σ / ‖sent‖ for n entries: 0 without noise, near 1 where the noise buries the gradient.
    """
    if target.protection is None or not target.protection.sigma:
        return 0.0
    count = sum(g.numel() for g in target.gradient)
    norm = max(float64_norm(target.gradient), 1e-300)
    return min(1.0, target.protection.sigma * count**0.5 / norm)


def matching_of(target: Target, *, resists_noise: bool) -> Matching:
    """Choose the settings of matching for what this client sent."""
    chosen = PLAIN if target.bn_mean is None else WITH_STATISTICS
    if resists_noise and noise_share(target) >= NOISE_FROM:
        chosen = replace(chosen, tv=NOISE_TV[0], tv_end=NOISE_TV[1])
    return chosen


def matching_settings(
    target: Target, steps: int, seed: int, *, resists_noise: bool = False
) -> AttackSettings:
    """Return the settings of matching for what this client sent, with so many iterations."""
    chosen = matching_of(target, resists_noise=resists_noise)
    priors = {"tv": chosen.tv, **({"bn": chosen.bn} if chosen.bn else {})}
    return AttackSettings(
        Weights(priors=priors, priors_end={"tv": chosen.tv_end}),
        Loop(steps=max(FEWEST_ITERATIONS, steps), lr=chosen.rate, signed=True, keep_best=True),
        boxed=True,
        first_seed=seed,
        exact_bn=target.bn_mean is not None,
    )


def part_settings(
    part: Part, target: Target, steps: int, seed: int, max_memory: int
) -> AttackSettings:
    """Return the settings of a part's attack. steps: iterations, of matching."""
    if part.method == "matching":
        return matching_settings(target, steps, seed, resists_noise=part.resists_noise)
    return AttackSettings(Weights(), Loop(1, 1.0), method="layerwise", max_memory=max_memory)


def not_applicable(part: Part, case: Case) -> str | None:
    """Return why a part cannot be run on this network, in words; None where it can."""
    if part.method == "matching":
        return None
    try:
        target_network(case.objective.model, case.target)
    except ValueError as error:
        return str(error)
    return None


def pace_of(case: Case) -> Pace:
    """Measure what an iteration of matching and of its controls takes.

    Raises FaultError where a loss is not finite.
    """
    settings = matching_settings(case.target, FEWEST_ITERATIONS, 0)
    found = []
    for changed in (settings, settings.without_gradient()):
        theirs = case.attacked_by(changed, case.target)
        seconds = measured_step(changed, theirs)
        if seconds < QUICK:  # several cost little, and one alone may have been disturbed
            seconds = measured_step(changed, theirs, steps=QUICK_STEPS)
        found.append(seconds)
    return Pace(*found)


# One part ----------------------------------------------------------------------------------


#: Names under which a part's journal holds what fits into its time, how its attack ended, and what
#: it found; and of the journals of its attack and of its controls.
PLAN, END, DONE = "plan", "end", "done"
ATTACK, CONTROLS = "attack", "controls"


@dataclass(frozen=True)
class Run:
    """Says with what a part is run, whichever it is."""

    scoring: ScoringSettings
    interrupts: Interrupts
    reporter: Reporter
    print_freq: int
    #: Where is kept what the part has done, so that a killed audit goes on from there.
    journal: Journal = FORGETFUL
    #: Attacks of which the strongest verdict counts.
    tests: int = len(SUITE)


@dataclass(frozen=True)
class Done:
    """Holds what a part found, as plain values and tensors on the CPU."""

    part: Part
    #: "done", "skipped", "refused" (the network does not allow it) or "interrupted".
    status: str
    #: Why it was not done, in words; empty where it was.
    reason: str = ""
    #: Seconds that it was given, that its attack took, and that its controls and scores took.
    budget_seconds: float = 0.0
    seconds: float = 0.0
    control_seconds: float = 0.0
    #: Whether its time or its optimiser limited it, so that it is no evidence of safety.
    is_limited: bool = False
    #: The entry `metrics` of result.json; None without an attack.
    scores: dict | None = None
    #: How many iterations its attack took, or how many tensors it solved for.
    iterations: int = 0
    #: Whether its objective became as low as at the truth; None where nobody can say.
    arrived: bool | None = None
    #: (B, C, H, W) reconstruction in [0, 1]; None without an attack.
    images: Tensor | None = None
    #: Name of a control → its images, as those.
    controls: Mapping[str, Tensor] = field(default_factory=dict)
    #: Names of the tensors that a layerwise attack certified, from the head; None without one.
    certified: Sequence[str] | None = None
    #: What is printed of its certificate.
    certificate: Sequence[str] = ()

    @property
    def verdict(self) -> dict[str, Any]:
        """The verdict as data; empty where nothing was scored."""
        return {} if self.scores is None else self.scores["verdict"]

    @property
    def p_corrected(self) -> float | None:
        """The p of its test, multiplied by the number of tests; None without one."""
        return corrected(self.verdict.get("p"), self.verdict.get("tests", 1))

    @property
    def fact(self) -> dict[str, Any]:
        """All but the part, for a journal."""
        return {name: value for name, value in vars(self).items() if name != "part"}

    @classmethod
    def of_fact(cls, part: Part, fact: dict[str, Any]) -> "Done":
        """Return what a `fact` was made of; raises StateError where it is none of a part."""
        with reading(part.name):
            return cls(part, **fact)


def keep(fact: dict[str, Any], journal: Journal) -> None:
    """Save what a part found, in the place of all that it had noted on its way."""
    for name in (PLAN, END, ELAPSED, ATTACK, CONTROLS):
        journal.drop(name)
    journal.note(DONE, lambda: fact)
    journal.save()


def run_part(
    part: Part, settings: AttackSettings, case: Case, sealed: Sealed, seconds: float, run: Run
) -> Done:
    """Run an attack, its controls and its test within about `seconds`.

    The attack ends after OF_THE_ATTACK of that time at the latest, where it can end cleanly: a
    layerwise one after the tensor that it is at. The controls of matching then have as many
    iterations as it had; a layerwise attack that had to end so has none.
    """
    watch, case = Watch(run.journal), case.attacked_by(settings, case.target)
    try:
        attacked, took, was_late = _attacked(part, settings, case, seconds, watch, run)
    except StateError:
        raise
    except InputError as error:
        return Done(part, "refused", str(error), seconds, watch.seconds)
    if attacked.failed:
        return Done(part, "skipped", attacked.failure, seconds, attacked.seconds)
    finish = finish_of(settings, case, sealed, attacked)
    rest = Deadline(max(0.0, seconds - watch.seconds), run.interrupts)
    if run.interrupts.signal is not None:
        controls = Controls(missing=["the controls were not run, since it was interrupted"])
    elif was_late and part.method == "layerwise":
        controls = Controls(missing=["the controls were not run, since its time was over"])
    else:
        if was_late:
            until = attacked.outcome.iterations
            settings = replace(settings, loop=replace(settings.loop, until=until))
        controls = run_controls(
            settings, case, sealed, attacked, rest, run.reporter, print_freq=run.print_freq,
            journal=run.journal.under(CONTROLS),
        )  # fmt: skip
    scores, _ = score(run.scoring, case, sealed, attacked, finish, controls, tests=run.tests)
    certificate = certificate_of(case, attacked.recovered, sealed)
    interrupted = run.interrupts.signal is not None
    return Done(
        part, "interrupted" if interrupted else "done", "interrupted" if interrupted else "",
        seconds, took, watch.seconds - took,
        is_limited=was_late or rest.is_late or finish.doubt is not None,
        scores=scores, iterations=attacked.outcome.iterations, arrived=finish.arrival.arrived,
        images=attacked.images,
        controls=controls.images,
        certified=None if certificate is None else
        [layer.name for layer in certificate.recovered.certified],
        certificate=[] if certificate is None else certificate.lines,
    )  # fmt: skip


def _attacked(
    part: Part, settings: AttackSettings, case: Case, seconds: float, watch: Watch, run: Run
) -> tuple[Attacked, float, bool]:
    """Attack until the end or the deadline.

    Once it has ended, a killed audit takes its end from the journal: there the clock decides no
    more when that was.

    Returns what it found, the seconds that it took, and whether it had to end for its time.
    """
    ended = run.journal.recall(END)
    if ended is not None and part.method == "matching":
        with reading(part.name):
            return _attacked_of(ended, settings, case), ended["seconds"], ended["late"]
    left = OF_THE_ATTACK * seconds - watch.seconds
    if ended is not None:
        left = 0.0 if ended["late"] else math.inf
    limit = Deadline(left, run.interrupts)
    attacked = attack(
        settings, case, limit, run.reporter, print_freq=run.print_freq, title=f"{part.name}: ",
        journal=run.journal.under(ATTACK),
    )  # fmt: skip
    took = watch.seconds if ended is None else ended["seconds"]
    if run.interrupts.signal is None and not attacked.failed:
        fact = {"seconds": took, "late": limit.is_late, **_ending(attacked)}
        run.journal.note(END, lambda: fact)
        run.journal.save()
    return attacked, took, limit.is_late


def _ending(attacked: Attacked) -> dict[str, Any]:
    """Return how an attack by matching ended, for a journal."""
    final = attacked.outcome.final
    end = SavedSeed((0, final.steps), 0, None, replace(final, optimiser_state=None))
    return {
        "run": plain_seed(end), "rows": attacked.rows, "header": attacked.header,
    }  # fmt: skip


def _attacked_of(fact: dict[str, Any], settings: AttackSettings, case: Case) -> Attacked:
    """Return the attack by matching of which `fact` holds how it ended."""
    start = case.start(settings.first_seed)
    run = seed_from(fact["run"], start, settings.loop.steps, "its end").run
    assert run is not None  # it has ended
    outcome = Outcome(run, (run,), 0, run.steps)
    late = bool(fact["late"])
    return Attacked(
        outcome, case.images(run.x.to(case.device)), fact["rows"], fact["header"], [],
        fact["seconds"], 0.0, interrupted=late,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Says how many iterations of matching fit into how many seconds."""

    steps: int
    seconds: float


def plan_of(part: Part, case: Case, seconds: float, most: int, journal: Journal) -> Plan:
    """Return how many iterations of a part fit into `seconds`, less what measuring takes.

    A killed audit takes it from the journal.
    """
    if (fact := journal.recall(PLAN)) is not None:
        with reading(part.name):
            return Plan(**fact)
    start = time.perf_counter()
    pace = pace_of(case)  # anew: the machine may be busier than when it was planned
    seconds -= time.perf_counter() - start
    plan = Plan(pace.iterations(seconds, most), seconds)
    journal.note(PLAN, lambda: vars(plan))
    return plan


def run_matching(
    part: Part, case: Case, sealed: Sealed, seconds: float, seed: int, run: Run, fewest: int = 0
) -> Done:
    """Run matching with as many iterations as fit into `seconds` with their controls.

    fewest: iterations that are planned even if the machine has become slower; one that its time
    ends before them is limited by it.
    """
    plan = plan_of(part, case, seconds, part.most, run.journal)
    if plan.steps < FEWEST_ITERATIONS:
        reason = f"not {FEWEST_ITERATIONS} iterations fit into its time"
        return Done(part, "skipped", reason, plan.seconds, is_limited=True)
    steps = max(plan.steps, min(fewest, part.most))
    settings = matching_settings(case.target, steps, seed, resists_noise=part.resists_noise)
    return run_part(part, settings, case, sealed, plan.seconds, run)
