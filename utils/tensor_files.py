"""Saves and safely loads files of tensors and plain values."""

import argparse
import collections
import contextlib
import datetime
import io
import itertools
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import torch
from torch import Tensor, nn

from utils.errors import InputError, one_line
from utils.files import printable, unwritten, whole_file
from utils.memory import limited_memory, require_memory

#: The types that checkpoints of the original hold besides tensors and plain types.
ORIGINAL_TYPES = [
    argparse.Namespace,
    collections.OrderedDict,
    datetime.datetime,
    datetime.timedelta,
]
#: What a file may hold beside tensors and containers; `type(value)` is compared, no subclass.
PLAIN_TYPES = (
    type(None), bool, int, float, complex, str, bytes, datetime.datetime, datetime.timedelta,
    torch.Size, torch.dtype, torch.device,
)  # fmt: skip
#: Most members of an archive: torch.save writes one per tensor.
MOST_MEMBERS = 100_000
#: Most steps of a file's pickle, which torch takes one by one, and most values in what it makes.
MOST_STEPS = 1_000_000
#: How deep containers may lie in one another.
DEEPEST = 50
#: How often the same stored numbers may stand in a file, on average: weights are shared by few.
MOST_SHARED = 8
#: What loading may take beyond the size of the file, in bytes.
SPARE = 2**29


def save(content: Any, path: str) -> None:
    """Write tensors and plain values to `path`: the whole file or nothing (`whole_file`).

    Raises FaultError if it cannot be written; the former `path` is then untouched.
    """
    with whole_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch reports a full disk as a RuntimeError of positions, raised while handling it
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise unwritten(path, cause) from error


