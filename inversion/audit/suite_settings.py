"""The command line of a whole audit as typed settings, built and refused without torch."""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from inversion.audit.flags import attribute_of, suite_flags
from inversion.audit.settings import Settings, settings_from
from utils.errors import InputError
from utils.script import writable_folder

#: Seconds of an audit where --budget is not given.
DEFAULT_BUDGET = 300.0
#: What the checkpoints are read with, before a part puts in its own attack.
READING = {"attack": "auto", "epochs": 1, "lr": 1.0, "metric": True, "controls": True}
#: Flags of processes: the suite runs in one, so that its parts take comparable times.
PROCESS_FLAGS = {
    "--nproc": None, "--multiprocessing-distributed": False, "--world-size": -1, "--rank": -1,
    "--dist-url": None, "--dist-backend": None,
}  # fmt: skip
#: Flags of scoring that the suite sets itself.
SCORING_FLAGS = {"--controls": None, "--GInfoR": False, "--one-to-one-similarity": False}


@dataclass(frozen=True)
class SuiteSettings:
    """Holds all that one command line of `run.py --audit` asks for."""

    checkpoints: tuple[str, ...]
    #: Sealed truth files, in any order: their ids tell which checkpoint each belongs to.
    truths: tuple[str, ...]
    #: Wall-clock time of the whole audit, in seconds.
    budget: float
    #: Whether the client's images and their reconstructions may stand in files.
    with_images: bool
    first_seed: int
    #: Number of the GPU to compute on; None for the first one, else the CPU.
    gpu: int | None
    id: str
    root: str
    print_freq: int
    dry_run: bool
    #: The words of the command line.
    argv: tuple[str, ...]
    #: The flags as given, of which `reading` makes those of one checkpoint.
    args: argparse.Namespace

    @property
    def command(self) -> str:
        """The command that repeats this audit."""
        return shlex.join(["python", "run.py", *self.argv])

    @property
    def folder(self) -> Path:
        """Where the results go, if nothing is there yet."""
        return Path(self.root, "results", "exp", self.id)

    @property
    def record(self) -> Mapping[str, object]:
        """Every flag with its value."""
        return vars(self.args)

    def reading(self, checkpoint: str, truth: str | None) -> Settings:
        """Return the settings by which the files of one checkpoint are read and scored."""
        changes = {
            "audit": False, "budget": None, "no_images": False, "checkpoint": checkpoint,
            "truth": truth, **READING,
        }  # fmt: skip
        settings = settings_from(argparse.Namespace(**{**vars(self.args), **changes}))
        # --max-memory concerns what is solved: the matching of the suite is short
        return replace(settings, attack=replace(settings.attack, matching_memory=None))


def suite_settings_from(args: argparse.Namespace, argv: list[str]) -> SuiteSettings:
    """Build the settings of an audit from the parsed command line and its words.

    Raises InputError, naming the flag, for what can be refused without opening a file.
    """
    if args.checkpoint is None:
        raise InputError("--checkpoint: missing; give one or several files that training.py wrote")
    for flag, default in {**suite_flags(), **SCORING_FLAGS, **PROCESS_FLAGS}.items():
        value = getattr(args, attribute_of(flag))
        if value != default:
            words = {True: flag, False: f"--no-{flag[2:]}"}
            text = " ".join(value) if isinstance(value, list) else value
            shown = words[value] if isinstance(value, bool) else f"{flag} {text}"
            raise InputError(f"{shown}: the suite of --audit sets this itself; leave it out")
    checkpoints, truths = _several(args.checkpoint), _several(args.truth)
    if len(set(checkpoints)) < len(checkpoints):
        raise InputError("--checkpoint: a file is given twice; give each once")
    settings = SuiteSettings(
        checkpoints=checkpoints,
        truths=truths,
        budget=DEFAULT_BUDGET if args.budget is None else args.budget,
        with_images=not args.no_images,
        first_seed=args.seed,
        gpu=args.gpu,
        id=args.id,
        root=args.root,
        print_freq=args.print_freq,
        dry_run=args.dry_run,
        argv=tuple(argv),
        args=args,
    )
    settings.reading(checkpoints[0], None)  # refuses what no checkpoint can be read with
    writable_folder(str(settings.folder), "--root")
    return settings


def _several(values: str | list[str] | None) -> tuple[str, ...]:
    """Return the files of a flag that takes one or several."""
    if values is None:
        return ()
    return (values,) if isinstance(values, str) else tuple(values)
