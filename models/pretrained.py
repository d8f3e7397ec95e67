"""Weights from files: torchvision .pth, training .tar, MoCo v2; told apart by their keys."""

import os
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from models import checking
from models.build import find_head, input_convolution, load_weights, misfits, some
from utils.errors import InputError
from utils.tensor_files import load_plain

#: Where a file that holds more than a state dict keeps it.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
#: Most parts of a prefix that are tried.
MOST_CUTS = 50
MOCO_PREFIX = "encoder_q."
#: Heads that some torchvision files carry for training only; the networks here have none.
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(frozen=True)
class Loaded:
    """What came from a file of weights."""

    #: Whether the classifier head did, if the network has one.
    has_head: bool
    #: Lines for the user.
    remarks: list[str]


def load_pretrained(model: nn.Module, path: str) -> Loaded:
    """Load the weights in `path` into `model` in place.

    Taken are a state dict, a checkpoint that holds one under a name in WRAPPERS, both with or
    without a prefix to all names, as DataParallel (`module.`), torch.compile (`_orig_mod.`) and
    training frameworks (`model.`, `net.`) put there, and a MoCo v2 pre-training checkpoint
    (`module.encoder_q.*`), whose projection head is no classifier and is left out. A head of
    another class count is left out as well: the model keeps its own. Grey inputs: a
    three-channel first convolution is summed over its channels, which is what it computes on
    a grey image copied to three channels.

    Raises InputError, without the file's name, when the file is missing, is unreadable, or does not
    fit; the error says which keys are missing, surplus, of another shape or another kind, and which
    weights are no plain tensors or not finite.
    """
    own = model.state_dict()
    state, remarks = _read_state(path, own)
    head_keys, head_name = _head_keys(model)

    is_moco = any(key.startswith(MOCO_PREFIX) for key in state)
    if is_moco:
        trunk = {k[len(MOCO_PREFIX) :]: v for k, v in state.items() if k.startswith(MOCO_PREFIX)}
        state = {k: v for k, v in trunk.items() if not k.startswith(f"{head_name}.")}
        remarks.append("MoCo encoder_q weights; they hold no classifier head")
    elif any(key in state and state[key].shape != own[key].shape for key in head_keys):
        shape = tuple(state[head_keys[0]].shape)
        remarks.append(
            f"the file's head {shape} has another size than {tuple(own[head_keys[0]].shape)}: left "
            "out"
        )
        state = {k: v for k, v in state.items() if k not in head_keys}
    auxiliary = [k for k in state if k.startswith(AUXILIARY_HEADS) and k not in own]
    if auxiliary:
        remarks.append(f"{len(auxiliary)} tensors of auxiliary heads left out")
        state = {k: v for k, v in state.items() if k not in auxiliary}

    first = input_convolution(model)
    conv_key = "" if first is None else f"{first[0]}.weight"
    grey = first is not None and first[1].in_channels == 1
    if grey and conv_key in state and state[conv_key].shape[1:2] == (3,):
        state[conv_key] = state[conv_key].sum(1, keepdim=True)
        remarks.append(f"{conv_key} summed over its three channels for grey images")

    has_head = not head_keys or any(key in state for key in head_keys)
    optional = {k for k in own if k.endswith("num_batches_tracked")}
    if not has_head:
        optional |= set(head_keys)
    problems = misfits(state, own, optional)
    if problems:
        raise InputError(f"does not fit the network: {problems}; give weights of this architecture")
    try:
        checking.check_weight_values(state)
    except checking.UnfitError as error:
        raise InputError(f"{error}; give other weights") from error
    load_weights(model, {**own, **state})
    return Loaded(has_head, remarks)


def _head_keys(model: nn.Module) -> tuple[list[str], str]:
    """Name the parameters of the classifier head, and the head; nothing for a network without."""
    try:
        name, head = find_head(model)
    except ValueError:
        return [], ""
    return [f"{name}.{parameter}" for parameter, _ in head.named_parameters()], name


def with_own_names(state: dict[str, Tensor], own: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Take a prefix off all names where it keeps them from being those of a network, `own`.

    Wrappers put one there: `module.` (DataParallel), `_orig_mod.` (torch.compile), `model.` and
    `net.` (training frameworks). The function removes as much of what all names share, up to a
    dot, as makes the most of them the network's. Returns the state and what it removed, maybe "".
    """
    shared = os.path.commonprefix(list(state))
    cuts = [0, *(i + 1 for i, letter in enumerate(shared) if letter == ".")]
    cuts = cuts[:MOST_CUTS]  # of hostile names, which may hold dots without end
    cut = max(cuts, key=lambda cut: sum(name[cut:] in own for name in state))
    return {name[cut:]: value for name, value in state.items()}, shared[:cut]


def _read_state(path: str, own: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    content = load_plain(path)
    remarks = []
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            remarks.append(f"state dict found under '{wrapper}'")
            break
    if not isinstance(content, dict) or not content:
        raise InputError("holds no state dict; give a file of weights")
    not_tensors = [
        k for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))
    ]
    if not_tensors:
        raise InputError(f"not a state dict: {some(not_tensors)} hold no tensors")
    try:
        for name, value in content.items():
            checking.check_tensor(value, some([name]), checking.ANY, attached=True)
    except checking.UnfitError as error:
        raise InputError(f"{error}; give other weights") from error
    state = {k.removeprefix("module."): v.detach() for k, v in content.items()}
    if any(k.startswith(MOCO_PREFIX) for k in state):
        return state, remarks
    state, prefix = with_own_names(state, own)
    if prefix:
        remarks.append(f"'{prefix}' taken off the front of every name")
    return state, remarks
