"""Writes files whole or not at all, and never over those of another run."""

import contextlib
import csv
import fcntl
import importlib.util
import io
import json
import math
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from utils.errors import FaultError
from utils.interruption import unfinished

#: Ending of the file that reserves a stem while its files are written.
CLAIM = ".claim"
#: How the name of a file begins that is being written.
TEMPORARY = ".writing-"
#: Folders from which this process has removed what killed processes left.
_tidied: set[str] = set()


@contextlib.contextmanager
def whole_file(path: str | Path, *, text: bool = False) -> Iterator[IO]:
    """Yield a file, binary or UTF-8 text, that becomes `path` when the context ends without error.

    The content goes to a temporary file in the folder of `path` (created if missing), is flushed to
    the disk and then renamed; the folder is flushed too, so that files which are written one after
    the other outlive a power cut in this order. An error in the context, even in the middle of a
    write, leaves the former `path` untouched and no temporary file behind, and so does a signal.
    Only a killed process leaves its temporary file, `.writing-…`; the next process of this machine
    that writes into the folder removes it. In text, bytes of file names that are no UTF-8 are
    written as escapes.

    Raises FaultError, naming `path`, if anything cannot be written.
    """
    final = os.path.abspath(path)
    folder = os.path.dirname(final)
    temporary = os.path.join(folder, f"{TEMPORARY}{_host()}-{secrets.token_hex(8)}")
    try:
        os.makedirs(folder, exist_ok=True)
        _tidy(folder)
        with unfinished(temporary):
            try:
                with _create(temporary) as file:
                    if text:
                        words = io.TextIOWrapper(
                            file, "utf-8", "backslashreplace", newline="", write_through=True
                        )
                        yield words
                        words.detach()
                    else:
                        yield file
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, final)
            finally:
                with contextlib.suppress(OSError):  # it is gone where all went well
                    os.unlink(temporary)
        _flush_folder(folder)
    except OSError as error:
        raise unwritten(path, error) from error


def _flush_folder(folder: str) -> None:
    """Flush the names in a folder to the disk, where its file system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _host() -> str:
    """Return the name of this machine, as far as it can be part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]", "_", platform.node())[:60] or "unnamed"


def _create(path: str) -> IO:
    """Create `path`, which must not exist, and lock it until it is closed.

    The end of a process, however it comes, ends its locks. Some file systems know no locks; what a
    killed process left there stays.
    """
    while True:
        file = open(path, "xb")  # noqa: SIM115
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process took it for abandoned before it was locked


def _remove_if_abandoned(path: str, said: bytes = b"") -> bool:
    """Remove a file that `_create` made, unless its process is alive; tell whether it was removed.

    said: how the file ends; another one is left alone.
    """
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink and file.read().endswith(said):
            os.unlink(path)
            return True
    return False


def _tidy(folder: str) -> None:
    """Remove temporary files that killed processes of this machine left in `folder`, once."""
    if folder in _tidied:
        return
    _tidied.add(folder)
    ours = f"{TEMPORARY}{_host()}-"
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(ours)]
    for path in found:
        _remove_if_abandoned(path)


def printable(name: str) -> str:
    """Return a file name in which what would break or disguise a printed line is escaped.

    Such are line ends, other control characters, invisible ones that turn the direction of
    writing, and bytes that are no UTF-8. Letters of all languages and emoji stay.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def package_folder(name: str) -> Path:
    """Return the folder of a package that is required, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None  # it is required
    assert spec.origin is not None  # it is a package of files
    return Path(spec.origin).parent


