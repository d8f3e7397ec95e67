"""The client of a federated-learning step: batch → gradient (+ BN statistics) → checkpoint.

    python training.py --data-name photos --arch lenet --batch-size 8 --outlayer-state keep

The checkpoint is what run.py attacks. Run with --help for all flags, --dry-run to check them.
torch, and whatever needs it, is imported only once the command line is accepted.
"""

from utils import interruption

if __name__ in ("__main__", "__mp_main__"):  # a script, or a process that it starts
    interruption.begin(started_by_another=__name__ != "__main__")  # the imports below take time

from train.flags import parser
from train.settings import settings_from
from utils.flags import process_settings
from utils.script import run_script


def main(argv: list[str]) -> int:
    """Capture one batch as the flags say, in one process or several; return the exit code."""
    args = parser().parse_args(argv)
    settings = settings_from(args)
    if settings.rank_mode is not None:
        from train.report import say_ranks
        from utils.console import Reporter

        say_ranks(settings, Reporter())
        return 0
    if settings.imported is not None:
        from train.importing import import_update
        from utils.console import Reporter

        import_update(settings, settings.imported, Reporter())
        return 0
    from utils.launch import group_from, launch

    return launch(work, argv, group_from(process_settings(args)))


def work(argv: list[str], shard, local_rank: int) -> int:
    """Play the client in one process of `shard`; the first one reports and writes.

    local_rank: number of the process on this machine. Returns the exit code.
    """
    from train import output, report
    from train.capture import capture
    from utils.console import Reporter, Silent, setting_lines
    from utils.device import choose_device

    settings = settings_from(parser().parse_args(argv))
    reporter = Reporter() if shard.is_main else Silent()
    captured = capture(settings, choose_device(settings.gpu, local_rank), reporter, shard)
    sent, protection = captured.sent, captured.protection

    reporter.say("settings\n" + setting_lines(settings.record))  # a refusal would be lost below
    if not shard.is_main:
        return 0
    if sent.protected is not None:
        assert protection is not None  # the record of how it was done
        report.say_protection(settings, sent.protected, protection, captured.model, reporter)
    if captured.control is not None:
        reporter.say("control: the update for other images with the same labels, for scoring alone")

    # what the server gets, and for the audit the truth
    if settings.dry_run:
        reporter.say(f"dry run: would write {output.planned_file(settings)}")
        return 0
    output.write(settings, captured.checkpoint, captured.batch, reporter)
    return 0


if __name__ == "__main__":
    interruption.leave(run_script(main))
