"""Network architectures by name, and the one place that knows where the classifier head is."""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.errors import InputError
from utils.files import printable

#: Builds a network for a number of classes and images (C, H, W).
Builder = Callable[[int, tuple[int, int, int]], nn.Module]
#: Attribute of a network that names its head, where someone has looked for it; None for no head.
HEAD_MARK = "_head_of_logits"


def lenet(num_classes: int, image_shape: tuple[int, int, int], width: int = 32) -> nn.Module:
    """Build three 5×5 sigmoid convolutions and a linear head, after DLG (Zhu et al., 2019).

    The gradient-inversion literature's smooth test network, with strides 2, 2, 1. image_shape:
    (C, H, W), which fixes the head's input size. width: channels per layer (DLG has 12).
    """
    channels, rows, columns = image_shape
    layers = []
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(channels, width, 5, stride, padding=2), nn.Sigmoid()]
        rows, columns = ((side - 1) // stride + 1 for side in (rows, columns))
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * rows * columns, num_classes))


def convnet(num_classes: int, image_shape: tuple[int, int, int], width: int = 32) -> nn.Module:
    """Build four 3×3 conv-BN-ReLU blocks, global average pooling and a linear head."""
    channels, layers = image_shape[0], []
    for stride in (1, 2, 1, 2):
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *pool, nn.Linear(width, num_classes))


