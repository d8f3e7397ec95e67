"""Opens the folder of a run, new or to go on with, and the journal in which the run is saved.

Nothing in a saved state supplies a flag or a path. To go on the same command is given again with
`--resume FOLDER`; what decides the run is compared with what it began with.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.console import Reporter, duration
from utils.errors import FaultError, InputError
from utils.files import claim_folder, printable, write_json
from utils.journal import FORGETFUL, FolderJournal, Journal, consolidate, locked, remove
from utils.shard import ALONE, Shard

#: Of run.json in a state: raised by one whenever a reader of the number before could misread it.
STATE_FORMAT = 1
#: Name of the state's folder in the folder of a run, and of the file that says what decides it.
STATE, RUN_FILE = "state", "run.json"
#: Flags that may change when a run goes on: what they decide is where and how fast it computes,
#: what it prints, and where results go. Names as in `vars(args)`.
SAFE = frozenset({
    "resume", "save_every", "print_freq", "id", "root", "nproc", "gpu",
    "multiprocessing_distributed", "world_size", "rank", "dist_url", "dist_backend", "workers",
    "shard", "offload_seeds", "dry_run", "traceback", "detect_anomaly", "verbose",
    "sweep_workers", "max_concurrent", "cpus_per_trial", "ngpus_per_trial", "ray_address",
    "search_resume",
})  # fmt: skip
#: Flags that name files of which the content decides; the file may have moved.
FILES = ("checkpoint", "truth", "labels", "model", "lpips_weights", "simulation_checkpoint")


@dataclass(frozen=True)
class Beginning:
    """Says what decides a run: it is written when the run begins and compared when it goes on."""

    #: Every flag with its value, but those in SAFE and FILES.
    settings: Mapping[str, Any]
    #: Flag in FILES → SHA-256 of every file that it names.
    inputs: Mapping[str, list[str]]


def beginning_of(record: Mapping[str, object]) -> Beginning:
    """Return what decides a run of these flags; reads the files that they name.

    record: every flag with its value, as in `Settings.record`.
    """
    settings = {name: v for name, v in record.items() if name not in SAFE and name not in FILES}
    inputs = {}
    for flag in FILES:
        given = record.get(flag)
        names = given if isinstance(given, list | tuple) else [given]
        digests = [_digest(str(name)) for name in names if name is not None]
        if digests:
            inputs[flag] = digests
    return Beginning(json.loads(json.dumps(settings, default=str)), inputs)


def _digest(name: str) -> str:
    """Return the SHA-256 of a file; of the text itself where no such file exists."""
    name = name.rpartition(":")[0] if not os.path.isfile(name) and ".py:" in name else name
    try:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def check_resumable(record: Mapping[str, object]) -> None:
    """Refuse to go on with a run that these flags do not continue; do nothing without --resume.

    Needs no torch. Raises InputError, naming the flag that changed or what is wrong.
    """
    if record.get("resume") is None:
        return
    folder = str(record["resume"])
    state = Path(folder, STATE)
    if not Path(folder).is_dir():
        raise InputError(f"--resume {folder}: no such folder; give the folder of a run's results")
    if not state.is_dir():
        raise InputError(
            f"--resume {folder}: holds no saved state: the run ended whole, or it was begun with "
            "--save-every 0; start it anew"
        )
    before, now = _read(state / RUN_FILE, folder), beginning_of(record)
    for flag in [*before.inputs, *now.inputs]:
        if before.inputs.get(flag) != now.inputs.get(flag):
            raise InputError(
                f"--{_flag(flag)} {_shown(record.get(flag))}: is not the file that the run in "
                f"{folder} began with; give that file, or start the run anew"
            )
    for name in [*before.settings, *now.settings]:
        old, new = before.settings.get(name), now.settings.get(name)
        if old != new:
            raise InputError(
                f"--{_flag(name)} {_shown(new)}: the run in {folder} began with {_shown(old)}; "
                "give the same, or start the run anew"
            )


def _flag(name: str) -> str:
    return printable(name.replace("_", "-"))[:60]


def _shown(value: object) -> str:
    return printable(str(value))[:120]


def _read(path: Path, folder: str) -> Beginning:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        right = content["format"] == STATE_FORMAT
        settings, inputs = content["settings"], content["inputs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"--resume {folder}: {path.name} of its state is missing or damaged; start the run anew"
        ) from error
    if not right or not isinstance(settings, dict) or not isinstance(inputs, dict):
        raise InputError(
            f"--resume {folder}: its state was saved by another version; start the run anew"
        )
    return Beginning(settings, inputs)


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
        if every and processes.any(not (path / STATE / token).exists()):
            reporter.say("not saved: a process does not see this folder; give one that all share")
            every = 0.0
        if every:
            journal = FolderJournal.opened(path / STATE, every, reporter.say, processes.rank)
            run = replace(run, journal=journal, every=every)
            if run.resumed:
                reporter.say(f"going on with what is saved in {path / STATE}")
            else:
                reporter.say(f"saved every {duration(every)}; --save-every changes that")
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
            content = {"format": STATE_FORMAT, **vars(beginning_of(record))}
            write_json(content, state / RUN_FILE)
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
