"""Writes files whole or not at all, and never over those of another run."""

import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from utils.errors import FaultError

#: Ending of the empty file that reserves a stem while its files are written.
CLAIM = ".claim"


@contextlib.contextmanager
def whole_file(path: str | Path, *, text: bool = False) -> Iterator[IO]:
    """Yield a file, binary or UTF-8 text, that becomes `path` when the context ends without error.

    The content goes to a temporary file in the folder of `path` (created if missing), is flushed to
    the disk and then renamed. An error in the context, even in the middle of a write, leaves the
    former `path` untouched and no temporary file behind. Only a killed process leaves its
    temporary file, `.writing-…`.

    Raises FaultError, naming `path`, if anything cannot be written.
    """
    final = os.path.abspath(path)
    folder = os.path.dirname(final)
    temporary = os.path.join(folder, f".writing-{secrets.token_hex(8)}")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "xb") as file:
            if text:
                words = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
                yield words
                words.detach()
            else:
                yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            os.unlink(temporary)


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

    Every file that the context writes must have this stem and one of the endings. If an error ends
    the context, these files are removed, so that a run leaves all its files or none. The folder is
    created if missing. An empty file `{stem}.claim`, which only one process can create, reserves
    the stem, also between machines. A killed process leaves its claim behind; that stem is then
    not used again.

    Raises FaultError if the claim cannot be created.
    """
    free = _claim(stem, endings)
    try:
        yield free
    except BaseException:
        for ending in endings:
            with contextlib.suppress(OSError):
                os.unlink(free + ending)
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(free + CLAIM)


def _claim(stem: str, endings: Sequence[str]) -> str:
    try:
        os.makedirs(os.path.dirname(os.path.abspath(stem)), exist_ok=True)
    except OSError as error:
        raise unwritten(stem + endings[0], error) from error
    while True:
        free = free_stem(stem, [*endings, CLAIM])
        try:
            os.close(os.open(free + CLAIM, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:  # another process took it in between
            continue
        except OSError as error:
            raise unwritten(free + endings[0], error) from error
        if free_stem(free, endings) == free:
            return free
        os.unlink(free + CLAIM)  # another process took it, wrote and was done in between


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
