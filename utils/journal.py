"""Keeps what a run has done in a folder, so that a killed run can go on.

A run that goes on follows its ordinary course. Where a result is at hand as a fact, it is taken
instead of computed. A fact is a name with tensors and plain values; nothing in it is a path or a
setting. A save writes all new facts to files of their own and then replaces the manifest, which
names them with their SHA-256: a process that is killed at any moment leaves the former state whole.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from utils.errors import FaultError, InputError, StateError
from utils.files import write_json

#: Of a manifest: raised by one whenever a reader of the number before could misread it.
MANIFEST_FORMAT = 1
#: How long a lock is waited for, in seconds: processes that end with a killed one hold it on.
PATIENCE = 3.0
#: What names of a fact's file look like; no other file is read or removed.
FACT_FILE = re.compile(r"fact-[0-9a-f]{16}\.pt")
#: What names of manifests look like; the number is that of the process that wrote it.
MANIFEST = re.compile(r"manifest-(\d{1,6})\.json")


class Journal(Protocol):
    """Takes and gives back facts."""

    def recall(self, name: str) -> Any | None:
        """Return the fact that an earlier process saved under `name`, None without one."""

    def note(
        self, name: str, make: Callable[[], Any], *, order: int = 0, always: bool = False
    ) -> None:
        """Let the next save write `make()` as the fact `name`, in place of the one before.

        make: returns tensors and plain values; it is called when the save comes. order: of the
        facts that several processes saved under one name, the one of the highest order is taken.
        always: every later save writes it anew.
        """

    def drop(self, name: str) -> None:
        """Let the next save forget the fact `name`, or all facts of the part of that name."""

    def under(self, part: str) -> "Journal":
        """Return the journal of a part of the run, whose names are apart from all others."""

    def due(self) -> bool:
        """Tell whether the interval since the last save has passed."""

    def save(self) -> None:
        """Write all that was noted; a failure is told and leaves the former state as it is."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise StateError, naming `what`, where a saved fact is not what it should be."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any type: the content is not trusted
        raise StateError(
            f"the saved state does not fit this run: {what} is damaged; start the run anew"
        ) from error


class Forgetful:
    """A journal that keeps nothing."""

    def recall(self, name: str) -> Any | None:
        """Return None."""
        return None

    def note(
        self, name: str, make: Callable[[], Any], *, order: int = 0, always: bool = False
    ) -> None:
        """Do nothing."""

    def drop(self, name: str) -> None:
        """Do nothing."""

    def under(self, part: str) -> "Forgetful":
        """Return this journal."""
        return self

    def due(self) -> bool:
        """Return False."""
        return False

    def save(self) -> None:
        """Do nothing."""


#: The journal of whatever is not to be saved.
FORGETFUL = Forgetful()


@dataclass(frozen=True)
class Entry:
    """Says where a fact is: an entry of a manifest."""

    #: Name of its file, in the manifest's folder.
    file: str
    #: Of the file's content.
    sha256: str
    order: int = 0


