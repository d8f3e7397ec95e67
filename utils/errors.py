"""The errors that users see: refused inputs and faults."""

import contextlib
from collections.abc import Callable, Iterator


class InputError(ValueError):
    """Refuses an input; the script ends with exit code 2.

    The text is one line: the flag or file, its value, and what to do instead. Below the scripts
    the flag or file is left out; `naming` adds it.
    """


class StateError(InputError):
    """Refuses the saved state of a run: it is damaged, or of another run.

    Nobody takes it for a refusal of what is attacked, which an audit may pass over.
    """


class FaultError(RuntimeError):
    """Reports what went wrong outside the user's input, such as a full disk (exit code 1)."""


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


@contextlib.contextmanager
def telling_memory(tell: Callable[[], str]) -> Iterator[None]:
    """Turn memory that runs out within this context into a FaultError that says `tell()`.

    tell: returns what takes how much, and what would fit; it takes no memory itself.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, FaultError) or not is_out_of_memory(error):  # it may be told already
            raise
        raise FaultError(f"out of memory: {tell()}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out, on the GPU or on the CPU."""
    text = str(error).lower()
    said = any(phrase in text for phrase in ("out of memory", "can't allocate memory"))
    return said or isinstance(error, MemoryError)


def one_line(error: Exception) -> str:
    """Write the text of an error on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