def unwritten(path: str | Path, error: Exception) -> FaultError:
    """Return the FaultError that `path` could not be written, with the reason on one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return FaultError(f"{path} could not be written: {reason or type(error).__name__}")


def free_stem(stem: str, endings: Sequence[str] = ("",)) -> str:
    """Return the first of `stem`, `stem-2`, `stem-3`, … for which no file with an ending exists."""
    candidate, number = stem, 2
    while any(os.path.lexists(candidate + ending) for ending in endings):
        candidate, number = f"{stem}-{number}", number + 1
    return candidate


@contextlib.contextmanager
def claimed_stem(stem: str, endings: Sequence[str]) -> Iterator[str]:
    """Yield the first free stem of `free_stem` and reserve it for as long as the context lasts.

    Every file that the context writes must have this stem and one of the endings. If an error or a
    signal ends the context, these files are removed, so that a run leaves all its files or none.
    The folder is created if missing. A file `{stem}.claim`, which only one process can create,
    reserves the stem, also between machines; it says which process. A killed process leaves its
    claim behind, and the files that it had written. Such files stay, and their stem is not used
    again; a claim of this machine without files is removed and its stem is used.

    Raises FaultError if the claim cannot be created.
    """
    free, claim = _claim(stem, endings)
    files = [free + ending for ending in endings]
    with claim, unfinished(*files, free + CLAIM):
        try:
            yield free
        except BaseException:
            for file in files:
                with contextlib.suppress(OSError):
                    os.unlink(file)
            raise
        finally:
            with contextlib.suppress(OSError):
                os.unlink(free + CLAIM)


def _claim(stem: str, endings: Sequence[str]) -> tuple[str, IO]:
    """Return a free stem and the open file that reserves it."""
    own = f"process {os.getpid()} on {_host()}\n".encode()
    try:
        os.makedirs(os.path.dirname(os.path.abspath(stem)), exist_ok=True)
    except OSError as error:
        raise unwritten(stem + endings[0], error) from error
    while True:
        free = free_stem(stem, [*endings, CLAIM])
        without_files = free_stem(stem, endings)
        if without_files != free and _remove_if_abandoned(
            without_files + CLAIM, said=f" on {_host()}\n".encode()
        ):
            continue
        try:
            claim = _create(free + CLAIM)
        except FileExistsError:  # another process took it in between
            continue
        except OSError as error:
            raise unwritten(free + endings[0], error) from error
        try:
            os.write(claim.fileno(), own)
        except OSError as error:
            os.unlink(free + CLAIM)
            claim.close()
            raise unwritten(free + endings[0], error) from error
        if free_stem(free, endings) == free:
            return free, claim
        os.unlink(free + CLAIM)  # another process took it, wrote and was done in between
        claim.close()


def claim_folder(path: str | Path) -> Path:
    """Create and return folder `path`, or the first of `path-2`, `path-3`, … that does not exist.

    Raises FaultError if it cannot be created.
    """
    while True:
        free = Path(free_stem(str(path)))
        try:
            free.mkdir(parents=True)
            return free
        except FileExistsError:  # somebody else took the name in between
            continue
        except OSError as error:
            raise FaultError(f"{free} could not be created: {error.strerror}") from error


def write_json(content: Mapping, path: str | Path) -> None:
    """Write strict JSON, in which every number is finite.

    JSON cannot express NaN or infinity. Callers replace them with null first, by `null_if_nan` or
    `null_unless_finite`; the description of result.json says what null means in each entry.

    Raises ValueError, naming the entry, for a number that is not finite.
    """
    text = json.dumps(_plain(content, ""), indent=1, allow_nan=False) + "\n"
    with whole_file(path, text=True) as file:
        file.write(text)


def _plain(value: Any, place: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(v, f"{place}/{key}") for key, v in value.items()}
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v, f"{place}/{i}") for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {value} has no meaning in JSON")
    return value


def null_if_nan(value: Any) -> Any:
    """Return nested mappings and sequences with None in place of NaN (which means "no value")."""
    return _with_null(value, math.isnan)


def null_unless_finite(value: Any) -> Any:
    """Return nested mappings and sequences with None in place of NaN and infinity (overflow)."""
    return _with_null(value, lambda number: not math.isfinite(number))


def _with_null(value: Any, where: Callable[[float], bool]) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_null(v, where) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(v, where) for v in value]
    return None if isinstance(value, float) and where(value) else value


def write_csv(header: Sequence[str], rows: Sequence[Sequence], path: str | Path) -> None:
    """Write a CSV file of `rows` under `header`; raises FaultError if it cannot be written."""
    with whole_file(path, text=True) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
