"""Errors that a user sees: refused inputs and faults."""


class InputError(ValueError):
    """A refused input. Its text is one line: the flag or file, the value, what to do."""


class FaultError(RuntimeError):
    """Something outside the user's input went wrong, such as a full disk."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch raised `error` because memory ran out, on the GPU or on the CPU."""
    text = str(error).lower()
    return any(phrase in text for phrase in ("out of memory", "can't allocate memory"))
