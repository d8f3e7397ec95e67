"""Checks that the entries of a file are what they should be, without trusting any of them.

Every function here raises UnfitError with the fact alone; the caller adds the file and the remedy.
Types, dtypes, layouts and sizes are checked first; numbers are read only where a tensor holds as
many as it claims, so that no small file costs much memory.
"""

import argparse
import datetime
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import MISSING, fields

import torch
from torch import Tensor

from models.choices import LOSS_KINDS, PROTECTION_MODES
from models.target import Protection
from utils.tensor_files import flaw_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
#: What a state dict may hold.
ANY = (*FLOATS, *INTEGERS, torch.bool)
#: Largest count that a file may hold, as of the flags.
LARGEST = 2**31 - 1
#: Most local steps of an update: scoring takes them again, and a file must not ask for days.
MOST_LOCAL_STEPS = 100_000
#: What a record of protection must hold, and what else it may.
PROTECTION_KEYS = tuple(field.name for field in fields(Protection) if field.default is MISSING)
OTHER_KEYS = tuple(field.name for field in fields(Protection) if field.default is not MISSING)
#: What a record with epsilon must hold as well.
PRIVACY_KEYS = ("noise_multiplier", "epsilon", "delta", "steps", "sample_rate")
SETUP_KEYS = ("mean", "std", "size", "n_classes")
#: What a checkpoint says of local steps, in the order of the fields of `LocalSteps`.
LOCAL_KEYS = ("local_steps", "local_lr", "local_batch", "local_epochs")
#: Last parts of the names of weights that are never integers, in no layer of torch.
REAL_WEIGHTS = ("weight", "bias", "running_mean", "running_var")


class UnfitError(ValueError):
    """An entry of a file is not what it should be. Its text says which, and what it is."""


class _Brief(reprlib.Repr):
    """Writes a value cut short, without the numbers of tensors and of long integers."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 2, 4, 4, 2, 2
        self.maxstring = self.maxother = 60

    def repr_Tensor(self, value, level):  # noqa: N802, D102 (reprlib looks it up by the type)
        return "a tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"

    repr_Parameter = repr_Tensor  # noqa: N815

    def repr_int(self, value, level):  # noqa: D102
        bits = value.bit_length()
        return repr(value) if bits <= 64 else f"an integer of {bits} bits"


def shown(value) -> str:
    """Write `value` for a message: short, on one line, and never the numbers of a tensor."""
    return " ".join(_Brief().repr(value).split())


def is_number(value) -> bool:
    """Tell whether `value` is a finite int or float that a float can hold, and no True or False."""
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def is_count(value) -> bool:
    """Tell whether `value` is a positive int that a flag could give as well."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def is_list(value) -> bool:
    """Tell whether `value` is a list or tuple."""
    return isinstance(value, list | tuple)


def check_tensor(
    value, what: str, dtypes: Iterable[torch.dtype] = FLOATS, *, attached: bool = False
) -> None:
    """Raise UnfitError unless `value` is a dense tensor in memory that holds all its numbers.

    what: its name in a message. dtypes: those allowed. attached: it may require a gradient.
    Reads no numbers. Refused are all tensors that have a flaw (`flaw_of`).
    """
    if not isinstance(value, Tensor):
        raise UnfitError(f"{what} is {shown(value)}, not a tensor")
    flaw = flaw_of(value)
    if flaw is not None:
        raise UnfitError(f"{what} {flaw}")
    if value.dtype not in dtypes:
        kind = "floating-point numbers" if FLOATS[-1] in dtypes else "integers"
        raise UnfitError(f"{what} is not {kind}: its dtype is {value.dtype}")
    if value.requires_grad and not attached:
        raise UnfitError(f"{what} requires a gradient: it was saved without detach()")


def check_finite(value: Tensor, what: str) -> None:
    """Raise UnfitError unless all numbers of a tensor that `check_tensor` passed are finite."""
    if not bool(value.isfinite().all()):
        raise UnfitError(f"{what} is not finite floating-point numbers")