@dataclass
class FolderJournal:
    """A journal in a folder.

    Several processes may share the folder: each writes a manifest of its own, and all recall what
    was there when they began.
    """

    folder: Path
    #: Seconds between two saves.
    every: float
    #: Called with a line when a save fails; the run goes on.
    complain: Callable[[str], None]
    #: Number of this process among those that share the folder.
    process: int = 0
    #: What an earlier process saved.
    former: dict[str, Entry] = field(default_factory=dict)
    #: What this process's manifest names.
    entries: dict[str, Entry] = field(default_factory=dict)
    _noted: dict[str, tuple[Callable[[], Any], int]] = field(default_factory=dict)
    _always: dict[str, tuple[Callable[[], Any], int]] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)
    #: Files that its manifest names on the disk.
    _files: set[str] = field(init=False)

    def __post_init__(self):
        self._files = {entry.file for entry in self.entries.values()}

    @classmethod
    def opened(
        cls, folder: Path, every: float, complain: Callable[[str], None], process: int
    ) -> "FolderJournal":
        """Return the journal in `folder`, after `consolidate` where a run goes on.

        Raises StateError for a manifest that is damaged.
        """
        former = read_manifest(folder / "manifest-0.json")
        entries = dict(former) if process == 0 else {}
        return cls(folder, every, complain, process, former, entries)

    def recall(self, name: str) -> Any | None:
        """Return the fact; raise StateError if its file is missing, altered or damaged."""
        from utils.tensor_files import load_plain  # torch, which a refusal does without

        if name not in self.former:
            return None
        entry = self.former[name]
        path = self.folder / entry.file
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StateError(
                f"{path}: {error.strerror}, though the manifest names it; start the run anew"
            ) from error
        if found != entry.sha256:
            raise StateError(
                f"{path}: altered since it was saved: its SHA-256 is not that of the manifest; "
                "start the run anew"
            )
        try:
            return load_plain(str(path))
        except InputError as error:
            raise StateError(f"{path}: {error}") from error

    def note(
        self, name: str, make: Callable[[], Any], *, order: int = 0, always: bool = False
    ) -> None:
        """Let the next save write it."""
        self._noted.pop(name, None)
        self._always.pop(name, None)
        (self._always if always else self._noted)[name] = (make, order)

    def drop(self, name: str) -> None:
        """Let the next save forget it."""
        facts: tuple[dict[str, Any], ...] = self._noted, self._always, self.entries, self.former
        for known in facts:
            for key in [key for key in known if key == name or key.startswith(f"{name}/")]:
                del known[key]

    def under(self, part: str) -> "Part":
        """Return the journal of a part."""
        return Part(self, part)

    def due(self) -> bool:
        """Tell whether the interval since the last save has passed."""
        return time.monotonic() - self._last >= self.every

    def save(self) -> None:
        """Write what was noted, then the manifest, then remove the files of replaced facts."""
        written: dict[str, Entry] = {}
        try:
            for name, (make, order) in [*self._noted.items(), *self._always.items()]:
                written[name] = self._written(make(), order)
            self._write_manifest(self.entries | written)
        except (FaultError, MemoryError) as error:
            for entry in written.values():
                self._remove(entry.file)
            self.complain(
                f"warning: the state could not be saved, what was saved before stays: "
                f"{error or 'out of memory'}"
            )
        else:
            self.entries |= written
            self._noted.clear()
            for name in written:  # this process is ahead of what it would recall
                self.former.pop(name, None)
            named = {entry.file for entry in self.entries.values()}
            for file in self._files - named:
                self._remove(file)
            self._files = named
        self._last = time.monotonic()

    def _written(self, content: Any, order: int) -> Entry:
        from utils.tensor_files import save, whole

        name = f"fact-{secrets.token_hex(8)}.pt"
        path = self.folder / name
        save(whole(content), str(path))
        with open(path, "rb") as file:
            return Entry(name, hashlib.file_digest(file, "sha256").hexdigest(), order)

    def _write_manifest(self, entries: dict[str, Entry]) -> None:
        write_manifest(self.folder / f"manifest-{self.process}.json", entries)

    def _remove(self, file: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.folder / file)


@dataclass(frozen=True)
class Part:
    """The journal of a part of a run: its names stand behind the part's."""

    whole: Journal
    name: str

    def recall(self, name: str) -> Any | None:
        """Return the fact of the part."""
        return self.whole.recall(f"{self.name}/{name}")

    def note(
        self, name: str, make: Callable[[], Any], *, order: int = 0, always: bool = False
    ) -> None:
        """Let the next save write it."""
        self.whole.note(f"{self.name}/{name}", make, order=order, always=always)

    def drop(self, name: str) -> None:
        """Let the next save forget it."""
        self.whole.drop(f"{self.name}/{name}")

    def under(self, part: str) -> "Part":
        """Return the journal of a part of the part."""
        return Part(self, part)

    def due(self) -> bool:
        """Tell whether the whole run's interval has passed."""
        return self.whole.due()

    def save(self) -> None:
        """Write all that the whole run noted."""
        self.whole.save()


