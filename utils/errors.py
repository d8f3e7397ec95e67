"""The errors that users see: refused inputs and faults."""


class InputError(ValueError):
    """Refuses an input; the script ends with exit code 2.

    The text is one line: the flag or file, its value, and what to do instead.
    """


class FaultError(RuntimeError):
    """Reports what went wrong outside the user's input, such as a full disk (exit code 1)."""


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch raised `error` because memory ran out, on the GPU or on the CPU."""
    text = str(error).lower()
    return any(phrase in text for phrase in ("out of memory", "can't allocate memory"))
