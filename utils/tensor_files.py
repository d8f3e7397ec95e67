"""Saves and safely loads files of tensors and plain values."""

import argparse
import collections
import datetime
import os
import pickle
import re
import warnings
import zipfile
from typing import Any

import torch

from utils.errors import InputError, one_line
from utils.files import unwritten, whole_file

#: The types that checkpoints of the original hold besides tensors and plain types.
ORIGINAL_TYPES = [
    argparse.Namespace,
    collections.OrderedDict,
    datetime.datetime,
    datetime.timedelta,
]


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


def load_plain(path: str) -> Any:
    """Load a file of tensors and plain types onto the CPU; no code in it is run.

    ORIGINAL_TYPES, harmless types that checkpoints of the original hold, are allowed as well.

    torch.save writes a zip archive. It is read only if no member is compressed, the members fit
    into the file's size, and every checksum is right; torch itself verifies none. The format of
    torch before 1.6 has no checksums.

    Raises InputError, without the file's name, if the file is missing, damaged, or holds anything
    else.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "no such file"
        raise InputError(f"{what}; give a file")
    try:
        is_archive = _check_archive(path)
        with torch.serialization.safe_globals(ORIGINAL_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        if not found and not is_archive:
            raise InputError(
                "unreadable or damaged: no file that torch.save wrote; write it again"
            ) from error
        holds = f"it holds {found[1]}, which" if found else "it holds something that"
        raise InputError(
            f"refused: {holds} is no tensor or plain value, and nothing else is "
            "read from a pickle; save it again as tensors, numbers, strings, lists and dicts"
        ) from error
    except PermissionError as error:
        raise InputError("no permission to read it") from error
    except Exception as error:  # torch raises many types for damaged files
        raise InputError(
            f"unreadable or damaged ({one_line(error)[:120]}); write it again"
        ) from error


def _check_archive(path: str) -> bool:
    """Tell whether the file is a zip archive; raise InputError if torch did not write it so."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # how torch tells an archive from its older format
            return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise InputError(
                    f"damaged: {member.filename} is compressed, and torch.save compresses "
                    "nothing; write it again"
                )
        if len(set(archive.namelist())) < len(members):
            raise InputError("damaged: it holds members of the same name; write it again")
        total, size = sum(member.file_size for member in members), os.path.getsize(path)
        if total > size:
            raise InputError(
                f"damaged: its members claim {total} bytes, the file has {size}; write it again"
            )
        broken = archive.testzip()
    if broken is not None:
        raise InputError(
            f"damaged: {broken} does not match its checksum; copy it again from where it was made"
        )
    return True
