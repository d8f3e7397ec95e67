"""The attacker: checkpoint → labels → reconstruction → tables and pictures.

    python run.py --checkpoint FILE --epochs 3000 --lr 0.05 --TV 1e-4 --grad-sign --metric
    python run.py --audit --budget 5m --checkpoint FILE [FILE …]

Reads what training.py wrote. Run with --help for all flags, --dry-run to check them.
"""

from contextlib import nullcontext

from utils import interruption

if __name__ in ("__main__", "__mp_main__"):  # a script, or a process that it starts
    interruption.begin(started_by_another=__name__ != "__main__")  # the imports below take time

from inversion.audit.beginning import check_resumable
from inversion.audit.flags import parser
from inversion.audit.settings import Settings, refuse_processes, settings_from
from inversion.audit.suite_settings import suite_settings_from
from utils.flags import process_settings
from utils.script import Interrupts, run_script

# The command line is read and refused above; what follows needs torch, which takes seconds to
# import, so the functions below import what they use.


def main(argv: list[str]) -> int:
    """Attack one checkpoint as the flags say, in one process or several; return the exit code."""
    args = parser().parse_args(argv)
    if args.audit:
        suite = suite_settings_from(args, argv)
        check_resumable(suite.record)
        from inversion.audit.suite_run import run_audit

        return run_audit(suite)
    settings = settings_from(args)
    check_resumable(settings.record)
    if settings.sweep is not None:
        return sweep(settings, argv)
    from utils.launch import group_from, launch

    group = group_from(process_settings(args))
    refuse_processes(settings, group.size)
    return launch(work, argv, group)


def sweep(settings: Settings, argv: list[str]) -> int:
    """Simulate the checkpoint's client with one setting changed, and attack each; exit code."""
    from functools import partial

    from inversion.audit.sweep.run import client_record, run_sweep
    from train.variation import base_flags, simulate
    from utils.errors import naming

    with naming(f"--checkpoint {settings.inputs.checkpoint}"):
        base = base_flags(client_record(settings.inputs), settings.inputs.model)
    return run_sweep(settings, argv, partial(simulate, base))


def work(argv: list[str], processes, local_rank: int) -> int:
    """Attack in one of the `processes` (a Shard); the first one reports and writes."""
    from inversion.audit.resuming import running
    from utils.console import Reporter, Silent

    settings = settings_from(parser().parse_args(argv))
    reporter = Reporter() if processes.is_main else Silent()
    folder = running(settings.folder, settings.record, argv, reporter, processes=processes)
    if settings.search is None:
        return attack_checkpoint(settings, None, folder, reporter, processes, local_rank)
    from inversion.audit.searching import prepare_search, run_search

    prepared = prepare_search(settings, reporter)
    if settings.dry_run:
        return 0
    if settings.search.only:
        run_search(settings, prepared, reporter)
        return 0
    with folder as run:
        with run.paused_by_errors(reporter):
            search = run_search(settings, prepared, reporter, run.journal)
        settings = settings.with_values(search["best"])
        return attack_checkpoint(
            settings, search, nullcontext(run), reporter, processes, local_rank
        )


def attack_checkpoint(
    settings: Settings, search, folder, reporter, processes, local_rank: int
) -> int:
    """Read the checkpoint, say what will be done, and do it in the run's folder; exit code.

    search: what a search found, None without one. folder: a context manager that opens the run.
    """
    from inversion.audit.inputs import load_inputs
    from inversion.audit.plan import estimate, plan
    from inversion.audit.report import label_lines, notes
    from inversion.audit.threat import threat_model
    from utils.console import setting_lines

    case, sealed = load_inputs(settings, reporter, processes, local_rank)
    reporter.say("settings\n" + setting_lines(settings.record))
    for line in [
        *label_lines(settings.scoring, case, sealed),
        "\n".join(threat_model(case, settings).lines),
        plan(settings.attack, case, shuffled=settings.inputs.shuffled),
        *notes(settings, case, sealed),
    ]:
        reporter.say(line)
    if settings.dry_run:
        reporter.say(estimate(settings, case))
        return 0
    with Interrupts() as interrupts, folder as run, run.paused_by_errors(reporter):
        return audit(settings, case, sealed, search, run, interrupts, reporter)


def audit(settings: Settings, case, sealed, search, run, interrupts: Interrupts, reporter) -> int:
    """Attack, score, write; then the controls, scores and files again; return the exit code.

    case: what the attacker has. sealed: what only scoring has, None where nothing is scored.
    search: what a search found, None without one. run: the run's folder and journal (a `Running`).
    """
    from inversion.audit.attack import attack, outcome_lines
    from inversion.audit.certificate import certificate_of
    from inversion.audit.controls import NOT_RUN, controls_wanted, run_controls
    from inversion.audit.report import Report, finish_of, information_entry, say_end, score
    from utils.errors import FaultError

    run.check_labels(case.y)
    case = case.with_saved_memory(run.journal, reporter)
    report, information, finish = None, None, None
    if settings.scoring.information:
        information, text = information_entry(case, sealed)
        reporter.say(text)
    if case.processes.is_main:
        report = Report(run.folder, settings, case, sealed, information, search)
    attacked = attack(
        settings.attack, case, interrupts, reporter, print_freq=settings.print_freq,
        save_consensus=None if report is None else report.save_consensus,
        journal=run.journal.under("attack"),
    )  # fmt: skip
    seen = sealed if settings.scoring.metric else None
    certificate = certificate_of(case, attacked.recovered, seen)
    outcome = outcome_lines(settings.attack, attacked.outcome)
    for line in outcome if certificate is None else certificate.lines:
        reporter.say(line)
    scores, text, controls = None, "", NOT_RUN
    if settings.scoring.metric:
        finish = finish_of(settings.attack, case, sealed, attacked)
        if report is not None:
            scores, text = score(settings.scoring, case, sealed, attacked, finish)
    if report is not None:  # before anything more is done
        report.write_attack(attacked, scores, certificate)
    if finish is not None and controls_wanted(settings.scoring, case, attacked, reporter):
        controls = run_controls(
            settings.attack, case, sealed, attacked, interrupts, reporter,
            print_freq=settings.print_freq, journal=run.journal.under("controls"),
        )  # fmt: skip
        if report is not None:
            scores, text = score(settings.scoring, case, sealed, attacked, finish, controls)
            report.write_controls(attacked, scores, controls, certificate)
    if report is not None:
        say_end(reporter, attacked, finish, text, controls, run.folder)
    if attacked.failed:
        run.end()
        raise FaultError(attacked.failure)
    return run.finish(interrupts, reporter)


if __name__ == "__main__":
    interruption.leave(run_script(main))
