"""Checkpoints: safe to load, whole or absent on disk, readable by number.

A checkpoint is a dict of plain types and tensors with the keys of the original project and a
`format` number; `make_checkpoint` says what each holds. Loading never runs code from the file.
"""

import argparse
import collections
import datetime
import math
import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from utils.cli import InputError
from utils.files import unwritten, whole_file

#: Raised by one whenever a reader of the number before could misread the file.
FORMAT = 3
REQUIRED = (
    "batch_size",
    "dataset_setup",
    "arch",
    "model_eval",
    "state_dict",
    "target_gradient",
)
PROTECTION_MODES = ("batch", "per-sample")
#: What a record of protection must hold, and what else it may.
PROTECTION_KEYS = {"mode", "sigma", "clip"}
PRIVACY_KEYS = {"noise_multiplier", "epsilon", "delta", "steps", "sample_rate"}
#: What only scoring may see; `seal` takes it out.
PRIVATE_KEYS = ("x_true", "y_true", "protection_norms", "control", "args")
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
    label_smoothing: float = 0.0,
    protection: Mapping | None = None,
    protection_norms: Mapping | None = None,
    replace_bn: str | None = None,
    control: Mapping | None = None,
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
    of each BatchNorm layer, where the client sent them. label_smoothing: of the cross-entropy, in
    [0, 1). protection: what was done to the gradient, a mapping with `mode` ("batch" or
    "per-sample"), `sigma` (standard deviation of the added noise), `clip` (largest norm, or
    None), and maybe the other fields of `models.target.Protection`. protection_norms: private
    norms before and after it, to record. replace_bn: what stands in the place of the
    architecture's BatchNorm layers (models/batchnorm.py), None where they are there. control: for
    scoring, what would be sent for other images with the same labels, a mapping with `gradient`,
    `bn_mean`, `bn_var`, each as above. truth: (x (B, C, H, W) normalised, y (B,)), for scoring.
    settings: plain values to record.

    Raises InputError when the gradient does not fit the model's trainable parameters or another
    value is not what is said here, and for what is no gradient of one step: a weight difference
    after several local steps (`local_steps` > 1, or a mapping that holds buffers, as differences
    of state dicts do).
    """
    if local_steps != 1:
        raise InputError(
            f"local_steps {local_steps}: an update of several local steps is no gradient; "
            "only a single step can be inverted here: send the gradient of one batch"
        )
    parameters = {
        name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad
    }
    if isinstance(gradient, Mapping):
        gradient = {name.removeprefix("module."): g for name, g in gradient.items()}
        names = [name.removeprefix("module.") for name, _ in model.named_buffers()]
        buffers = [name for name in names if name in gradient]
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
    if control is not None and not shapes(control["gradient"]) == shapes(gradient):
        raise InputError("control: its gradient has other shapes than the gradient")
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
        "state_dict": {
            key.removeprefix("module."): _stored(value) for key, value in model.state_dict().items()
        },
        "free_last_layers_list": ["all"],
        "trainable": list(parameters),
        "target_gradient": _stored_list(gradient),
        "bn_mean_list": _stored_list(bn_mean),
        "bn_var_list": _stored_list(bn_var),
        "label_smoothing": float(label_smoothing),
        "protection": None if protection is None else dict(protection),
        "replace_bn": replace_bn,
        "args": dict(settings or {}),
    }
    if protection_norms is not None:
        checkpoint["protection_norms"] = dict(protection_norms)
    if control is not None:
        checkpoint["control"] = {
            "target_gradient": _stored_list(control["gradient"]),
            "bn_mean_list": _stored_list(control.get("bn_mean")),
            "bn_var_list": _stored_list(control.get("bn_var")),
        }
    if truth is not None:
        checkpoint["x_true"], checkpoint["y_true"] = _stored(truth[0]), _stored(truth[1])
        check_truth(checkpoint, checkpoint, "truth")
    check_contents(checkpoint, "checkpoint")
    return checkpoint


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _stored_list(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    return None if tensors is None else [_stored(tensor) for tensor in tensors]


def shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """The shape of every tensor."""
    return [tuple(tensor.shape) for tensor in tensors]


def seal(checkpoint: dict) -> tuple[dict, dict]:
    """Split a checkpoint into what an attacker has and the truth: two dicts.

    The settings go with the truth: seed, data set and batch index would give the batch away. So
    do a control and the norms from before protection, which no client sends.
    """
    sealed = {key: value for key, value in checkpoint.items() if key not in PRIVATE_KEYS}
    sealed["args"] = {}
    truth = {key: checkpoint[key] for key in PRIVATE_KEYS if key in checkpoint}
    return sealed, {"format": FORMAT, **truth}


def save(content, path: str) -> None:
    """Write tensors and plain values to `path`: the whole file, or nothing (`whole_file`).

    Raises FaultError when it cannot be written; whatever stood at `path` is then untouched.
    """
    with whole_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch reports a full disk as one
            raise unwritten(path, error) from error


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
    if "format" not in checkpoint:
        checkpoint = {**checkpoint, "protection": _original_protection(checkpoint.get("args"))}
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
    if checkpoint.get("local_steps", 1) != 1:
        raise InputError(
            f"{flag} {path}: an update of {checkpoint['local_steps']} local steps is no gradient; "
            "capture the gradient of one batch"
        )
    check_contents(checkpoint, f"{flag} {path}")
    channels = checkpoint["dataset_setup"]["size"][0]
    if channels not in (1, 3):
        raise InputError(
            f"{flag} {path}: images of {channels} channels cannot be shown; attack them from Python"
        )
    return checkpoint


def _original_protection(settings) -> dict | None:
    """What the settings in a checkpoint of the original say about noise and clipping."""
    settings = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    if not settings.get("enable_dp"):
        return None
    sigma = settings.get("sigma")
    return {
        "mode": "batch",
        "sigma": 0.0 if sigma is None else sigma,
        "clip": settings.get("max_per_sample_grad_norm"),
    }


def check_contents(checkpoint: dict, source: str) -> None:
    """Raise InputError, naming `source`, unless a checkpoint's values are what they should be."""

    def refuse(what: str):
        raise InputError(f"{source}: {what}; write it again with training.py or make_checkpoint")

    def numbers(values):
        return isinstance(values, list | tuple | Tensor) and all(
            isinstance(v, int | float | Tensor) and math.isfinite(v) for v in values
        )

    def tensors(values):
        return isinstance(values, list | tuple) and all(isinstance(v, Tensor) for v in values)

    setup = checkpoint["dataset_setup"]
    size = setup["size"] if isinstance(setup, dict) else ()
    if not (isinstance(size, list | tuple) and len(size) == 3 and _positive(*size)):
        refuse(f"dataset_setup['size'] is {size}, not (C, H, W)")
    for key in ("mean", "std"):
        if not (numbers(setup[key]) and len(setup[key]) == size[0]):
            refuse(f"dataset_setup['{key}'] is not {size[0]} numbers")
    if not min(float(v) for v in setup["std"]) > 0:
        refuse("dataset_setup['std'] is not above 0")
    if not _positive(checkpoint["batch_size"], setup["n_classes"]):
        refuse("batch_size and dataset_setup['n_classes'] are not positive integers")
    if not isinstance(checkpoint["arch"], str) or not isinstance(checkpoint["model_eval"], bool):
        refuse("arch is not a name or model_eval not true or false")
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        refuse("state_dict is not a mapping of names to tensors")
    broken = [k for k, v in state.items() if not v.isfinite().all()]
    if broken:
        refuse(f"the weights {broken[0]} are not finite")
    gradient = checkpoint["target_gradient"]
    if not (tensors(gradient) and len(gradient)):
        refuse("target_gradient is not a list of tensors")
    names = checkpoint.get("trainable") or [f"tensor {i}" for i in range(len(gradient))]
    if not isinstance(names, list | tuple) or len(names) != len(gradient):
        refuse("trainable is not one name a gradient tensor")
    for name, g in zip(names, gradient, strict=True):
        if not g.is_floating_point() or not g.isfinite().all():
            refuse(f"the gradient of {name} is not finite floating-point numbers")
    means, variances = checkpoint.get("bn_mean_list"), checkpoint.get("bn_var_list")
    for pair in ((means, variances), (variances, means)):
        if pair[0] and not (tensors(pair[0]) and tensors(pair[1]) and len(pair[0]) == len(pair[1])):
            refuse("bn_mean_list and bn_var_list are not lists of as many tensors")
    if not all(v.isfinite().all() for v in [*(means or ()), *(variances or ())]):
        refuse("the BN statistics are not finite")
    smoothing = checkpoint.get("label_smoothing", 0.0)
    if not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
        refuse(f"label_smoothing is {smoothing}, not from 0 to below 1")
    record = checkpoint.get("protection")
    if record is not None and not (
        isinstance(record, dict)
        and record.keys() >= PROTECTION_KEYS
        and record.keys() <= PROTECTION_KEYS | PRIVACY_KEYS
        and record["mode"] in PROTECTION_MODES
        and _at_least_zero(record["sigma"])
        and (record["clip"] is None or _at_least_zero(record["clip"]))
        and all(record.get(key) is None or _at_least_zero(record[key]) for key in PRIVACY_KEYS)
        and (
            record.get("epsilon") is None
            or all(record.get(key) is not None for key in PRIVACY_KEYS)
        )
    ):
        refuse("protection is no record with mode, sigma and clip")
    if not isinstance(checkpoint.get("replace_bn"), str | None):
        refuse("replace_bn is no name")


