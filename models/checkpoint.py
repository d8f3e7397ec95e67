"""Checkpoints: safe to load, whole or absent on disk, readable by number.

A checkpoint is a dict of plain types and tensors with the keys of the original project and a
`format` number; `make_checkpoint` says what each holds. Loading never runs code from the file.
"""

import contextlib
import datetime
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models import checking
from models.binding import bind
from utils.errors import InputError
from utils.tensor_files import _one_line, load_plain

#: Raised by one whenever a reader of the number before could misread the file.
FORMAT = 4
REQUIRED = (
    "batch_size",
    "dataset_setup",
    "arch",
    "model_eval",
    "state_dict",
    "target_gradient",
)
#: What only scoring may see; `seal` takes it out.
PRIVATE_KEYS = (
    "x_true", "y_true", "protection_norms", "control", "decoys", "args", "truth_salt",
    "checkpoint_digest",
)  # fmt: skip
#: What stands before every name of a network that is wrapped.
WRAPPERS = ("module.", "_orig_mod.")


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
    decoys: Tensor | None = None,
    settings: Mapping | None = None,
    local_steps: int = 1,
) -> dict:
    """Make a checkpoint from a model and the gradient that a client sent for one batch.

    This is the way in for an auditor who has a gradient of their own.

    model: the network with the weights the client started from; wrapped by DataParallel or
    torch.compile too. gradient: ∂(mean cross-entropy)/∂θ, a tensor a trainable parameter in the
    model's order, or a mapping by parameter name; here and below an array of numpy is as good as a
    tensor. arch: a name that models/build.py knows when `run.py` is to read the file;
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
    decoys: (B, N, C, H, W) of uint8, for scoring: per image N images that could have been in its
    place, drawn as it was. settings: plain values to record.

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
    names, gradient = _in_order(model, gradient)
    if control is not None:
        control = {key: _tensors(values, f"control: {key}") for key, values in control.items()}
        if not shapes(control["gradient"]) == shapes(gradient):
            raise InputError("control: its gradient has other shapes than the gradient")
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
            without_wrapper(key): _stored(value) for key, value in model.state_dict().items()
        },
        "free_last_layers_list": ["all"],
        "trainable": names,
        "target_gradient": _stored_list(gradient),
        "bn_mean_list": _stored_list(_tensors(bn_mean, "bn_mean")),
        "bn_var_list": _stored_list(_tensors(bn_var, "bn_var")),
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
        checkpoint["x_true"], checkpoint["y_true"] = _stored_list(_tensors(truth, "truth"))
        if decoys is not None:
            (checkpoint["decoys"],) = _stored_list(_tensors([decoys], "decoys"))
        check_truth(checkpoint, checkpoint, "truth")
    check_contents(checkpoint, "checkpoint")
    bind(checkpoint)
    return checkpoint


def _in_order(model: nn.Module, gradient) -> tuple[list[str], list[Tensor]]:
    """The names of the trainable parameters, and the gradient as one tensor each, in their order.

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
                "an update of local steps; give the gradient of one batch"
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


def without_wrapper(name: str) -> str:
    """The name of a parameter or buffer without what DataParallel and torch.compile put before."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _tensors(values: Sequence | None, what: str) -> list[Tensor] | None:
    """The values as tensors; raise InputError, naming `what`, for values that are no numbers."""
    if values is None:
        return None
    try:
        return [v if isinstance(v, Tensor) else torch.tensor(v) for v in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what}: not a sequence of tensors: {_one_line(error)[:120]}") from error


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
    do a control, decoys and the norms from before protection, which no client sends. Both carry
    the checkpoint's id and a digest of the other (utils/binding.py).
    """
    sealed = {key: value for key, value in checkpoint.items() if key not in PRIVATE_KEYS}
    sealed["args"] = {}
    truth = {key: checkpoint[key] for key in (*PRIVATE_KEYS, "id") if key in checkpoint}
    return sealed, {"format": FORMAT, **truth}


