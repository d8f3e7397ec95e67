"""Checkpoints, the exchange format of both sides: made, sealed, loaded and checked here.

A checkpoint is a dict of plain types and tensors with the keys of the original project and a
`format` number. `Task`, `Update`, `Protection` and `GroundTruth` say what it holds. Loading never
runs code from the file. models/reading.py takes the attacker's view of it.
"""

import contextlib
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import checking
from models.binding import bind, with_checksums, without_checksums
from models.build import without_wrapper
from models.gradient import ClientLoss, Update
from models.local import LocalSteps
from models.target import GroundTruth, Protection
from utils import tensor_files
from utils.errors import InputError, naming, one_line
from utils.memory import require_memory
from utils.tensor_files import load_plain

#: Raised by one whenever a reader of the number before could misread the file.
FORMAT = 5
#: Entries without which no file is a checkpoint.
REQUIRED = (
    "batch_size",
    "dataset_setup",
    "arch",
    "model_eval",
    "state_dict",
    "target_gradient",
)
#: What every attack keeps of the size of the batch: images, gradient, and an optimiser's two means.
KEPT_IMAGES = 4
#: What only scoring may see; `seal` takes it out.
PRIVATE_KEYS = (
    "x_true", "y_true", "protection_norms", "control", "decoys", "args", "truth_salt",
    "checkpoint_digest",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Says what the client trained on and how, which an attacker knows beside the update."""

    #: A name that models/build.py knows, or FILE.py:function of a user's network; else any word.
    arch: str
    #: Images in the batch, B.
    batch_size: int
    #: (C, H, W).
    image_shape: tuple[int, int, int]
    #: Classes of the network.
    num_classes: int
    #: Mean of the normalisation that the network was fed with, C numbers in [0, 1] colours.
    mean: Sequence[float]
    #: Standard deviation of that normalisation, C numbers above 0.
    std: Sequence[float]
    #: How the client took its loss.
    loss: ClientLoss
    #: What replaces the architecture's BatchNorm layers, a name in BATCHNORM_REPLACEMENTS, or None.
    replace_bn: str | None = None
    #: SHA-256 of the file that built the network, in hexadecimal; None where none did.
    model_sha256: str | None = None


def make_checkpoint(
    model: nn.Module,
    update: Update | Sequence[Tensor] | Mapping[str, Tensor],
    task: Task,
    *,
    protection: Protection | None = None,
    protection_norms: Mapping | None = None,
    truth: GroundTruth | None = None,
    settings: Mapping | None = None,
    local: LocalSteps | None = None,
    resolution: float | None = None,
) -> dict:
    """Make a checkpoint from a model and what a client sent for one batch.

    Auditors who have a gradient of their own start here.

    model: the network with the weights that the client started from; it may be wrapped by
    DataParallel or torch.compile. update: an `Update`, or its gradient alone, ∂(mean loss)/∂θ: one
    tensor per trainable parameter in the model's order, or a mapping by parameter name. Arrays of
    numpy are as good as tensors, here and in `truth`. protection: what was done to the gradient.
    protection_norms: private norms before and after it, to record. truth: the batch, a control and
    decoys, for scoring. settings: plain values to record. local: how the client stepped, where it
    sent the update of several local steps; the gradient is then the mean one,
    (w_before − w_after) / (lr · T). resolution: relative rounding error of the gradient, where it
    is not that of its type.

    Raises InputError when the gradient does not fit the model's trainable parameters or another
    value is not what its field says, and for a mapping that holds buffers, as differences of state
    dicts do: train/updates.py makes a gradient of those.
    """
    sent, bn_mean, bn_var = update, None, None
    if isinstance(update, Update):
        sent, bn_mean, bn_var = update.gradient, update.bn_mean, update.bn_var
    names, gradient = _in_order(model, sent)
    checkpoint = {
        "format": FORMAT,
        "clock": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "batch_size": int(task.batch_size),
        "dataset_setup": {
            "mean": [float(v) for v in task.mean],
            "std": [float(v) for v in task.std],
            "size": tuple(int(side) for side in task.image_shape),
            "n_classes": int(task.num_classes),
        },
        "arch": str(task.arch),
        "model_eval": not task.loss.train_mode,
        "state_dict": {
            without_wrapper(key): _stored(value) for key, value in model.state_dict().items()
        },
        "free_last_layers_list": ["all"],
        "trainable": names,
        "target_gradient": _stored_list(gradient),
        "bn_mean_list": _statistics(bn_mean, "bn_mean"),
        "bn_var_list": _statistics(bn_var, "bn_var"),
        "label_smoothing": float(task.loss.label_smoothing),
        "protection": None if protection is None else asdict(protection),
        "replace_bn": task.replace_bn,
        "loss": task.loss.kind,
        "model_sha256": task.model_sha256,
        **_local_entries(local),
        "resolution": resolution,
        "args": dict(settings or {}),
    }
    if protection_norms is not None:
        checkpoint["protection_norms"] = dict(protection_norms)
    with naming("checkpoint"):
        check_contents(checkpoint)
    if truth is not None:
        checkpoint |= _truth_entries(truth, gradient)
        with naming("truth"):
            check_truth(checkpoint, checkpoint)
    bind(checkpoint)
    return checkpoint


def _local_entries(local: LocalSteps | None) -> dict[str, int | float | None]:
    """Make the entries of local steps; all None for one gradient."""
    if local is None or local.steps == 1:
        return dict.fromkeys(checking.LOCAL_KEYS)
    values = (local.steps, local.lr, local.batch, local.epochs)
    return dict(zip(checking.LOCAL_KEYS, values, strict=True))


def _truth_entries(truth: GroundTruth, gradient: Sequence[Tensor]) -> dict:
    """Make the entries of the truth; `gradient`: the one sent, whose shapes the control's has."""
    entries: dict[str, Any] = {}
    if truth.control is not None:
        of_others = _tensors(truth.control.gradient, "control: gradient")
        if not shapes(of_others) == shapes(gradient):
            raise InputError("control: its gradient has other shapes than the gradient")
        entries["control"] = {
            "target_gradient": _stored_list(of_others),
            "bn_mean_list": _statistics(truth.control.bn_mean, "control: bn_mean"),
            "bn_var_list": _statistics(truth.control.bn_var, "control: bn_var"),
        }
    entries["x_true"], entries["y_true"] = _stored_list(_tensors([truth.x, truth.y], "truth"))
    if truth.decoys is not None:
        (entries["decoys"],) = _stored_list(_tensors([truth.decoys], "decoys"))
    return entries


def _in_order(model: nn.Module, gradient) -> tuple[list[str], list[Tensor]]:
    """List the names of the trainable parameters, and the gradient as one tensor for each.

    Raises InputError for what is no gradient of this model.
    """
    parameters = {
        without_wrapper(name): p for name, p in model.named_parameters() if p.requires_grad
    }
    if isinstance(gradient, Mapping):
        gradient = {without_wrapper(name): g for name, g in gradient.items()}
        names = [without_wrapper(name) for name, _ in model.named_buffers()]
        buffers = [name for name in names if name in gradient]
        if buffers:
            raise InputError(
                f"gradient: holds the buffer {buffers[0]}, so it is a difference of state dicts, "
                "an update of weights; make a gradient of it by gradient_from_update"
            )
        odd = sorted(set(parameters).symmetric_difference(gradient))
        if odd:
            raise InputError(f"gradient: names and trainable parameters differ at {odd[0]}")
        gradient = [gradient[name] for name in parameters]
    gradient = _tensors(gradient, "gradient")
    if len(gradient) != len(parameters):
        raise InputError(
            f"gradient: {len(gradient)} tensors for {len(parameters)} trainable parameters"
        )
    for (name, parameter), g in zip(parameters.items(), gradient, strict=True):
        if g.shape != parameter.shape:
            raise InputError(
                f"gradient: {name} has shape {tuple(g.shape)} instead of {tuple(parameter.shape)}"
            )
    return list(parameters), gradient


def _tensors(values: Sequence, what: str) -> list[Tensor]:
    """Turn values into tensors; raise InputError, naming `what`, where they are no numbers."""
    try:
        return [v if isinstance(v, Tensor) else torch.tensor(v) for v in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what}: not a sequence of tensors: {one_line(error)[:120]}") from error


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _stored_list(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_stored(tensor) for tensor in tensors]


def _statistics(values: Sequence | None, what: str) -> list[Tensor] | None:
    """Store BatchNorm statistics as tensors, as `_tensors` does; None where none were sent."""
    return None if values is None else _stored_list(_tensors(values, what))


def shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """List the shape of every tensor."""
    return [tuple(tensor.shape) for tensor in tensors]


def seal(checkpoint: dict) -> tuple[dict, dict]:
    """Split a checkpoint into what an attacker has and the truth: two dicts.

    The settings go with the truth, because seed, data set and batch index would give the batch
    away. So do a control, decoys and the norms from before protection, which no client sends. Both
    carry the checkpoint's id and a digest of the other (models/binding.py).
    """
    sealed = {key: value for key, value in checkpoint.items() if key not in PRIVATE_KEYS}
    sealed["args"] = {}
    truth = {key: checkpoint[key] for key in (*PRIVATE_KEYS, "id") if key in checkpoint}
    return sealed, {"format": FORMAT, **truth}


def save(content: dict, path: str) -> None:
    """Write a checkpoint or a truth to `path` with a checksum of every entry.

    Raises FaultError if it cannot be written; the former `path` is then untouched.
    """
    tensor_files.save(with_checksums(content), path)


def load(path: str) -> dict:
    """Load and check a checkpoint, of this project or of the original.

    Raises InputError, without the file's name, when it is missing, damaged, altered, hostile,
    incomplete, of a newer format, or of more images than the free memory holds.
    """
    checkpoint = load_plain(path)
    if not isinstance(checkpoint, dict):
        raise InputError("not a checkpoint of training.py")
    _check_format(checkpoint)
    with _refused("write it again with training.py or make_checkpoint"):
        checking.check_origin(checkpoint)
    if "format" not in checkpoint:
        checkpoint = {**checkpoint, "protection": _original_protection(checkpoint.get("args"))}
    missing = [key for key in REQUIRED if key not in checkpoint]
    setup = checkpoint.get("dataset_setup")
    if isinstance(setup, dict):
        missing += [f"dataset_setup[{key}]" for key in checking.SETUP_KEYS if key not in setup]
    if missing:
        raise InputError(f"not a checkpoint of training.py: missing {', '.join(missing)}")
    layers = checkpoint.get("free_last_layers_list")
    if checkpoint.get("trainable") is None and layers not in (None, ["all"], "all"):
        raise InputError(
            f"free_last_layers_list {checking.shown(layers)}: only gradients of all "
            "parameters (['all']) of the original can be read; capture it anew with training.py"
        )
    check_contents(checkpoint)
    channels = checkpoint["dataset_setup"]["size"][0]
    if channels not in (1, 3):
        raise InputError(f"images of {channels} channels cannot be shown; attack them from Python")
    _check_memory(checkpoint)
    return without_checksums(checkpoint)


def _check_memory(checkpoint: dict) -> None:
    """Raise InputError where an attack could not even keep the images that a checkpoint claims."""
    batch_size, shape = checkpoint["batch_size"], tuple(checkpoint["dataset_setup"]["size"])
    require_memory(
        KEPT_IMAGES * 4 * batch_size * math.prod(shape),
        f"the {batch_size:,} images {shape} that it claims and what an attack keeps beside them",
        "take a machine with more memory, or capture a smaller batch",
    )


def _original_protection(settings) -> dict | None:
    """Read noise and clipping from the settings in a checkpoint of the original."""
    settings = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    if not settings.get("enable_dp"):
        return None
    sigma = settings.get("sigma")
    return {
        "mode": "batch",
        "sigma": 0.0 if sigma is None else sigma,
        "clip": settings.get("max_per_sample_grad_norm"),
    }


def check_contents(checkpoint: dict) -> None:
    """Raise InputError unless a checkpoint's values are what they should be."""
    with _refused("write it again with training.py or make_checkpoint"):
        checking.check_plain_entries(checkpoint)
        checking.check_setup(checkpoint["dataset_setup"])
        checking.check_smoothing(checkpoint.get("label_smoothing", 0.0))
        checking.check_loss(
            checkpoint.get("loss", "cross-entropy"), checkpoint.get("label_smoothing", 0.0)
        )
        checking.check_protection(checkpoint.get("protection"))
        checking.check_local_steps(checkpoint)
        state, names = checkpoint["state_dict"], checkpoint.get("trainable")
        checking.check_weights(state)
        checking.check_class_count(checkpoint["dataset_setup"]["n_classes"], state)
        checking.check_gradient(checkpoint["target_gradient"], names, len(state))
        checking.check_statistics(
            checkpoint.get("bn_mean_list"), checkpoint.get("bn_var_list"), len(state)
        )


@contextlib.contextmanager
def _refused(remedy: str):
    """Within this context an UnfitError becomes the InputError that says what to do."""
    try:
        yield
    except checking.UnfitError as error:
        raise InputError(f"{error}; {remedy}") from error


def check_control(control, checkpoint: dict) -> None:
    """Raise InputError unless `control` is another gradient for the checkpoint's network."""
    with (
        naming("its control is no gradient of this network with as many BN statistics"),
        _refused("capture it anew with a control"),
    ):
        if not isinstance(control, dict):
            raise checking.UnfitError(f"it is {checking.shown(control)}")
        for key, what in (
            ("target_gradient", "its gradient tensor"),
            ("bn_mean_list", "its BN mean"),
            ("bn_var_list", "its BN variance"),
        ):
            checking.check_like(control.get(key), checkpoint.get(key), what)
        for i, variance in enumerate(control.get("bn_var_list") or ()):
            checking.check_at_least_zero(variance, f"its BN variance {i}")


def check_truth(truth: dict, checkpoint: dict) -> None:
    """Raise InputError unless `truth` holds the batch that belongs to the checkpoint."""
    batch_size, setup = checkpoint["batch_size"], checkpoint["dataset_setup"]
    with _refused("give the truth of this checkpoint"):
        checking.check_images(truth["x_true"], (batch_size, *setup["size"]))
    check_labels(truth["y_true"], batch_size, setup["n_classes"], checkpoint.get("loss"))
    if truth.get("control") is not None:
        check_control(truth["control"], checkpoint)
    if truth.get("decoys") is not None:
        with _refused("capture it anew with decoys"):
            checking.check_decoys(truth["decoys"], (batch_size, *setup["size"]))


def check_labels(y, batch_size: int, num_classes: int, loss: str | None = None) -> None:
    """Raise InputError unless `y` is B class indices, or under "bce" (B, K) numbers in [0, 1]."""
    if loss == "bce":
        with _refused(f"give {batch_size} rows of {num_classes} numbers from 0 to 1"):
            checking.check_label_vectors(y, batch_size, num_classes)
        return
    with _refused(f"give {batch_size} integers from 0 to {num_classes - 1}"):
        checking.check_labels(y, batch_size, num_classes)


def load_truth(path: str) -> dict:
    """Load a truth file that `seal` made, or a checkpoint that holds its truth.

    Raises InputError, without the file's name, when it is missing, damaged, altered, of a newer
    format, or without a truth.
    """
    truth = load_plain(path)
    if not isinstance(truth, dict) or not {"x_true", "y_true"} <= truth.keys():
        raise InputError("holds no x_true and y_true; give the sealed truth file")
    _check_format(truth)
    return without_checksums(truth)


def _check_format(content: dict) -> None:
    number = content.get("format", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise InputError(
            f"format {checking.shown(number)} is not the number of a format; "
            "write it again with training.py or make_checkpoint"
        )
    if number > FORMAT:
        raise InputError(
            f"format {number}, written by a newer version; this one reads formats "
            f"up to {FORMAT}: update the project"
        )
