"""Binds a truth to its checkpoint, and what a file holds to what was written.

A checkpoint and its truth carry an id, and each a digest of the other. Both files carry a checksum
of every entry. All are SHA-256 of names, types, shapes, bytes of tensors, and plain values. They
show damage and mistakes; who alters a file on purpose can write its checksums anew.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.build import some
from utils.errors import InputError
from utils.tensor_files import flaw_of

#: Entries that the truth's `checkpoint_digest` covers.
PUBLIC_KEYS = (
    "batch_size", "dataset_setup", "arch", "model_eval", "state_dict", "trainable",
    "target_gradient", "bn_mean_list", "bn_var_list", "label_smoothing", "protection", "replace_bn",
)  # fmt: skip
#: Entries that are covered as well where they are there: files of before have none of them.
OPTIONAL_KEYS = (
    "loss", "model_sha256", "local_steps", "local_lr", "local_batch", "local_epochs", "resolution",
)  # fmt: skip
#: For entries that are mappings: which of their own entries the digests cover.
INNER_KEYS = {
    "dataset_setup": ("mean", "std", "size", "n_classes"),
    "control": ("target_gradient", "bn_mean_list", "bn_var_list"),
}
#: Entry of a file that maps the name of every other entry to its checksum.
CHECKSUMS = "checksums"
#: Entries that the checkpoint's `truth_digest` covers.
TRUTH_KEYS = ("x_true", "y_true", "control", "decoys")


def bind(checkpoint: dict) -> None:
    """Add an id to a checkpoint and, where it has a truth, to each part a digest of the other.

    The attacker sees the digest of the truth. It is salted with a number that stays with the
    truth: without it, nobody can check a guess of the images by it.
    """
    checkpoint["id"] = secrets.token_hex(16)
    if checkpoint.get("x_true") is None:
        return
    checkpoint["truth_salt"] = secrets.token_hex(16)
    checkpoint["truth_digest"] = _truth_digest(checkpoint)
    checkpoint["checkpoint_digest"] = _digest(_public_entries(checkpoint))


def check_bound(truth: Mapping, checkpoint: Mapping, truth_name: str, checkpoint_name: str) -> bool:
    """Tell whether ids and digests prove that `truth` belongs to `checkpoint`.

    truth_name, checkpoint_name: how messages name the two. Returns false where ids or digests are
    missing. Raises InputError where they prove that it does not belong.
    """
    parts = [truth.get("id"), checkpoint.get("id"), truth.get("truth_salt")]
    parts += [truth.get("checkpoint_digest"), checkpoint.get("truth_digest")]
    for part in parts:
        if not isinstance(part, str | None):
            raise InputError(
                f"{truth_name}: its id or digest, or that of {checkpoint_name}, is "
                f"{type(part).__name__}, not text; capture both anew"
            )
    if parts[0] is not None and parts[1] is not None and parts[0] != parts[1]:
        raise InputError(
            f"{truth_name}: is the truth of another checkpoint than {checkpoint_name}; give the "
            "truth that was written with it"
        )
    if not all(isinstance(part, str) for part in parts):
        return False
    if _truth_digest(truth) != checkpoint["truth_digest"]:
        raise InputError(
            f"{truth_name}: has been changed since it was written with {checkpoint_name}; capture "
            "both anew"
        )
    if _digest(_public_entries(checkpoint)) != truth["checkpoint_digest"]:
        raise InputError(
            f"{checkpoint_name}: has been changed since it was written with its truth, "
            f"{truth_name}; capture both anew"
        )
    return True


def with_checksums(content: Mapping) -> dict:
    """Return the content of a file with a checksum of every entry, as it is to be written."""
    plain = {key: value for key, value in content.items() if key != CHECKSUMS}
    return {**plain, CHECKSUMS: {key: _digest(value) for key, value in plain.items()}}


def without_checksums(content: dict) -> dict:
    """Return the content of a file without its checksums, after checking every entry by them.

    Files of other writers, and of before there were checksums, have none and are not checked.
    Raises InputError, naming entries, where one is not what was written.
    """
    if CHECKSUMS not in content:
        return content
    sums = content[CHECKSUMS]
    plain = {key: value for key, value in content.items() if key != CHECKSUMS}
    if not isinstance(sums, dict):
        raise InputError(f"its {CHECKSUMS} are no mapping; copy it again from where it was made")
    for names, what in (
        ([name for name in sums if name not in plain], "lacks"),
        ([name for name in plain if name not in sums], "was not written with"),
        ([n for n in plain if n in sums and not _is_digest_of(sums[n], plain[n])], "has another"),
    ):
        if names:
            raise InputError(
                f"has been altered or damaged since it was written: it {what} {some(names)} (by "
                "its checksums); copy it again from where it was made"
            )
    return plain


def _is_digest_of(digest: Any, value: Any) -> bool:
    try:
        return digest == _digest(value)
    except (TypeError, ValueError, RuntimeError):  # of no value that is ever written
        return False


def _truth_digest(truth: Mapping) -> str:
    return _digest([truth["truth_salt"], *_entries(truth, TRUTH_KEYS)])


def _public_entries(checkpoint: Mapping) -> list:
    """List what the digest of a checkpoint covers."""
    optional = [[key, checkpoint[key]] for key in OPTIONAL_KEYS if checkpoint.get(key) is not None]
    return _entries(checkpoint, PUBLIC_KEYS) + optional


def _entries(content: Mapping, keys: Sequence[str]) -> list:
    """List the entries of those names, of mappings only the entries in INNER_KEYS."""
    found = []
    for key in keys:
        value = content.get(key)
        if value is not None and key in INNER_KEYS:
            value = {inner: value.get(inner) for inner in INNER_KEYS[key]}
        found.append(value)
    return found


def _digest(content) -> str:
    """Return SHA-256 of tensors and plain values, in hexadecimal; lists and tuples count as same.

    Raises TypeError for a tensor with a flaw (`flaw_of`), which could cost any memory.
    """
    state = hashlib.sha256()
    _feed(state, content)
    return state.hexdigest()


def _feed(state, content) -> None:
    if isinstance(content, Tensor):
        if (flaw := flaw_of(content)) is not None:
            raise TypeError(f"a tensor that {flaw}")
        state.update(f"tensor {content.dtype} {tuple(content.shape)}".encode())
        state.update(content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(content, bytes):
        state.update(f"bytes {len(content)}".encode())
        state.update(content)
    elif isinstance(content, Mapping):
        state.update(f"mapping {len(content)}".encode())
        for key in sorted(content):
            _feed(state, key)
            _feed(state, content[key])
    elif isinstance(content, Sequence) and not isinstance(content, str):
        state.update(f"sequence {len(content)}".encode())
        for value in content:
            _feed(state, value)
    else:
        state.update(repr(content).encode() + b"\0")