def check_at_least_zero(value: Tensor, what: str) -> None:
    """Raise UnfitError where a variance is below 0."""
    if value.numel() and float(value.min()) < 0:
        raise UnfitError(f"{what} is below 0 in places, and a variance never is")


def check_setup(setup) -> None:
    """Check dataset_setup: a mapping with size (C, H, W), n_classes, mean and std of C numbers."""
    if not isinstance(setup, dict):
        raise UnfitError(
            f"dataset_setup is {shown(setup)}, not a mapping with {', '.join(SETUP_KEYS)}"
        )
    size = setup["size"]
    if not (is_list(size) and len(size) == 3 and all(map(is_count, size))):
        raise UnfitError(f"dataset_setup['size'] is {shown(size)}, not (C, H, W)")
    for key in ("mean", "std"):
        if not _are_numbers(setup[key], size[0]):
            raise UnfitError(
                f"dataset_setup['{key}'] is not {size[0]} numbers but {shown(setup[key])}"
            )
    if not min(float(v) for v in setup["std"]) > 0:
        raise UnfitError("dataset_setup['std'] is not above 0")
    if not is_count(setup["n_classes"]):
        raise UnfitError(
            f"dataset_setup['n_classes'] is {shown(setup['n_classes'])}, not a positive integer"
        )


def _are_numbers(values, count: int) -> bool:
    """Tell whether `values` is `count` finite numbers: a list, also of tensors, or a tensor."""
    if isinstance(values, Tensor):
        check_tensor(values, "a tensor in dataset_setup")
        return values.dim() > 0 and len(values) == values.numel() == count and _is_finite(values)
    if not (is_list(values) and len(values) == count):
        return False
    for value in values:
        if isinstance(value, Tensor):
            check_tensor(value, "a tensor in dataset_setup")
            if value.numel() != 1 or not _is_finite(value):
                return False
        elif not is_number(value):
            return False
    return True


def _is_finite(value: Tensor) -> bool:
    return value.numel() > 0 and bool(value.isfinite().all())


def check_weights(state) -> None:
    """Check state_dict: names → tensors; weights are finite real numbers, variances at least 0.

    Other buffers may be integers, as num_batches_tracked is; `misfits` (models/build.py) compares
    them with the network's.
    """
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) for k in state):
        raise UnfitError("state_dict is not a mapping of names to tensors")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UnfitError(f"state_dict is not a mapping of names to tensors: see {shown(name)}")
        real = name.rpartition(".")[2] in REAL_WEIGHTS
        check_tensor(value, f"the tensor {_in_line(name)} of weights", FLOATS if real else ANY)
    check_weight_values(state)


