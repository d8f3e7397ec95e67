"""Runs a whole audit: loads, plans, attacks, judges, writes."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inversion.audit.budget import Budget
from inversion.audit.positive import PART as POSITIVE_PART
from inversion.audit.positive import Positive, positive_control
from inversion.audit.resuming import running
from inversion.audit.subject import LabelFinding, Subject, label_finding, load_subjects
from inversion.audit.suite import (
    DONE,
    FEWEST_ITERATIONS,
    POSITIVE_WEIGHT,
    SUITE,
    Done,
    Part,
    Run,
    keep,
    part_settings,
    run_matching,
    run_part,
)
from inversion.audit.suite_report import (
    AUDIT_FORMAT,
    audit_entry,
    checkpoint_entry,
    checkpoint_warnings,
    part_entry,
    part_lines,
    save_pictures,
    summary,
    threat,
)
from inversion.audit.suite_settings import SuiteSettings
from inversion.audit.suite_verdict import ALREADY_SHOWN, best_part
from inversion.audit.verdict import RECONSTRUCTION
from utils.console import Reporter, duration, setting_lines, table
from utils.errors import FaultError, one_line
from utils.files import null_unless_finite, write_json
from utils.journal import Journal
from utils.script import Interrupts, git_revision, versions

#: The reason of a part before its turn comes.
NOT_REACHED = "the audit has not come to it"


@dataclass
class Audit:
    """Carries an audit along: what it has found so far."""

    settings: SuiteSettings
    subjects: Sequence[Subject]
    budget: Budget
    reporter: Reporter
    interrupts: Interrupts
    #: Where the files go.
    folder: Path
    #: Where is kept what is done.
    journal: Journal
    #: What audit.json begins with.
    frame: dict[str, Any]
    positive: Positive = Positive(False, "it was not run", None)
    #: Of every checkpoint that was reached.
    labels: list[LabelFinding] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[list[tuple[str, str]]] = field(default_factory=list)

    def run_of(self, subject: Subject, journal: Journal) -> Run:
        """Return with what a part on a checkpoint is run."""
        return Run(
            subject.settings.scoring, self.interrupts, self.reporter, self.settings.print_freq,
            journal,
        )  # fmt: skip


def run_audit(settings: SuiteSettings) -> int:
    """Audit all checkpoints within the budget; write audit.json; return the exit code."""
    reporter, created = Reporter(), datetime.datetime.now(datetime.UTC)
    budget = Budget(settings.budget)
    subjects = load_subjects(settings, reporter)
    budget.add(POSITIVE_WEIGHT + sum(part.weight for s in subjects for part in s.parts))
    reporter.say("settings\n" + setting_lines(settings.record))
    if settings.dry_run or settings.args.resume is None:
        reporter.say(plan(subjects, budget))
    if settings.dry_run:
        return 0
    where = settings.folder, settings.record, settings.argv
    with (
        running(*where, reporter) as run,
        run.paused_by_errors(reporter),
        Interrupts() as interrupts,
    ):
        frame = go_on(run.journal, budget, settings, created)
        audit = Audit(
            settings, subjects, budget, reporter, interrupts, run.folder, run.journal, frame
        )
        audit.positive = control(audit)
        for subject in subjects:
            examine(audit, subject)
        whole = write(audit)
        reporter.say(f"written to {run.folder}")
        reporter.say(whole["sentence"])
        return run.finish(interrupts, reporter)


def go_on(
    journal: Journal, budget: Budget, settings: SuiteSettings, created: datetime.datetime
) -> dict[str, Any]:
    """Take from the journal when and how the audit began and the time that it has spent.

    Both are saved from now on. Returns what audit.json begins with.
    """
    if (spent := journal.recall("spent")) is not None:
        budget.go_on(spent)
    journal.note("spent", lambda: budget.spent, always=True)
    begun = journal.recall("begun") or {
        "created": created.isoformat(timespec="seconds"), "command": settings.command
    }  # fmt: skip
    journal.note("begun", lambda: begun)
    return {
        "format": AUDIT_FORMAT, **begun, "versions": versions(), "git": git_revision(),
        "budget_seconds": settings.budget,
    }  # fmt: skip


# The plan ----------------------------------------------------------------------------------


def planned_iterations(subjects: Sequence[Subject], budget: Budget) -> int:
    """Return the fewest iterations that the longest attack is planned to have on a checkpoint."""
    part = SUITE[-1]
    return min(s.pace.iterations(budget.forecast(part.weight), part.most) for s in subjects)


def plan(subjects: Sequence[Subject], budget: Budget) -> str:
    """Describe the suite, what every part may take, and how many iterations fit into that."""
    goal = planned_iterations(subjects, budget)
    rows = [["", POSITIVE_PART.name, duration(budget.forecast(POSITIVE_WEIGHT)), f"{goal:,}"]]
    for subject in subjects:
        rows.append([subject.source.name, "labels from the gradient", "as it takes", ""])
        for part in SUITE:
            if part.name in subject.refused:
                rows.append([subject.source.name, part.name, "none: not for this network", ""])
                continue
            seconds = budget.forecast(part.weight)
            steps = subject.pace.iterations(seconds, part.most)
            shown = f"{steps:,}" if part.method == "matching" else ""
            rows.append([subject.source.name, part.name, duration(seconds), shown])
    return (
        f"plan: {duration(budget.seconds)} in all, {duration(budget.left)} left, controls and "
        "tests included; what a part does not use goes to later ones\n"
        + table(["checkpoint", "part", "at least", "iterations"], rows)
    )


def control(audit: Audit) -> Positive:
    """Run the positive control and say how it ended."""
    journal = audit.journal.under(POSITIVE_PART.name)
    goal = planned_iterations(audit.subjects, audit.budget)
    seconds = audit.budget.share(POSITIVE_WEIGHT)
    if (fact := journal.recall(DONE)) is not None:
        positive = Positive.of_fact(fact)
    else:
        first = audit.subjects[0]
        positive = positive_control(
            first.case.target.image_shape, goal, seconds, audit.settings.first_seed,
            first.case.device, first.sealed, audit.run_of(first, journal),
        )  # fmt: skip
        if audit.interrupts.signal is None:
            keep(positive.fact, journal)
    if positive.done is not None:
        audit.reporter.say("\n".join(part_lines(positive.done)))
    passed = "passed" if positive.passed else "FAILED"
    audit.reporter.say(f"positive control {passed} ({positive.what})")
    return positive


# One checkpoint ----------------------------------------------------------------------------


def examine(audit: Audit, subject: Subject) -> None:
    """Run the suite on a checkpoint; print, record and write what it found."""
    audit.reporter.say(f"checkpoint {subject.source.name}")
    labels = label_finding(subject.case, subject.sealed)
    audit.reporter.say("\n".join([*threat(subject).lines, labels.line]))
    parts: list[Done] = []
    for part in SUITE:
        parts.append(run_one(audit, subject, part, parts))
        audit.reporter.say("\n".join(part_lines(parts[-1])))
    entries = [part_entry(part) for part in parts]
    best, pictures = best_part(entries), {}
    if best is not None and audit.settings.with_images:
        shown = next(part for part in parts if part.part.name == best["name"])
        pictures = save_pictures(subject, shown, audit.folder, len(audit.entries))
    entry = checkpoint_entry(subject, labels, entries, audit.positive.passed, pictures)
    audit.labels.append(labels)
    audit.entries.append(entry)
    audit.warnings.append(checkpoint_warnings(subject, entries, labels))
    audit.reporter.say(summary(entry))
    write(audit)


def run_one(audit: Audit, subject: Subject, part: Part, before: Sequence[Done]) -> Done:
    """Run a part on a checkpoint, or say why not.

    After a layerwise attack has shown a reconstruction the matching is left out: nothing that it
    finds could change the verdict. The longest attack has no fewer iterations than the positive
    control, which shows that so many suffice.
    """
    if part.name in subject.refused:
        return Done(part, "refused", subject.refused[part.name])
    seconds = audit.budget.share(part.weight)
    journal = audit.journal.under(f"checkpoint-{len(audit.entries)}/{part.name}")
    if (fact := journal.recall(DONE)) is not None:
        return Done.of_fact(part, fact)
    if audit.interrupts.signal is not None:
        return Done(part, "skipped", "the audit was interrupted")
    shown = [d for d in before if d.part.method == "layerwise"]
    if any(d.verdict.get("verdict") == RECONSTRUCTION for d in shown):
        return Done(part, "skipped", f"{ALREADY_SHOWN} by {shown[0].part.name}")
    run, seed = audit.run_of(subject, journal), audit.settings.first_seed + len(before)
    fewest = audit.positive.iterations if part is SUITE[-1] else 0
    done = attacked(part, subject, seconds, seed, run, fewest)
    if audit.interrupts.signal is None:
        keep(done.fact, journal)
    return done


def attacked(
    part: Part, subject: Subject, seconds: float, seed: int, run: Run, fewest: int
) -> Done:
    """Run the attack of a part; fewest: as in `run_matching`."""
    case, sealed = subject.case, subject.sealed
    try:
        if part.method == "matching":
            return run_matching(part, case, sealed, seconds, seed, run, fewest)
        memory = subject.settings.attack.max_memory
        settings = part_settings(part, case.target, FEWEST_ITERATIONS, seed, memory)
        return run_part(part, settings, case, sealed, seconds, run)
    except FaultError as error:
        return Done(part, "skipped", one_line(error), seconds)


# Files -------------------------------------------------------------------------------------


def write(audit: Audit) -> dict[str, Any]:
    """Write audit.json and report.html; checkpoints that were not reached are incomplete."""
    from inversion.audit.html import write_report  # not above: its templates are needed here alone

    entries, warnings = list(audit.entries), list(audit.warnings)
    for subject in audit.subjects[len(entries) :]:
        parts = [part_entry(Done(part, "skipped", NOT_REACHED)) for part in SUITE]
        labels = LabelFinding(subject.case.labels is None, None, NOT_REACHED, None, 0.0)
        entries.append(checkpoint_entry(subject, labels, parts, audit.positive.passed, {}))
        warnings.append([("part-missing", NOT_REACHED)])
    whole = audit_entry(audit.frame, audit.positive, entries, warnings, audit.budget.spent)
    plain = null_unless_finite(whole)
    write_json(plain, audit.folder / "audit.json")
    write_report(plain, audit.folder, with_images=audit.settings.with_images)
    return plain
