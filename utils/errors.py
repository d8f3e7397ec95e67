"""Errors that a user sees: refused inputs and faults."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """A refused input. Its text is one line: the flag or file, the value, what to do.

    Below the scripts the flag or file is left out; `naming` adds it.
    """


class FaultError(RuntimeError):
    """Something outside the user's input went wrong, such as a full disk."""


@contextlib.contextmanager
def naming(subject: str) -> Iterator[None]:
    """Within this context `subject`, a flag and its value or a file, opens the text of InputErrors.

    The lower layers know no flags: they raise the fact and the remedy, and the script that read the
    flag names it here.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch raised `error` because memory ran out, on the GPU or on the CPU."""
    text = str(error).lower()
    return any(phrase in text for phrase in ("out of memory", "can't allocate memory"))