def check_weight_values(state: dict[str, Tensor]) -> None:
    """Raise UnfitError where weights are not finite, or a running variance is below 0."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UnfitError(f"the weights {_in_line(name)} are not finite")
        if name.endswith("running_var"):
            check_at_least_zero(value, f"the tensor {_in_line(name)} of weights")


def check_class_count(count: int, state: dict[str, Tensor]) -> None:
    """Check n_classes against the weights that `check_weights` passed: some make every logit."""
    weights = sum(value.numel() for value in state.values())
    if count > weights:
        raise UnfitError(
            f"dataset_setup['n_classes'] is {count:,}, more than the {weights:,} weights"
        )


def check_names(names, count: int) -> None:
    """Check trainable: one name per gradient tensor, all different."""
    if not (is_list(names) and len(names) == count and all(isinstance(n, str) for n in names)):
        raise UnfitError(f"trainable is not one name per gradient tensor but {shown(names)}")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UnfitError(f"trainable holds the name {shown(name)} {times} times")


def check_gradient(gradient, names, most: int) -> None:
    """Check target_gradient: finite floating-point tensors, one per trainable parameter.

    names: those of `trainable`, None where the file has none. most: tensors of the network.
    """
    if not (_are_tensors(gradient) and len(gradient)):
        raise UnfitError("target_gradient is not a list of tensors")
    if names is not None:
        check_names(names, len(gradient))
    if len(gradient) > most:
        raise UnfitError(f"target_gradient has {len(gradient)} tensors, the whole network {most}")
    names = names or [f"tensor {i}" for i in range(len(gradient))]
    _check_finite_tensors(gradient, [f"the gradient of {_in_line(name)}" for name in names])


def check_statistics(means, variances, most: int) -> None:
    """Check bn_mean_list and bn_var_list: as many finite vectors, variances at least 0; or None.

    most: tensors of the network.
    """
    if _are_none(means) and _are_none(variances):
        return
    if not (_are_tensors(means) and _are_tensors(variances) and len(means) == len(variances)):
        raise UnfitError("bn_mean_list and bn_var_list are not lists of as many tensors")
    if len(means) > most:
        raise UnfitError(f"bn_mean_list has {len(means)} tensors, the whole network {most}")
    for word, values in (("mean", means), ("variance", variances)):
        _check_finite_tensors(
            values, [f"the BN statistics' {word} of layer {i}" for i in range(len(values))]
        )
    for i, (mean, variance) in enumerate(zip(means, variances, strict=True)):
        if mean.dim() != 1 or mean.shape != variance.shape:
            raise UnfitError(
                f"the BN statistics of layer {i} have shapes {tuple(mean.shape)} and "
                f"{tuple(variance.shape)}, not one number per channel"
            )
        check_at_least_zero(variance, f"the BN statistics' variance of layer {i}")


def _are_none(values) -> bool:
    """Tell whether there are no statistics: None, or an empty list as the original writes."""
    return values is None or (is_list(values) and not values)


def _are_tensors(values) -> bool:
    return is_list(values) and all(isinstance(v, Tensor) for v in values)


def _check_finite_tensors(tensors, names) -> None:
    for tensor, what in zip(tensors, names, strict=True):
        check_tensor(tensor, what)
    for tensor, what in zip(tensors, names, strict=True):
        check_finite(tensor, what)


def _in_line(name: str) -> str:
    return " ".join(name[:100].split())


def check_smoothing(smoothing) -> None:
    """Check label_smoothing: a number in [0, 1)."""
    if not (is_number(smoothing) and 0 <= smoothing < 1):
        raise UnfitError(f"label_smoothing is {shown(smoothing)}, not from 0 to below 1")


def check_loss(kind, smoothing: float) -> None:
    """Check loss: a name in LOSS_KINDS; labels are smoothed under cross-entropy alone."""
    if not (isinstance(kind, str) and kind in LOSS_KINDS):
        raise UnfitError(f"loss is {shown(kind)}, not one of {', '.join(LOSS_KINDS)}")
    if kind != "cross-entropy" and smoothing:
        raise UnfitError(f"label_smoothing is {smoothing:g} with the loss {kind}, which has none")


def _protection_rules():
    """Map every entry of a record of protection to what it must be, and to the test of that."""
    at_least_zero = ("a number from 0", lambda v: is_number(v) and v >= 0)
    return {
        "mode": (
            f"one of {', '.join(PROTECTION_MODES)}",
            lambda v: isinstance(v, str) and v in PROTECTION_MODES,
        ),
        "sigma": at_least_zero,
        "clip": ("a number above 0 or None", lambda v: v is None or (is_number(v) and v > 0)),
        "noise_multiplier": at_least_zero,
        "epsilon": at_least_zero,
        "delta": ("between 0 and 1", lambda v: is_number(v) and 0 < v < 1),
        "steps": ("a positive integer", is_count),
        "sample_rate": ("above 0 and up to 1", lambda v: is_number(v) and 0 < v <= 1),
        "mu": at_least_zero,
        "amount": at_least_zero,
        "largest": ("a number above 0", lambda v: is_number(v) and v > 0),
    }


def check_protection(record) -> None:
    """Check protection: None, or a record with mode, sigma, clip, and with epsilon all others."""
    if record is None:
        return
    start = "protection is no record with mode, sigma and clip"
    if not isinstance(record, dict):
        raise UnfitError(f"{start} but {shown(record)}")
    for key in PROTECTION_KEYS:
        if key not in record:
            raise UnfitError(f"{start}: no {key}")
    for key in record:
        if key not in PROTECTION_KEYS + OTHER_KEYS:
            raise UnfitError(f"{start}: what is {shown(key)}?")
    for key, (what, holds) in _protection_rules().items():
        value = record.get(key)
        if not (holds(value) or (value is None and key in OTHER_KEYS)):
            raise UnfitError(f"{start}: its {key} is {shown(value)}, not {what}")
    if record.get("epsilon") is not None:
        for key in PRIVACY_KEYS:
            if record.get(key) is None:
                raise UnfitError(f"{start}: epsilon without {key}")


def check_origin(checkpoint: dict) -> None:
    """Check what decides how a file is read: settings and layers of other writers."""
    settings = checkpoint.get("args")
    if not (settings is None or isinstance(settings, dict | argparse.Namespace)):
        raise UnfitError(f"args is {shown(settings)}, not a mapping of settings")
    if "format" not in checkpoint and settings is not None:
        enabled = (settings if isinstance(settings, dict) else vars(settings)).get("enable_dp")
        if not (enabled is None or isinstance(enabled, bool)):
            raise UnfitError(f"its setting enable_dp is {shown(enabled)}, not true or false")
    layers = checkpoint.get("free_last_layers_list")
    if not (
        layers is None
        or isinstance(layers, str)
        or (is_list(layers) and all(isinstance(layer, str | int) for layer in layers))
    ):
        raise UnfitError(f"free_last_layers_list is {shown(layers)}, not names of layers")


def check_local_steps(checkpoint: dict) -> None:
    """Check the entries of an update of several local steps, and the resolution."""
    steps, lr, batch, epochs = (checkpoint.get(key) for key in LOCAL_KEYS)
    if not (steps is None or is_count(steps)):
        raise UnfitError(f"local_steps is {shown(steps)}, not a number of local steps")
    if steps not in (None, 1) and (lr is None or not is_number(lr) or lr <= 0):
        raise UnfitError(
            f"local_lr is {shown(lr)} for {steps} local steps, not the step size above 0"
        )
    if steps is not None and steps > MOST_LOCAL_STEPS:
        raise UnfitError(
            f"local_steps is {steps}, more than the {MOST_LOCAL_STEPS} that scoring takes again"
        )
    for key, value in (("local_batch", batch), ("local_epochs", epochs)):
        if not (value is None or is_count(value)):
            raise UnfitError(f"{key} is {shown(value)}, not a positive integer")
    resolution = checkpoint.get("resolution")
    if not (resolution is None or (is_number(resolution) and 0 < resolution <= 1)):
        raise UnfitError(f"resolution is {shown(resolution)}, not above 0 and up to 1")


def check_plain_entries(checkpoint: dict) -> None:
    """Check the entries that are one plain value each."""
    plain = {
        "batch_size": ("a positive integer", is_count),
        "arch": ("a printable name", lambda v: isinstance(v, str) and v.isprintable()),
        "model_eval": ("true or false", lambda v: isinstance(v, bool)),
        "replace_bn": ("a name", lambda v: v is None or isinstance(v, str)),
        "model_sha256": ("a digest", lambda v: v is None or isinstance(v, str)),
        "clock": (
            "a time",
            lambda v: (
                v is None
                or isinstance(v, str | datetime.datetime | datetime.timedelta)
                or is_number(v)
            ),
        ),
        "protection_norms": ("a mapping", lambda v: v is None or isinstance(v, dict)),
    }
    for key, (what, holds) in plain.items():
        if not holds(checkpoint.get(key)):
            raise UnfitError(f"{key} is {shown(checkpoint.get(key))}, not {what}")


def check_images(x, shape: tuple[int, ...]) -> None:
    """Check x_true: finite images of that shape (B, C, H, W)."""
    if not isinstance(x, Tensor) or x.is_nested or tuple(x.shape) != shape:
        found = f"type {type(x).__name__}"
        if isinstance(x, Tensor):
            found = "nested tensors" if x.is_nested else f"shape {tuple(x.shape)}"
        raise UnfitError(f"truth of {found} for a batch of {shape}")
    check_tensor(x, "x_true")
    check_finite(x, "x_true")


def check_decoys(decoys, shape: tuple[int, ...]) -> None:
    """Check decoys: N 8-bit images per image of a batch of that shape (B, C, H, W)."""
    what = f"its decoys are {shown(decoys)}, not 8-bit images like the {shape[0]} true ones"
    if not isinstance(decoys, Tensor) or decoys.is_nested or decoys.dim() != 5:
        raise UnfitError(what)
    if (len(decoys), *decoys.shape[2:]) != shape or not decoys.shape[1]:
        raise UnfitError(what)
    check_tensor(decoys, "the tensor of decoys", (torch.uint8,))


def check_labels(y, batch_size: int, num_classes: int) -> None:
    """Check y_true: batch_size class indices from 0 to num_classes − 1."""
    if not isinstance(y, Tensor) or y.is_nested:
        raise UnfitError(f"labels for a batch of {batch_size} are {shown(y)}, not integers (B,)")
    if y.is_floating_point():
        raise UnfitError(f"its labels are floating-point numbers ({y.dtype}), not integers")
    if y.shape != (batch_size,):
        count = f"{y.numel()} labels" if y.dim() == 1 else f"labels of shape {tuple(y.shape)}"
        raise UnfitError(f"{count} for a batch of {batch_size}")
    check_tensor(y, "the tensor of labels", INTEGERS)
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise UnfitError(f"labels {low} to {high}, but the classes are 0 to {num_classes - 1}")


def check_label_vectors(y, batch_size: int, num_classes: int) -> None:
    """Check y_true of a binary cross-entropy: (batch_size, num_classes) numbers in [0, 1]."""
    what = f"labels for a batch of {batch_size} under binary cross-entropy"
    if not isinstance(y, Tensor) or y.is_nested:
        raise UnfitError(f"{what} are {shown(y)}, not numbers {(batch_size, num_classes)}")
    if not y.is_floating_point() or y.shape != (batch_size, num_classes):
        raise UnfitError(
            f"{what} are {y.dtype} of shape {tuple(y.shape)}, not floating-point numbers "
            f"{(batch_size, num_classes)}"
        )
    check_tensor(y, "the tensor of labels")
    check_finite(y, "the tensor of labels")
    if float(y.min()) < 0 or float(y.max()) > 1:
        raise UnfitError(f"labels {float(y.min()):g} to {float(y.max()):g}, not from 0 to 1")


def check_like(tensors, model, what: str) -> None:
    """Check a list of finite tensors of the shapes of `model`, which is empty or None for none."""
    if not model:
        if not _are_none(tensors):
            raise UnfitError(f"{what}s where the checkpoint has none")
        return
    if not _are_tensors(tensors) or any(t.is_nested for t in tensors):
        raise UnfitError(f"{what}s are {shown(tensors)}, not a list of tensors")
    if len(tensors) != len(model):
        raise UnfitError(f"{len(tensors)} {what}s, the checkpoint has {len(model)}")
    for i, (ours, theirs) in enumerate(zip(tensors, model, strict=True)):
        if ours.shape != theirs.shape:
            raise UnfitError(
                f"{what} {i} has shape {tuple(ours.shape)}, the checkpoint's {tuple(theirs.shape)}"
            )
    _check_finite_tensors(tensors, [f"{what} {i}" for i in range(len(tensors))])
