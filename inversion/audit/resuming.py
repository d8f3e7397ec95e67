"""Opens the folder of a run, new or to go on with, and the journal in which the run is saved."""

import contextlib
import os
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from inversion.audit.beginning import STATE, write_beginning
from utils.console import Reporter, duration
from utils.errors import FaultError, InputError, StateError
from utils.files import claim_folder
from utils.journal import (
    FORGETFUL,
    FolderJournal,
    Journal,
    consolidate,
    locked,
    reading,
    remove,
)
from utils.script import Interrupts
from utils.shard import ALONE, Shard


@dataclass(frozen=True)
class Running:
    """Holds the folder of a run that is at work, and how it is saved."""

    folder: Path
    journal: Journal
    #: Seconds between two saves; 0 where nothing is saved.
    every: float
    #: The command line by which the run goes on.
    command: str
    #: Whether it goes on with a saved state.
    resumed: bool
    #: Whether this is the process that removes the state.
    is_main: bool = True

    def check_labels(self, y: Tensor) -> None:
        """Refuse to go on with other labels than the run began with; note them for the next time.

        y: (B,) or (B, K). They are reconstructed anew, from files that may have changed. Raises
        StateError.
        """
        before = self.journal.recall("labels")
        with reading("the labels"):
            if before is not None and not torch.equal(before.cpu(), y.cpu()):
                raise StateError(
                    f"--resume {self.folder}: the labels are other ones than the run began with; "
                    "give the same --label-aux and version of torch, or start the run anew"
                )
        self.journal.note("labels", y.cpu)

    def pause(self, reporter: Reporter) -> None:
        """Save what there is, and print the command by which the run goes on."""
        self.journal.save()
        if self.every and (self.folder / STATE).is_dir():
            reporter.say(f"go on with it by:\n  {self.command}")

    @contextlib.contextmanager
    def paused_by_errors(self, reporter: Reporter) -> Iterator[None]:
        """Pause the run if an error or an interruption ends this context.

        Of a new run that is refused nothing is kept.
        """
        try:
            yield
        except InputError:
            if not self.resumed:
                self.end()
            raise
        except (Exception, KeyboardInterrupt, SystemExit):
            self.pause(reporter)
            raise

    def finish(self, interrupts: Interrupts, reporter: Reporter) -> int:
        """Pause a run that a signal interrupted, end one that is whole; return the exit code."""
        if interrupts.signal is not None:
            self.pause(reporter)
            return 128 + interrupts.signal
        self.end()
        return 0

    def end(self) -> None:
        """Remove the state: the run has ended, and nothing is left to go on with."""
        if self.every and self.is_main:
            remove(self.folder / STATE)


@contextlib.contextmanager
def running(
    folder: Path,
    record: Mapping[str, object],
    argv: Sequence[str],
    reporter: Reporter,
    *,
    processes: Shard = ALONE,
) -> Iterator[Running]:
    """Open the folder of a run and its journal, and hold its lock for as long as the context lasts.

    folder: where a new run goes, or the first free name beside it. record: every flag with its
    value, of which `resume` and `save_every` are read here. argv: the command line. All processes
    call it; the first one makes the folder, which the others must see to save what they do.

    Raises InputError where another process is at work on the run or the state is damaged, and
    FaultError where nothing can be written.
    """
    resume, every = record.get("resume"), float(str(record.get("save_every") or 0))
    with contextlib.ExitStack() as stack:
        path, token, refusal = None, secrets.token_hex(8), None
        if processes.is_main:
            try:
                path = claim_folder(folder) if resume is None else Path(str(resume))
                if every:
                    _prepare(path, record, stack, token, new=resume is None)
            except (InputError, FaultError) as error:
                refusal = error
        path, token, refusal = processes.objects((path, token, refusal))[0]
        if refusal is not None:
            raise refusal
        assert path is not None  # the first process has made it
        main = processes.is_main
        run = Running(path, FORGETFUL, 0.0, _command(argv, path), resume is not None, main)
        if processes.is_main:
            reporter.log_to(path / "log.txt")
            reporter.say(f"results: {path}")
            if resume is None and path != folder and (folder / STATE).is_dir():
                reporter.say(
                    f"{folder} is at work or was killed; --resume {folder} goes on with it"
                )
        if every and processes.any(not (path / STATE / token).exists()):
            reporter.say("not saved: a process does not see this folder; give one that all share")
            every = 0.0
        if every:
            journal = FolderJournal.opened(path / STATE, every, reporter.say, processes.rank)
            run = replace(run, journal=journal, every=every)
            if run.resumed and journal.former:
                reporter.say(f"going on with what is saved in {path / STATE}")
            elif run.resumed:
                reporter.say("nothing was saved when the run was killed: it begins anew")
            else:
                reporter.say(
                    f"saved every {duration(every)}; killed, it goes on by:\n  {run.command}"
                )
        elif not record.get("save_every"):
            reporter.say("not saved, by --save-every 0: killed, it does not go on")
        processes.any(False)  # all have opened the journal before one of them saves
        if every and processes.is_main:
            with contextlib.suppress(OSError):
                os.unlink(path / STATE / token)
        yield run


def _prepare(
    path: Path, record: Mapping[str, object], stack: contextlib.ExitStack, token: str, *, new: bool
) -> None:
    """Lock the state of a run, write down what decides it, and leave a file for all to see."""
    state = path / STATE
    try:
        state.mkdir(exist_ok=True)
        stack.enter_context(locked(state))
        if new:
            write_beginning(state, record)
        consolidate(state)
        (state / token).touch()
    except OSError as error:
        raise FaultError(f"{state} could not be written: {error.strerror}") from error


def _command(argv: Sequence[str], folder: Path) -> str:
    """Return the command line by which a run goes on."""
    words = []
    skip = False
    for word in argv:
        if skip or word.startswith("--resume="):
            skip = False
        elif word == "--resume":
            skip = True
        else:
            words.append(word)
    return shlex.join(["python", "run.py", *words, "--resume", str(folder)])
