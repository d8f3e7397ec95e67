"""Files of weights that frameworks of federated learning keep: tensors by name or as a list."""

import io
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.pretrained import WRAPPERS
from utils.errors import InputError, one_line
from utils.files import printable
from utils.memory import limited_memory, require_memory
from utils.tensor_files import SPARE, check_archive_size, load_plain

#: Kinds of NVFlare's DXO that hold weights, and whether they are a difference.
DXO_KINDS = {"WEIGHTS": False, "WEIGHT_DIFF": True}
#: Where a DXO says how many steps its client took.
DXO_STEPS = "NUM_STEPS_CURRENT_ROUND"
#: Most bytes of the header of a safetensors file, which names every tensor.
MOST_HEADER = 2**22
#: How many times its size an archive may unpack to, unless that is as small as SMALL_CONTENT bytes.
MOST_PACKED, SMALL_CONTENT = 100, 2**28


@dataclass(frozen=True)
class UpdateFile:
    """Holds what a file of weights or of a difference contains."""

    #: Tensors or arrays, by name or in the order of the model's state dict.
    values: Mapping[str, Any] | list
    #: What the file is, in words.
    kind: str
    #: Whether it says that it holds a difference, after minus before; None where it does not say.
    difference: bool | None = None
    #: Steps that it says the client took; None where it does not say.
    steps: int | None = None


def read_update_file(path: str) -> UpdateFile:
    """Read a file of weights; no code in it is run.

    `.npz` by name or as a list (arr_0, arr_1, …, as numpy.savez keeps Flower's arrays);
    `.safetensors`; and what torch.save wrote: a state dict, alone or under a name in WRAPPERS, a
    list of tensors, Flower's Parameters as a dict (tensors: bytes of numpy.save, tensor_type), or
    NVFlare's DXO as a dict (kind, data, meta).

    Raises InputError, without the file's name, for anything else.
    """
    if not os.path.isfile(path):
        raise InputError("no such file; give a file of weights")
    if path.endswith(".npz"):
        return _read_npz(path)
    if path.endswith(".safetensors"):
        return _read_safetensors(path)
    content = load_plain(path)
    if isinstance(content, list | tuple):
        return UpdateFile(list(content), f"a list of {len(content)} tensors")
    if not isinstance(content, Mapping) or not content:
        raise InputError("holds no weights; give a state dict or a list of tensors")
    if "data" in content and ("kind" in content or "data_kind" in content):
        return _read_dxo(content)
    if {"tensors", "tensor_type"} <= content.keys():
        return _read_parameters(content)
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return UpdateFile(content[wrapper], f"a state dict under '{wrapper}'")
    return UpdateFile(content, "a state dict")


def _read_npz(path: str) -> UpdateFile:
    """Read an archive of numpy arrays, none of which may hold pickled objects."""
    try:
        total = _unpacked_size(path)
        with (
            limited_memory(2 * total + SPARE),
            np.lib.npyio.NpzFile(path, allow_pickle=False) as archive,
        ):
            arrays = {name: archive[name] for name in archive.files}
    except InputError:
        raise
    except Exception as error:  # damaged archives make numpy raise almost any type
        raise InputError(f"unreadable or damaged ({printable(one_line(error)[:120])})") from error
    if not arrays:
        raise InputError("holds no arrays")
    if all(re.fullmatch(r"arr_\d+", name) for name in arrays):
        ordered = sorted(arrays, key=lambda name: int(name[4:]))
        return UpdateFile([arrays[name] for name in ordered], f"a list of {len(arrays)} arrays")
    return UpdateFile(arrays, f"{len(arrays)} arrays by name")


def _unpacked_size(path: str) -> int:
    """Return the bytes that an archive unpacks to.

    Raises InputError for more than the free memory, and for a bomb: many times the file's size.
    """
    check_archive_size(path)
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > max(SMALL_CONTENT, MOST_PACKED * os.path.getsize(path)):
        raise InputError(
            f"unpacks to {total:,} bytes, more than {MOST_PACKED} times its size; save it "
            "uncompressed, by numpy.savez"
        )
    require_memory(total, "what it unpacks to", "take a machine with more memory")
    return total


def _read_safetensors(path: str) -> UpdateFile:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(
            "needs the package safetensors; install it, or save the weights by torch.save"
        ) from error
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MOST_HEADER:
            raise InputError(
                f"unreadable or damaged (its header claims {header:,} bytes, above {MOST_HEADER:,})"
            )
        size = os.path.getsize(path)
        require_memory(size, "what it holds", "take a machine with more memory")
        with limited_memory(4 * size + SPARE):
            return UpdateFile(load_file(path), "safetensors")
    except InputError:
        raise
    except Exception as error:  # its errors have no common type
        raise InputError(f"unreadable or damaged ({printable(one_line(error)[:120])})") from error


def _read_dxo(content: Mapping) -> UpdateFile:
    """Take the weights out of a DXO, as its own encoding names the entries."""
    kind, data = content.get("kind", content.get("data_kind")), content["data"]
    if not isinstance(kind, str) or kind not in DXO_KINDS or not isinstance(data, Mapping):
        raise InputError(
            f"a DXO of kind {str(kind)[:40]!r}: only {' and '.join(DXO_KINDS)} hold weights"
        )
    meta = content.get("meta")
    steps = meta.get(DXO_STEPS) if isinstance(meta, Mapping) else None
    count = steps if isinstance(steps, int) and not isinstance(steps, bool) else None
    return UpdateFile(data, f"a DXO of kind {kind}", DXO_KINDS[kind], count)


def _read_parameters(content: Mapping) -> UpdateFile:
    """Take the arrays out of Flower's Parameters, each the bytes that numpy.save writes."""
    if content["tensor_type"] != "numpy.ndarray" or not isinstance(content["tensors"], list):
        raise InputError(
            f"Parameters of type {str(content['tensor_type'])[:40]!r}: only numpy.ndarray is read"
        )
    size = sum(len(part) for part in content["tensors"] if isinstance(part, bytes))
    try:
        with limited_memory(2 * size + SPARE):
            arrays = [np.load(io.BytesIO(part), allow_pickle=False) for part in content["tensors"]]
    except Exception as error:  # damaged bytes make numpy raise almost any type
        reason = printable(one_line(error)[:120])
        raise InputError(f"Parameters: unreadable ({reason})") from error
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise InputError("Parameters: unreadable (an archive in the place of an array)")
    return UpdateFile(arrays, f"Parameters of {len(arrays)} arrays")
