"""A sweep from its flags to its files: every client simulated and attacked, side by side."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inversion.audit.inputs import check_device
from inversion.audit.resuming import Running, running
from inversion.audit.settings import InputSettings, Settings
from inversion.audit.sweep.job import Simulate, decoys_per_image
from inversion.audit.sweep.picture import Panel, save_sweeps
from inversion.audit.sweep.row import Job, Result, Row
from inversion.audit.sweep.settings import SweepSettings
from inversion.audit.sweep.table import csv_table, entries, sweep_table
from inversion.audit.sweep.workers import run_jobs
from inversion.audit.verdict import ALPHA
from models import checkpoint as checkpoints
from utils.console import Reporter, duration, setting_lines
from utils.device import choose_device, device_name
from utils.errors import InputError, naming
from utils.files import null_if_nan, write_csv, write_json
from utils.journal import Journal, reading
from utils.pictures import save_panels
from utils.script import Interrupts, git_revision, versions

#: Of sweep.json: raised by one whenever a reader of the number before could misread it.
SWEEP_FORMAT = 1
#: Name under which the journal of a client holds its result.
RESULT = "result"


def client_record(inputs: InputSettings) -> dict:
    """Read the record of the client from the checkpoint, or from the truth that was sealed.

    Raises InputError, without the checkpoint's name, where there is none.
    """
    source = checkpoints.load(inputs.checkpoint)
    if inputs.truth is not None:
        with naming(f"--truth {inputs.truth}"):
            source = checkpoints.load_truth(inputs.truth)
    elif source.get("x_true") is None:
        raise InputError(
            "holds neither its truth nor the record of its client; give the sealed file by --truth"
        )
    record = source.get("args")
    return record if isinstance(record, dict) and "format" in source else {}


def run_sweep(settings: Settings, argv: Sequence[str], simulate: Simulate) -> int:
    """Simulate and attack a client per value and repeat, report, write; return the exit code.

    argv: the command line, which is printed where the sweep can go on.
    """
    sweep, reporter = settings.sweep, Reporter()
    assert sweep is not None  # the caller has asked
    for line in _opening(settings, sweep, simulate):
        reporter.say(line)
    if settings.dry_run:
        return 0
    with (
        running(settings.folder, settings.record, argv, reporter) as run,
        run.paused_by_errors(reporter),
        Interrupts() as interrupts,
    ):
        reporter.say("settings\n" + setting_lines(settings.record))
        _attack_all(settings, sweep, simulate, run, interrupts, reporter)
        return run.finish(interrupts, reporter)


def _attack_all(
    settings: Settings,
    sweep: SweepSettings,
    simulate: Simulate,
    run: Running,
    interrupts: Interrupts,
    reporter: Reporter,
) -> None:
    """Attack every client that was not attacked before, and write what all of them gave."""
    jobs = [Job(value, repeat) for value in sweep.values for repeat in range(sweep.repeats)]
    known = recalled(jobs, run.journal)
    results, missing = dict(known), [job for job in jobs if job not in known]
    if known:
        reporter.say(f"{len(known)} of {len(jobs)} clients were attacked before")
    start = time.perf_counter()

    def on_result(result: Result) -> None:
        results[result.job] = result
        keep(result, run.journal)
        seconds = (time.perf_counter() - start) / (len(results) - len(known))
        reporter.say(_progress(sweep, result.row, len(results), len(jobs), seconds))

    with _clients_folder(run.folder, sweep) as clients:
        try:
            run_jobs(settings, simulate, missing, clients, interrupts, on_result, run.journal)
        finally:  # whatever ended it, what is done stays
            done = [results[job] for job in jobs if job in results]
            interrupted = interrupts.signal is not None
            _finish(settings, sweep, done, run.folder, reporter, interrupted=interrupted)
            seconds = duration(time.perf_counter() - start)
            reporter.say(f"{len(results)} of {len(jobs)} clients in {seconds}; {run.folder}")


def _opening(settings: Settings, sweep: SweepSettings, simulate: Simulate) -> list[str]:
    """Simulate the client as it was, and say what will be done.

    Raises InputError where it cannot be simulated.
    """
    inputs = settings.inputs
    source = f"--checkpoint {inputs.checkpoint}"
    device = choose_device(inputs.gpu, 0)
    check_device(settings.attack, device)
    with naming(source):
        again, command = simulate("", "", 0, decoys_per_image(sweep.attempts), device)
    attacks = len(sweep.values) * sweep.repeats * sweep.attempts
    lines = [
        f"sweep of {sweep.parameter}: {len(sweep.values)} values × {sweep.repeats} batches = "
        f"{len(sweep.values) * sweep.repeats} clients, {attacks} attacks with their controls, "
        f"{sweep.workers} at a time, {device_name(device)}",
        f"the client, as it is simulated again: {command}",
    ]
    truth = _truth_of(settings)
    if not _same_client(settings, truth, again):
        lines.append(
            "warning: simulated again, the client of this checkpoint has other images or weights: "
            "its data, its file of weights or the version of torch is another; the sweep compares "
            "the clients that it simulates, none of which is that one"
        )
    if truth.get("control") is None or truth.get("decoys") is None:
        lines.append("a control and decoys, which the checkpoint lacks, are captured for each")
    tv = ", ".join(f"{weight:g}" for weight in sweep.tv)
    if sweep.tv:
        lines.append(
            f"every client is attacked with --TV {tv}; the strongest attack is told, its p times "
            f"{sweep.attempts}"
        )
    else:
        lines.append(
            "every client is attacked with the same settings, which no defence has tuned: a "
            "stronger attack on a defended client may find more"
            + ("; --sweep-TV tries several" if settings.attack.method == "matching" else "")
        )
    return lines


def _truth_of(settings: Settings) -> dict:
    """Load the truth of the checkpoint, which `client_record` has found."""
    inputs = settings.inputs
    if inputs.truth is not None:
        return checkpoints.load_truth(inputs.truth)
    return checkpoints.load(inputs.checkpoint)


def _same_client(settings: Settings, truth: dict, again: dict) -> bool:
    """Whether the client simulated again has the checkpoint's images and weights."""
    state, new = checkpoints.load(settings.inputs.checkpoint)["state_dict"], again["state_dict"]
    return _equal(truth["x_true"], again["x_true"]) and (
        state.keys() == new.keys() and all(_equal(state[name], new[name]) for name in state)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-5)