def load(path: str, flag: str = "--checkpoint") -> dict:
    """Load and check a checkpoint, of this project or of the original.

    Raises InputError when it is missing, damaged, hostile, incomplete, of a newer format, or
    holds an update of several local steps.
    """
    checkpoint = load_plain(path, flag)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{flag} {path}: not a checkpoint of training.py")
    _check_format(checkpoint, path, flag)
    with _refused(f"{flag} {path}", "write it again with training.py or make_checkpoint"):
        checking.check_origin(checkpoint)
    if "format" not in checkpoint:
        checkpoint = {**checkpoint, "protection": _original_protection(checkpoint.get("args"))}
    missing = [key for key in REQUIRED if key not in checkpoint]
    setup = checkpoint.get("dataset_setup")
    if isinstance(setup, dict):
        missing += [f"dataset_setup[{key}]" for key in checking.SETUP_KEYS if key not in setup]
    if missing:
        raise InputError(
            f"{flag} {path}: not a checkpoint of training.py: missing {', '.join(missing)}"
        )
    layers = checkpoint.get("free_last_layers_list")
    if checkpoint.get("trainable") is None and layers not in (None, ["all"], "all"):
        raise InputError(
            f"{flag} {path}: free_last_layers_list {checking.shown(layers)}: only gradients of all "
            "parameters (['all']) of the original can be read; capture it anew with training.py"
        )
    if checkpoint.get("local_steps") not in (None, 1):
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
    with _refused(source, "write it again with training.py or make_checkpoint"):
        checking.check_plain_entries(checkpoint)
        checking.check_setup(checkpoint["dataset_setup"])
        checking.check_smoothing(checkpoint.get("label_smoothing", 0.0))
        checking.check_protection(checkpoint.get("protection"))
        state, names = checkpoint["state_dict"], checkpoint.get("trainable")
        checking.check_weights(state)
        checking.check_gradient(checkpoint["target_gradient"], names, len(state))
        checking.check_statistics(
            checkpoint.get("bn_mean_list"), checkpoint.get("bn_var_list"), len(state)
        )


@contextlib.contextmanager
def _refused(source: str, remedy: str):
    """Turn an UnfitError into the InputError that names the file and what to do."""
    try:
        yield
    except checking.UnfitError as error:
        raise InputError(f"{source}: {error}; {remedy}") from error


def check_control(control, checkpoint: dict, source: str) -> None:
    """Raise InputError unless `control` is another gradient for the checkpoint's network."""
    with _refused(
        f"{source}: its control is no gradient of this network with as many BN statistics",
        "capture it anew with training.py --with-control",
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


def check_truth(truth: dict, checkpoint: dict, source: str) -> None:
    """Raise InputError unless `truth` holds the batch that belongs to the checkpoint."""
    batch_size, setup = checkpoint["batch_size"], checkpoint["dataset_setup"]
    with _refused(source, "give the truth of this checkpoint"):
        checking.check_images(truth["x_true"], (batch_size, *setup["size"]))
    check_labels(truth["y_true"], batch_size, setup["n_classes"], source)
    if truth.get("control") is not None:
        check_control(truth["control"], checkpoint, source)
    if truth.get("decoys") is not None:
        with _refused(source, "capture it anew with training.py --with-control"):
            checking.check_decoys(truth["decoys"], (batch_size, *setup["size"]))


def check_labels(y, batch_size: int, num_classes: int, source: str) -> None:
    """Raise InputError, naming `source`, unless `y` is B class indices."""
    with _refused(source, f"give {batch_size} integers from 0 to {num_classes - 1}"):
        checking.check_labels(y, batch_size, num_classes)


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
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise InputError(
            f"{flag} {path}: format {checking.shown(number)} is not the number of a format; "
            "write it again with training.py or make_checkpoint"
        )
    if number > FORMAT:
        raise InputError(
            f"{flag} {path}: format {number}, written by a newer version; this one reads formats "
            f"up to {FORMAT}: update the project"
        )
