"""Checkpoints: safe to load, whole or absent on disk, readable by number.

A checkpoint is a dict of plain types and tensors with the keys of the original project and a
`format` number; `make_checkpoint` says what each holds. Loading never runs code from the file.
"""

import argparse
import collections
import datetime
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from utils.cli import FaultError, InputError

#: Raised by one whenever a reader of the number before could misread the file.
FORMAT = 1
REQUIRED = (
    "batch_size",
    "dataset_setup",
    "arch",
    "model_eval",
    "state_dict",
    "target_gradient",
)
SETUP_KEYS = ("mean", "std", "size", "n_classes")
#: What checkpoints of the original hold besides tensors and plain types.
ORIGINAL_TYPES = [
    argparse.Namespace,
    collections.OrderedDict,
    datetime.datetime,
    datetime.timedelta,
]


def make_checkpoint(
    model: nn.Module,
    gradient: Sequence[Tensor] | Mapping[str, Tensor],
    *,
    arch: str,
    batch_size: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    train_mode: bool,
    bn_mean: Sequence[Tensor] | None = None,
    bn_var: Sequence[Tensor] | None = None,
    truth: tuple[Tensor, Tensor] | None = None,
    settings: Mapping | None = None,
    local_steps: int = 1,
) -> dict:
    """Make a checkpoint from a model and the gradient that a client sent for one batch.

    This is the way in for an auditor who has a gradient of their own.

    model: the network with the weights the client started from. gradient: ∂(mean
    cross-entropy)/∂θ, a tensor a trainable parameter in the model's order, or a mapping by
    parameter name. arch: a name that models/build.py knows when `run.py` is to read the file;
    any word when only the Python interface is used. image_shape: (C, H, W). mean, std: C
    numbers each, the normalisation the network was fed with. train_mode: whether BatchNorm
    used batch statistics. bn_mean, bn_var: mean and biased variance of the batch at the input
    of each BatchNorm layer, where the client sent them. truth: (x (B, C, H, W) normalised,
    y (B,)), for scoring. settings: plain values to record.

    Raises InputError when the gradient does not fit the model's trainable parameters, and for
    what is no gradient of one step: a weight difference after several local steps
    (`local_steps` > 1, or a mapping that holds buffers, as differences of state dicts do).
    """
    if local_steps != 1:
        raise InputError(
            f"local_steps {local_steps}: an update of several local steps is no gradient; "
            "only a single step can be inverted here: send the gradient of one batch"
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(gradient, Mapping):
        buffers = [name for name, _ in model.named_buffers() if name in gradient]
        if buffers:
            raise InputError(
                f"gradient: holds the buffer {buffers[0]}, so it is a difference of state dicts, "
                "an update of local steps; give the gradient of one batch"
            )
        odd = sorted(set(parameters).symmetric_difference(gradient))
        if odd:
            raise InputError(f"gradient: names and trainable parameters differ at {odd[0]}")
        gradient = [gradient[name] for name in parameters]
    gradient = list(gradient)
    if len(gradient) != len(parameters):
        raise InputError(
            f"gradient: {len(gradient)} tensors for {len(parameters)} trainable parameters"
        )
    for (name, parameter), g in zip(parameters.items(), gradient, strict=True):
        if g.shape != parameter.shape:
            raise InputError(
                f"gradient: {name} has shape {tuple(g.shape)} instead of {tuple(parameter.shape)}"
            )
    checkpoint = {
        "format": FORMAT,
        "clock": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "batch_size": int(batch_size),
        "dataset_setup": {
            "mean": [float(v) for v in mean],
            "std": [float(v) for v in std],
            "size": tuple(int(side) for side in image_shape),
            "n_classes": int(num_classes),
        },
        "arch": str(arch),
        "model_eval": not train_mode,
        "state_dict": {key: _stored(value) for key, value in model.state_dict().items()},
        "free_last_layers_list": ["all"],
        "trainable": list(parameters),
        "target_gradient": [_stored(g) for g in gradient],
        "bn_mean_list": None if bn_mean is None else [_stored(m) for m in bn_mean],
        "bn_var_list": None if bn_var is None else [_stored(v) for v in bn_var],
        "args": dict(settings or {}),
    }
    if truth is not None:
        checkpoint["x_true"], checkpoint["y_true"] = _stored(truth[0]), _stored(truth[1])
    return checkpoint


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def seal(checkpoint: dict) -> tuple[dict, dict]:
    """Split a checkpoint into what an attacker has and the truth: two dicts.

    The settings go with the truth: seed, data set and batch index would give the batch away.
    """
    private = ("x_true", "y_true", "args")
    sealed = {key: value for key, value in checkpoint.items() if key not in private}
    sealed["args"] = {}
    truth = {key: checkpoint[key] for key in private if key in checkpoint}
    return sealed, {"format": FORMAT, **truth}


def save(content: dict, path: str) -> None:
    """Write `content` to `path` under a temporary name, then rename: whole or not at all.

    Raises FaultError when it cannot be written; whatever stood at `path` is then untouched.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=folder)
    except OSError as error:
        raise FaultError(f"{path} could not be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes private files
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise FaultError(f"{path} could not be written: {_one_line(error)}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def load_plain(path: str, flag: str):
    """Load a file of tensors and plain types onto the CPU; nothing in it is run.

    Besides those, only the harmless types that checkpoints of the original hold are allowed.

    Raises InputError, naming `flag`, when the file is missing, damaged, or holds anything else.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "no such file"
        raise InputError(f"{flag} {path}: {what}; give a file")
    try:
        with torch.serialization.safe_globals(ORIGINAL_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        holds = f"it holds {found[1]}, which" if found else "it holds something that"
        raise InputError(
            f"{flag} {path}: refused: {holds} is no tensor or plain value, and nothing else is "
            "read from a pickle; save it again as tensors, numbers, strings, lists and dicts"
        ) from error
    except PermissionError as error:
        raise InputError(f"{flag} {path}: no permission to read it") from error
    except Exception as error:  # torch raises many types for damaged files
        raise InputError(
            f"{flag} {path}: unreadable or damaged ({_one_line(error)[:120]}); write it again"
        ) from error


def load(path: str, flag: str = "--checkpoint") -> dict:
    """Load and check a checkpoint, of this project or of the original.

    Raises InputError when it is missing, damaged, hostile, incomplete, of a newer format, or
    holds an update of several local steps.
    """
    checkpoint = load_plain(path, flag)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{flag} {path}: not a checkpoint of training.py")
    _check_format(checkpoint, path, flag)
    missing = [key for key in REQUIRED if key not in checkpoint]
    setup = checkpoint.get("dataset_setup")
    if isinstance(setup, dict):
        missing += [f"dataset_setup[{key}]" for key in SETUP_KEYS if key not in setup]
    if missing:
        raise InputError(
            f"{flag} {path}: not a checkpoint of training.py: missing {', '.join(missing)}"
        )
    layers = checkpoint.get("free_last_layers_list")
    if "trainable" not in checkpoint and layers not in (None, ["all"], "all"):
        raise InputError(
            f"{flag} {path}: free_last_layers_list {layers}: only gradients of all parameters "
            "(['all']) of the original can be read; capture it anew with training.py"
        )
    if int(checkpoint.get("local_steps", 1)) != 1:
        raise InputError(
            f"{flag} {path}: an update of {checkpoint['local_steps']} local steps is no gradient; "
            "capture the gradient of one batch"
        )
    return checkpoint


def load_truth(path: str, flag: str = "--truth") -> dict:
    """Load a truth file that `training.py --seal` wrote (or a checkpoint that holds its truth).

    Raises InputError when it is missing, damaged, of a newer format, or without a truth.
    """
    truth = load_plain(path, flag)
    if not isinstance(truth, dict) or not {"x_true", "y_true"} <= truth.keys():
        raise InputError(f"{flag} {path}: holds no x_true and y_true; give the sealed truth file")
    _check_format(truth, path, flag)
    return truth


def _check_format(content: dict, path: str, flag: str) -> None:
    number = content.get("format", 0)
    if not isinstance(number, int) or number > FORMAT:
        raise InputError(
            f"{flag} {path}: format {number}, written by a newer version; this one reads formats "
            f"up to {FORMAT}: update the project"
        )


def free_path(path: str) -> str:
    """`path` where nothing stands there yet, else the first of `path-2`, `path-3`, … that is free.

    The number goes before the ending `-checkpoint.pth.tar`, or behind a name without it.
    """
    ending = "-checkpoint.pth.tar"
    stem, end = (path[: -len(ending)], ending) if path.endswith(ending) else (path, "")
    candidate, number = path, 2
    while os.path.lexists(candidate):
        candidate, number = f"{stem}-{number}{end}", number + 1
    return candidate


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