def map_tensors(function: Callable[[Tensor], Any], content: Any) -> Any:
    """Return nested dicts, lists and tuples with `function(tensor)` in place of every tensor."""
    if isinstance(content, Tensor):
        return function(content)
    if isinstance(content, dict):
        return {key: map_tensors(function, value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        kind = list if isinstance(content, list) else tuple
        return kind(map_tensors(function, value) for value in content)
    return content


def whole(content: Any) -> Any:
    """Return nested dicts, lists and tuples in which every tensor has a storage of its own size.

    A view into a larger tensor would be written with all of it, and an expanded one is not read.
    """

    def alone(tensor: Tensor) -> Tensor:
        own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if own else tensor.clone(memory_format=torch.contiguous_format)

    return map_tensors(alone, content)


def load_plain(path: str) -> Any:
    """Load a file of tensors and plain types onto the CPU; no code in it is run.

    ORIGINAL_TYPES, harmless types that checkpoints of the original hold, are allowed as well. All
    tensors are dense, on the CPU, and store all numbers that their shapes claim (`flaw_of`).

    torch.save writes a zip archive. It is read only if no member is compressed, the members fit
    into the file's size, and every checksum is right; torch itself verifies none. The format of
    torch before 1.6 has no checksums. While the file is read, no more memory can be taken than its
    size calls for, and the numbers of its values and members are bounded: a small file stays cheap.

    Raises InputError, without the file's name, if the file is missing, damaged, does not fit into
    the free memory, or holds anything else.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "no such file"
        raise InputError(f"{what}; give a file")
    size = os.path.getsize(path)
    require_memory(size, "what it holds", "take a machine with more memory")
    try:
        with limited_memory(4 * size + SPARE):
            is_archive = _check_archive(path)
            _check_steps(path, is_archive)
            with torch.serialization.safe_globals(ORIGINAL_TYPES), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
            _check_values(content, size)
            return content
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        if not found and not is_archive:
            raise InputError(
                "unreadable or damaged: no file that torch.save wrote; write it again"
            ) from error
        raise _not_plain(found[1] if found else "something") from error
    except PermissionError as error:
        raise InputError("no permission to read it") from error
    except Exception as error:  # torch raises many types for damaged files
        raise InputError(
            f"unreadable or damaged ({printable(one_line(error)[:120])}); write it again"
        ) from error


def _not_plain(name: str) -> InputError:
    """Return the refusal of a file that holds `name`."""
    holds = "it holds something that" if name == "something" else f"it holds {name}, which"
    return InputError(
        f"refused: {holds} is no tensor or plain value, and nothing else is "
        "read from a pickle; save it again as tensors, numbers, strings, lists and dicts"
    )


def check_archive_size(path: str) -> None:
    """Raise InputError for a zip archive whose list of members alone is too long to be read.

    A file that is no zip archive passes.
    """
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 2**16 - 98))
        end = file.read()
    place = end.rfind(b"PK\x05\x06")
    if place < 0:
        return
    members = int.from_bytes(end[place + 10 : place + 12], "little")
    length = int.from_bytes(end[place + 12 : place + 16], "little")
    larger = end[max(0, place - 76) : place]  # where archives of more members count them
    if larger.startswith(b"PK\x06\x06"):
        members = int.from_bytes(larger[32:40], "little")
        length = int.from_bytes(larger[40:48], "little")
    if max(members, length // 256) > MOST_MEMBERS:
        raise InputError(
            f"damaged: an archive of {members:,} members, more than {MOST_MEMBERS:,}; write it "
            "again"
        )


def _check_archive(path: str) -> bool:
    """Tell whether the file is a zip archive; raise InputError if torch did not write it so."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # how torch tells an archive from its older format
            return False
    check_archive_size(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise InputError(
                    f"damaged: {printable(member.filename)} is compressed, and torch.save "
                    "compresses nothing; write it again"
                )
        if len({name.lower() for name in archive.namelist()}) < len(members):
            raise InputError("damaged: it holds members of the same name; write it again")
        total, size = sum(member.file_size for member in members), os.path.getsize(path)
        if total > size:
            raise InputError(
                f"damaged: its members claim {total} bytes, the file has {size}; write it again"
            )
        broken = archive.testzip()
    if broken is not None:
        raise InputError(
            f"damaged: {printable(broken)} does not match its checksum; copy it again from where "
            "it was made"
        )
    return True


def _check_steps(path: str, is_archive: bool) -> None:
    """Raise InputError where a file's pickles take more than MOST_STEPS steps."""
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.lower().endswith(".pkl"):
                    _count_steps(io.BytesIO(archive.read(name)), MOST_STEPS)
        return
    left = MOST_STEPS
    with open(path, "rb") as file:  # a number, a version, the system, the content, names
        for _ in range(5):
            left -= _count_steps(file, left)


def _count_steps(file: IO[bytes], most: int) -> int:
    """Count the steps of one pickle, and raise InputError beyond `most`."""
    steps = 0
    with contextlib.suppress(ValueError, IndexError):  # torch says what is wrong with it
        for _ in itertools.islice(pickletools.genops(file), most + 1):
            steps += 1
    if steps > most:
        raise _too_many("steps to read it")
    return steps


def _too_many(what: str) -> InputError:
    return InputError(f"refused: more than {MOST_STEPS:,} {what}; save tensors, not lists")


def flaw_of(value: Tensor) -> str | None:
    """Say, in words that follow "it", why nothing can be computed with a tensor as it is.

    None for a dense tensor on the CPU that stores all numbers that its shape claims. Reads no
    numbers. Flawed are sparse, nested, quantised and meta tensors, those of subclasses of Tensor,
    lazy conjugates, those whose attributes hide methods, and tensors with more numbers than their
    storage holds, which `expand` makes: any operation on such a tensor may take as much memory as
    its shape claims.
    """
    if type(value) not in (Tensor, nn.Parameter) or _hides_methods(value):
        return f"is a {type(value).__name__}, not a plain tensor"
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"is a {kind} tensor, not a dense one"
    if value.device.type != "cpu":
        return f"is on the {value.device.type} device and holds no numbers here"
    if value.is_quantized:
        return f"is quantised: its dtype is {value.dtype}"
    if value.is_conj() or value.is_neg():
        return "is a lazy view, not a plain tensor"
    stored = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > stored:
        return (
            f"has {value.numel()} numbers of shape {tuple(value.shape)}, but only {stored} "
            "are stored: it was saved expanded"
        )
    return None


def _hides_methods(value: Any) -> bool:
    """Tell whether an object from a file has attributes that stand in the place of methods."""
    return any(hasattr(type(value), name) for name in getattr(value, "__dict__", {}))


def _check_values(content: Any, size: int) -> None:
    """Raise InputError unless all that a file holds is plain and no larger than it may be.

    size: of the file, in bytes. Lists may hold one another many times: every place counts.
    """
    left = [iter([("", content)])]
    count, total, stored = 0, 0, {}
    while left:
        place, value = next(left[-1], (None, None))
        if place is None:
            left.pop()
            continue
        count += 1
        if count > MOST_STEPS:
            raise _too_many("values")
        if isinstance(value, Tensor):
            flaw = flaw_of(value)
            if flaw is not None:
                raise InputError(f"{place or 'it'} {flaw}; save it again as a plain tensor")
            storage = value.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
            total += value.numel() * value.element_size()
            continue
        inner = _parts(place, value)
        if inner is not None:
            left.append(inner)
            if len(left) > DEEPEST:
                raise InputError(f"refused: lists or dicts {DEEPEST} deep; save it again flat")
    if sum(stored.values()) > size or total > MOST_SHARED * size:
        raise InputError(
            f"damaged: its tensors claim {max(total, *stored.values()):,} bytes, the file has "
            f"{size:,}; write it again"
        )


def _parts(place: str, value: Any) -> Iterator[tuple[str, Any]] | None:
    """Iterate over what a container holds, with the place of each; None for a plain value."""
    kind = type(value)
    if kind in (dict, collections.OrderedDict, collections.Counter) and not _hides_methods(value):
        return _entries(place, value)
    if kind is argparse.Namespace:
        return _entries(place, vars(value))
    if kind in (list, tuple, set):
        return ((f"{place}[{i}]", part) for i, part in enumerate(value))
    if kind not in PLAIN_TYPES:
        raise _not_plain(f"{kind.__module__}.{kind.__name__}" if kind is not type else str(value))
    return None


def _entries(place: str, mapping: Mapping) -> Iterator[tuple[str, Any]]:
    """Iterate over keys and values of a mapping, with their places."""
    for key, value in mapping.items():
        name = printable(str(key)[:60]) if type(key) in (str, int) else "…"
        yield f"a key of {place}", key
        yield (f"{place}[{name}]" if place else name), value
