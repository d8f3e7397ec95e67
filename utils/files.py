"""Writing files: whole or not at all."""

import contextlib
import io
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from utils.cli import FaultError


@contextlib.contextmanager
def whole_file(path: str | Path, *, text: bool = False) -> Iterator[IO]:
    """A file to write into, bytes or UTF-8 text, that becomes `path` when the context ends well.

    It is written under a temporary name in the folder of `path`, which is created where it is
    missing, brought to the disk and renamed. Whatever ends the context early, also in the middle
    of a write, leaves what stood at `path` untouched and no temporary file behind; only a killed
    process leaves its own, `.writing-…`.

    Raises FaultError, naming `path`, where anything cannot be written.
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


def unwritten(path: str | Path, error: Exception) -> FaultError:
    """The fault that `path` could not be written, with the reason in one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return FaultError(f"{path} could not be written: {reason or type(error).__name__}")


def free_stem(stem: str, endings: Sequence[str] = ("",)) -> str:
    """The first of `stem`, `stem-2`, `stem-3`, … with which no file of these endings exists."""
    candidate, number = stem, 2
    while any(os.path.lexists(candidate + ending) for ending in endings):
        candidate, number = f"{stem}-{number}", number + 1
    return candidate
