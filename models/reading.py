"""From a loaded checkpoint to what the attacker sees (`Target`) and what scoring sees."""

from collections.abc import Sequence

import torch

from models.build import Builder, is_known, without_wrapper
from models.checking import LOCAL_KEYS
from models.gradient import Update
from models.local import LocalSteps
from models.target import GroundTruth, Protection, Target, outline_of
from utils.errors import InputError


def target_from_checkpoint(checkpoint: dict, builder: Builder | None = None) -> Target:
    """Take the attacker's view of a loaded checkpoint; no entry of the truth is read.

    builder: builds the network in the place of the file's `arch` (models/user_network.py).
    Half-precision gradients are widened to float32, the least that the attack computes in.
    Gradients in another order than the network's are put into it by their names.
    """
    setup = checkpoint["dataset_setup"]
    channels, height, width = setup["size"]
    dtype = torch.float32
    for g in checkpoint["target_gradient"]:
        dtype = torch.promote_types(dtype, g.dtype)
    order = gradient_order(checkpoint, builder)
    gradient = tuple(checkpoint["target_gradient"][place].to(dtype) for place in order)
    names = [without_wrapper(name) for name in checkpoint.get("trainable") or ()]
    if len(names) == len(order):
        names = [names[place] for place in order]

    def per_channel(values):
        return torch.as_tensor(values, dtype=dtype).view(-1, 1, 1)

    record = checkpoint.get("protection")
    bn_mean, bn_var = checkpoint.get("bn_mean_list"), checkpoint.get("bn_var_list")
    return Target(
        gradient=gradient,
        batch_size=int(checkpoint["batch_size"]),
        image_shape=(int(channels), int(height), int(width)),
        num_classes=int(setup["n_classes"]),
        mean=per_channel(setup["mean"]),
        std=per_channel(setup["std"]),
        arch=checkpoint["arch"],
        state_dict={without_wrapper(k): v for k, v in checkpoint["state_dict"].items()},
        train_mode=not checkpoint["model_eval"],
        trainable=tuple(names),
        bn_mean=tuple(bn_mean) if bn_mean else None,
        bn_var=tuple(bn_var) if bn_var else None,
        label_smoothing=float(checkpoint.get("label_smoothing", 0.0)),
        protection=Protection(**record) if record else None,
        replace_bn=checkpoint.get("replace_bn"),
        loss_kind=checkpoint.get("loss", "cross-entropy"),
        builder=builder,
        resolution=checkpoint.get("resolution"),
        local=_local_steps(checkpoint),
    )


def _local_steps(checkpoint: dict) -> LocalSteps | None:
    """Take how the client stepped; None where it sent one gradient."""
    steps, lr, batch, epochs = (checkpoint.get(key) for key in LOCAL_KEYS)
    if steps is None or steps == 1:
        return None
    assert lr is not None  # check_contents saw to it
    return LocalSteps(steps, float(lr), batch, epochs)


def gradient_order(checkpoint: dict, builder: Builder | None = None) -> list[int]:
    """Find the places of `target_gradient` in the order of the network's parameters.

    They are sorted by the names in `trainable`; the network's order is that of its state dict.
    They stay as they are where the file has no names, other names or no known network, which
    `check_fits` then refuses.
    """
    places = range(len(checkpoint["target_gradient"]))
    names = checkpoint.get("trainable")
    if not names or len(names) != len(places):
        return list(places)
    of_network = [without_wrapper(name) for name in checkpoint["state_dict"]]
    if builder is not None or is_known(checkpoint["arch"]):
        setup = checkpoint["dataset_setup"]
        size = tuple(setup["size"])
        try:
            outline = outline_of(
                checkpoint["arch"], setup["n_classes"], size, checkpoint.get("replace_bn"), builder
            )
        except InputError:
            return list(places)
        of_network = list(outline.state_dict())
    position = {name: place for place, name in enumerate(of_network)}
    names = [without_wrapper(name) for name in names]
    if not position.keys() >= set(names):
        return list(places)
    return sorted(places, key=lambda place: position[names[place]])


def truth_from_checkpoint(
    truth: dict, checkpoint: dict | None = None, builder: Builder | None = None
) -> GroundTruth | None:
    """Take the truth out of a loaded checkpoint or truth file; None where it holds none.

    checkpoint: the one that a truth file belongs to; the control's gradients are in its order.
    builder: as in `target_from_checkpoint`.
    """
    if truth.get("x_true") is None or truth.get("y_true") is None:
        return None
    control = truth.get("control")
    if control is not None:
        mean, var = control.get("bn_mean_list"), control.get("bn_var_list")
        owner = truth if checkpoint is None else checkpoint
        places: Sequence[int] = range(len(control["target_gradient"]))
        if "target_gradient" in owner:
            places = gradient_order(owner, builder)
        control = Update(
            tuple(control["target_gradient"][place] for place in places),
            tuple(mean) if mean else None,
            tuple(var) if var else None,
        )
    y = truth["y_true"]
    y = y.float() if y.is_floating_point() else y.long()
    return GroundTruth(truth["x_true"], y, control, truth.get("decoys"))