def check_control(control, checkpoint: dict, source: str) -> None:
    """Raise InputError unless `control` is another gradient for the checkpoint's network."""

    def fits(key):
        ours, theirs = control.get(key), checkpoint.get(key)
        if not theirs:
            return ours is None or (isinstance(ours, list | tuple) and not ours)
        return (
            isinstance(ours, list | tuple)
            and all(isinstance(v, Tensor) and bool(v.isfinite().all()) for v in ours)
            and shapes(ours) == shapes(theirs)
        )

    keys = ("target_gradient", "bn_mean_list", "bn_var_list")
    if not (isinstance(control, dict) and all(fits(key) for key in keys)):
        raise InputError(
            f"{source}: its control is no gradient of this network with as many BN statistics; "
            "capture it anew with training.py --with-control"
        )


def _at_least_zero(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _positive(*values) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)


def check_truth(truth: dict, checkpoint: dict, source: str) -> None:
    """Raise InputError unless `truth` holds the batch that belongs to the checkpoint."""
    x, y = truth["x_true"], truth["y_true"]
    batch_size, setup = checkpoint["batch_size"], checkpoint["dataset_setup"]
    shape, num_classes = (batch_size, *setup["size"]), setup["n_classes"]
    if not (isinstance(x, Tensor) and tuple(x.shape) == tuple(shape)):
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
        raise InputError(
            f"{source}: truth of {found} for a batch of {tuple(shape)}; give the truth of this "
            "checkpoint"
        )
    if not (x.is_floating_point() and x.isfinite().all()):
        raise InputError(f"{source}: x_true is not finite floating-point numbers")
    check_labels(y, batch_size, num_classes, source)
    if truth.get("control") is not None:
        check_control(truth["control"], checkpoint, source)


def check_labels(y, batch_size: int, num_classes: int, source: str) -> None:
    """Raise InputError, naming `source`, unless `y` is B class indices."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != (batch_size,):
        count = y.numel() if isinstance(y, Tensor) else 0
        raise InputError(f"{source}: {count} labels for a batch of {batch_size}")
    if int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise InputError(
            f"{source}: labels {int(y.min())} to {int(y.max())}, but the classes are 0 to "
            f"{num_classes - 1}"
        )


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