@dataclass(frozen=True)
class ReadOnly:
    """The journal of a process that computes what another one saves: it only recalls."""

    whole: Journal

    def recall(self, name: str) -> Any | None:
        """Return the fact."""
        return self.whole.recall(name)

    def note(
        self, name: str, make: Callable[[], Any], *, order: int = 0, always: bool = False
    ) -> None:
        """Do nothing."""

    def drop(self, name: str) -> None:
        """Do nothing."""

    def under(self, part: str) -> "ReadOnly":
        """Return the same for a part."""
        return ReadOnly(self.whole.under(part))

    def due(self) -> bool:
        """Return False."""
        return False

    def save(self) -> None:
        """Do nothing."""


def read_only(journal: Journal) -> Journal:
    """Return a journal that only recalls; one that keeps nothing is returned as it is."""
    return journal if journal is FORGETFUL else ReadOnly(journal)


def write_manifest(path: Path, entries: dict[str, Entry]) -> None:
    """Replace a manifest; raises FaultError if it cannot be written."""
    facts = {name: vars(entry) for name, entry in entries.items()}
    write_json({"format": MANIFEST_FORMAT, "facts": facts}, path)


def read_manifest(path: Path) -> dict[str, Entry]:
    """Read a manifest: name of a fact → where it is; nothing where there is no file.

    Raises StateError, naming the file, where it is damaged.
    """
    if not path.exists():
        return {}
    damaged = StateError(f"{path}: damaged: no manifest of a saved run; start the run anew")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts: Any = content["facts"] if content["format"] == MANIFEST_FORMAT else None
        entries = {str(name): Entry(**entry) for name, entry in facts.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    for entry in entries.values():
        texts = isinstance(entry.file, str) and isinstance(entry.sha256, str)
        if not texts or not FACT_FILE.fullmatch(entry.file) or type(entry.order) is not int:
            raise damaged
    return entries


def consolidate(folder: Path) -> None:
    """Make one manifest of those of all processes, and remove files that none of them names.

    One process calls it, which holds the folder's lock, before any other one opens the journal.

    Raises StateError for a manifest that is damaged, FaultError if nothing can be written.
    """
    manifests = sorted(path for path in folder.iterdir() if MANIFEST.fullmatch(path.name))
    entries: dict[str, Entry] = {}
    for path in manifests:
        for name, entry in read_manifest(path).items():
            if name not in entries or entry.order > entries[name].order:
                entries[name] = entry
    write_manifest(folder / "manifest-0.json", entries)
    named = {entry.file for entry in entries.values()}
    for path in folder.iterdir():
        others = path in manifests and path.name != "manifest-0.json"
        stray = FACT_FILE.fullmatch(path.name) and path.name not in named
        if others or stray or path.name.startswith(".writing-"):
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` for as long as the context lasts; the kernel frees it at an end.

    Raises InputError, with the number of the process that holds it, if another one does.
    """
    path = folder / "lock"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "a+", encoding="utf-8"))
            _lock(file, folder.parent)
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename[:30]}\n")
            file.flush()
        except OSError as error:
            raise FaultError(f"{path} could not be locked: {error.strerror}") from error
        yield


def _lock(file: IO[str], run: Path) -> None:
    """Lock an open file; raise InputError where another process has it for more than a moment."""
    import fcntl

    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            file.seek(0)
            holder = file.read(60).strip()
            known = f" {holder}" if re.fullmatch(r"\d+ on \S+", holder) else ""
            raise InputError(f"{run}: process{known} is at work on it; wait for its end") from error


def remove(folder: Path) -> None:
    """Remove a state that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)