@contextmanager
def _clients_folder(folder: Path, sweep: SweepSettings) -> Iterator[Path]:
    """Yield the folder of the simulated clients' checkpoints, which stay only where asked for."""
    if sweep.keep:
        yield folder / "clients"
        return
    with tempfile.TemporaryDirectory(prefix="sweep-") as path:
        yield Path(path)


def recalled(jobs: Sequence[Job], journal: Journal) -> dict[Job, Result]:
    """Return the results that an earlier process kept, by their client."""
    found = {}
    for job in jobs:
        if (fact := job.journal_in(journal).recall(RESULT)) is not None:
            with reading(f"the client {job.value}"):
                found[job] = Result.of_fact(fact)
    return found


def keep(result: Result, journal: Journal) -> None:
    """Save the result of a client, in the place of all that its attacks had saved.

    One that was left out is not saved: its reason, such as a want of memory, may have gone.
    """
    if result.row.reason is None:
        journal.drop(result.job.name)
        result.job.journal_in(journal).note(RESULT, lambda: result.fact)
        journal.save()


def _progress(sweep: SweepSettings, row: Row, done: int, total: int, seconds: float) -> str:
    """Say what one client gave, and how long the others will take, at `seconds` each."""
    left = seconds * (total - done)
    name = f"{sweep.parameter}={row.value}"
    if sweep.repeats > 1:
        name += f", batch {row.repeat + 1} of {sweep.repeats}"
    what = row.sentence if row.reason is None else f"left out: {row.reason}"
    return f"[{done}/{total}, {duration(left)} left] {name}: {what}"


def _finish(
    settings: Settings,
    sweep: SweepSettings,
    results: Sequence[Result],
    folder: Path,
    reporter: Reporter,
    *,
    interrupted: bool,
) -> None:
    """Print the table and write all files."""
    rows = [result.row for result in results]
    write_json(
        {
            "format": SWEEP_FORMAT,
            "settings": settings.record,
            "parameter": sweep.parameter,
            "values": sweep.values,
            "repeats": sweep.repeats,
            "interrupted": interrupted,
            "versions": versions(),
            "git": git_revision(),
            "rows": null_if_nan(entries(rows)),
        },
        folder / "sweep.json",
    )
    header, lines = csv_table(sweep.parameter, rows)
    write_csv(header, lines, folder / "sweep.csv")
    reporter.say(sweep_table(sweep.parameter, sweep.values, rows))
    for line in _closing(rows, settings):
        reporter.say(line)
    if any(row.reason is None for row in rows):
        save_sweeps([Panel(sweep.parameter, sweep.values, rows)], folder / "sweep.png")
        _save_images(sweep, results, folder / "images.png")


def _closing(rows: Sequence[Row], settings: Settings) -> list[str]:
    """Say how the table is to be read."""
    judged = sum(row.reason is None for row in rows)
    lines = [
        f"each of the {judged} verdicts calls leakage where there is none in up to "
        f"{100 * ALPHA:g} % of cases: among them {ALPHA * judged:.1f} such calls are to be "
        "expected, were there no leakage at all",
        "no leakage shown: by these attacks; only a bound holds against any attacker",
    ]
    refused = {row.value: row.reason for row in rows if row.reason is not None}
    return [*lines, *(f"left out: {value}: {reason}" for value, reason in refused.items())]


def _save_images(sweep: SweepSettings, results: Sequence[Result], path: Path) -> None:
    """Write the first batch of every value below its truth, where that is the same for all."""
    first = {r.row.value: r for r in results if r.found is not None and r.row.repeat == 0}
    if not first:
        return
    true = next(iter(first.values())).true
    assert true is not None  # it is there with `found`
    panels = [("truth", _colours(true))]
    for value, result in first.items():
        if result.found is not None and np.array_equal(result.true, true):
            panels.append((value, _colours(result.found)))
    save_panels(panels, path)


def _colours(images: np.ndarray) -> Tensor:
    x = torch.from_numpy(images) / 255
    return x.expand(-1, 3, -1, -1)