def resnet18_cifar(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build torchvision's ResNet-18 with the stem for small images (He et al., 2016, section 4.2).

    The first convolution is 3×3 with stride 1 and initialised as torchvision's, and there is no
    max-pooling, so that the first stage sees the image at its full size.
    """
    model = _torchvision().resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


#: The project's own architectures, name → builder(num_classes, image_shape). A new
#: architecture that torchvision lacks is one function and one line here.
SMALL_NETWORKS = {"lenet": lenet, "convnet": convnet, "resnet18_cifar": resnet18_cifar}


#: What stands before every name of a network that is wrapped.
WRAPPERS = ("module.", "_orig_mod.")


def without_wrapper(name: str) -> str:
    """Return a parameter's or buffer's name without what DataParallel or torch.compile prepend."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def architectures() -> list[str]:
    """List every name that `build_model` takes: the project's own, torchvision's classifiers."""
    return [*SMALL_NETWORKS, *_torchvision().list_models(module=_torchvision())]


def _torchvision():
    """Return `torchvision.models`, imported here: that takes seconds, which small networks save."""
    from torchvision import models

    return models


def is_known(arch: str) -> bool:
    """Tell whether `build_model` knows the name `arch`."""
    return arch in SMALL_NETWORKS or arch in architectures()


def check_known(arch: str) -> None:
    """Raise InputError, listing the choices, unless `build_model` knows the name `arch`."""
    if not is_known(arch):
        raise InputError(
            f"unknown; choose from {', '.join(SMALL_NETWORKS)} or torchvision's "
            f"{', '.join(architectures()[len(SMALL_NETWORKS) :])}"
        )


def build_model(arch: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build network `arch` with random weights for (B, *image_shape) images.

    Auxiliary heads are left out (googlenet, inception_v3). Where images do not have three
    channels the first convolution of a torchvision network is made for theirs.

    Raises InputError for an unknown name and for an image size the network cannot take.
    """
    check_known(arch)
    if arch in SMALL_NETWORKS:
        return SMALL_NETWORKS[arch](num_classes, image_shape)
    options: dict[str, Any] = {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif arch.startswith("vit_"):
        options = {"image_size": image_shape[1]}
    elif arch.startswith("maxvit"):
        options = {"input_size": tuple(image_shape[1:])}
    try:
        model = _torchvision().get_model(arch, weights=None, num_classes=num_classes, **options)
    except (ValueError, AssertionError) as error:  # vit and maxvit check the image size
        raise InputError(
            f"{arch} cannot take images of {image_shape[1]} pixels: {' '.join(str(error).split())}"
        ) from error
    if image_shape[0] != 3:
        _change_input_channels(model, image_shape[0])
    return model


def input_convolution(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Find the first convolution: its name and module; None in a network without one."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    return next(found, None)


def _change_input_channels(model: nn.Module, channels: int) -> None:
    first = input_convolution(model)
    assert first is not None  # every image classifier of torchvision has one
    name, old = first
    settings = {
        key: getattr(old, key)
        for key in inspect.signature(nn.Conv2d).parameters
        if key not in ("in_channels", "bias", "device", "dtype")
    }
    model.set_submodule(name, nn.Conv2d(channels, bias=old.bias is not None, **settings))


class WithoutMemory(TorchFunctionMode):
    """Within it a network is built whose parameters take no memory: they are on the meta device.

    Names, shapes and dtypes are those of the network. Small tensors that builders compute with
    stay real, which `torch.device("meta")` would not leave (regnet).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def misfits(
    state: dict[str, Tensor], own: dict[str, Tensor], optional: Collection[str] = ()
) -> str:
    """Say what keeps `state` from being loaded into a network with the state `own`, or "".

    Names that are missing (and not optional) or surplus, other shapes, and other kinds: integers
    where the network has floating-point numbers, or the reverse. Reads no numbers.
    """
    common = [name for name in state if name in own]
    found = {
        "missing": [name for name in own if name not in state and name not in optional],
        "surplus": [name for name in state if name not in own],
        "reshaped": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in common
            if state[name].shape != own[name].shape
        ],
        "of another kind": [
            f"{name} {state[name].dtype} instead of {own[name].dtype}"
            for name in common
            if _kind(state[name]) != _kind(own[name])
        ],
    }
    return "; ".join(f"{word} {some(names)}" for word, names in found.items() if names)


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool or tensor.is_complex():
        return str(tensor.dtype)
    return "floating" if tensor.is_floating_point() else "integer"


def some(names: Sequence, most: int = 5) -> str:
    """Write the first names of a list on one line, and how many more there are.

    Names come from files: what would break or disguise a printed line is escaped (`printable`).
    """
    shortened = [printable(" ".join(str(name)[:100].split())) for name in names[:most]]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shortened) + rest


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict of plain tensors, which carries no layer versions, into `model`.

    The versions are taken from the model itself: mnasnet refuses a state without one.

    Raises RuntimeError as `load_state_dict` does.
    """
    versioned = model.state_dict()  # torch keeps the versions beside the entries
    versioned.clear()
    versioned.update(state)
    model.load_state_dict(versioned)


def find_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Find the classifier head, the layer whose outputs are the logits: its name and module.

    The last linear layer; in networks without one (squeezenet) the last convolution; where the head
    was marked, that one.

    Raises ValueError for a model without a head.
    """
    if hasattr(model, HEAD_MARK):
        name = getattr(model, HEAD_MARK)
        if name is None:
            raise ValueError(
                "the outputs of no linear layer and of no convolution are the logits: no "
                "classifier head"
            )
        return name, model.get_submodule(name)
    for kind in (nn.Linear, nn.Conv2d):
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
        if found:
            return found[-1]
    raise ValueError("the model has no linear layer and no convolution: no classifier head")


def mark_head(model: nn.Module, name: str | None) -> None:
    """Let `find_head` return this layer; None: the network has no classifier head."""
    setattr(model, HEAD_MARK, name)


def _init_normal(weight: Tensor, bias: Tensor | None) -> None:
    nn.init.normal_(weight, 0.0, 0.01)
    if bias is not None:
        nn.init.zeros_(bias)


def _init_kaiming_uniform(weight: Tensor, bias: Tensor | None) -> None:
    nn.init.kaiming_uniform_(weight)  # the bias stays, as in the original


def _init_keep(weight: Tensor, bias: Tensor | None) -> None:
    """Leave the head as it was built or loaded."""


#: `--outlayer-state`: how the classifier head starts. `normal` is N(0, 0.01²) with bias 0,
#: `kaiming_uniform` is He et al.'s bound and leaves the bias as it was, `keep` leaves both alone.
HEAD_INITS = {
    "normal": _init_normal,
    "kaiming_uniform": _init_kaiming_uniform,
    "keep": _init_keep,
}


def init_head(model: nn.Module, head_init: str) -> None:
    """Initialise the classifier head in place by the rule `head_init` of HEAD_INITS."""
    _, head = find_head(model)
    with torch.no_grad():
        HEAD_INITS[head_init](head.weight, head.bias)
