"""The client of a checkpoint once more, with one setting changed: what a sweep simulates."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from models.choices import SWEEP_PARAMETERS
from train.batches import DECOYS
from train.capture import capture
from train.defence_settings import FLAGS, RANDOM
from train.flags import parser
from train.settings import ClientSettings, settings_from
from utils.console import Silent
from utils.errors import InputError
from utils.shard import ALONE

#: Flags without which a record is none of training.py.
NEEDED = ("data_name", "arch", "batch_size", "target_idx")
#: Flags that concern the run that wrote the record, not the client.
OF_THE_RUN = {
    "id", "results", "gpu", "dry_run", "seal", "ra", "ra_mode", "with_control", "model",
    "help", "version", "traceback", "multiprocessing_distributed", "nproc", "world_size", "rank",
    "dist_url", "dist_backend",
}  # fmt: skip
#: Flags of the protection, which a swept defence takes the place of.
OF_PROTECTION = {"enable_dp", "dp_mode", "sigma", "max_per_sample_grad_norm", "defence"}
#: Values that leave a flag out.
LEFT_OUT = ("none", "")


def base_flags(record: Mapping, model: str | None = None) -> list[str]:
    """Return the command line of training.py that gives a client again, from its record.

    record: entry `args` of a checkpoint. Every value passes the parser once more. model: the
    network's FILE.py:function, where the client has one of its own; the record's is never run.

    Raises InputError, without the file's name, where the record does not describe a client that
    can be simulated.
    """
    if any(name not in record for name in NEEDED):
        raise InputError(
            "holds no record of a client that training.py can simulate again, as an imported "
            "gradient or a checkpoint of another program; capture one by training.py"
        )
    for name, value in record.items():
        if not (isinstance(name, str) and _is_plain(value)):
            raise InputError(
                f"its record holds {ascii(name)[:40]}, which is no flag of training.py with a "
                "plain value; capture it anew"
            )
    if record.get("import_update"):
        raise InputError(
            "its update was imported, so that no client can be simulated again; capture one by "
            "training.py on images of yours"
        )
    if (record.get("model") is None) != (model is None):
        raise InputError(
            "its network is one of the list; leave --model out"
            if model is not None
            else "its network came from a file of its user, which no record starts; give --model "
            "FILE.py:function"
        )
    flags = [*_command_line({**record, "noise_seed": None}), *_model_flags(model)]
    parser().parse_args(flags)  # for its refusals
    return flags


def _is_plain(value) -> bool:
    """Tell whether a record's value can be that of a flag, or a note such as versions."""
    if isinstance(value, dict):
        return all(isinstance(v, str) and v.isprintable() for v in value.values())
    if isinstance(value, list | tuple):
        return all(isinstance(v, str | int | float) and str(v).isprintable() for v in value)
    return value is None or (isinstance(value, str | int | float) and str(value).isprintable())


def _model_flags(model: str | None) -> list[str]:
    return [] if model is None else [f"--model={model}"]


def _command_line(record: Mapping) -> list[str]:
    """Write the flags of a record that are not at their defaults."""
    flags = []
    for action in parser()._actions:
        value = record.get(action.dest, action.default)
        if action.dest in OF_THE_RUN or value is None or value == action.default:
            continue
        option = action.option_strings[-1]
        if value is True:
            flags.append(option)
        elif isinstance(value, list | tuple) and action.nargs is not None:
            flags += [option, *map(str, value)]
        elif isinstance(value, list | tuple):
            flags.append(f"{option}={','.join(map(str, value))}")
        else:
            flags.append(f"{option}={value}")
    return flags


def varied(base: Sequence[str], parameter: str, value: str, repeat: int) -> argparse.Namespace:
    """Return the flags of the client `base` with a parameter at a value and a later batch.

    parameter: a name in SWEEP_PARAMETERS; "" changes nothing. value: as its flag takes it, or
    "none". repeat: how many batches after that of `base`.

    Raises InputError, naming the flag, for a value that it does not take.
    """
    args = _without_alias(parser().parse_args(list(base)), parameter)
    args.target_idx += repeat
    if not parameter:
        return args
    flag = "-C" if parameter == "C" else f"--{parameter}"
    given = [] if value in LEFT_OUT and parameter != "defence" else [flag, value]
    read = parser().parse_args(given)
    name = _attribute(parameter)
    if parameter == "defence":
        for other in OF_PROTECTION & vars(args).keys():
            setattr(args, other, parser().get_default(other))
    setattr(args, name, getattr(read, name))
    if not (args.local_steps or args.local_epochs or value.startswith("local-steps")):
        args.local_lr = args.local_batch = None  # these do nothing without steps
    if parameter in ("sigma", "C"):
        args.enable_dp = _protects(args)
    return args


def _without_alias(args: argparse.Namespace, parameter: str) -> argparse.Namespace:
    """Take back a defence that is another flag, which the record holds as well.

    So a swept flag is not overruled by it. A swept defence takes the place of the flag, except that
    a batch stays as large as it is: no record says how large it was without.
    """
    name = (args.defence or "").partition(":")[0]
    if name not in FLAGS:
        return args
    args.defence = None
    if parameter == "defence" and name != "larger-batch":
        setattr(args, FLAGS[name], None)
    return args


def _attribute(parameter: str) -> str:
    """Return the attribute in which the parser keeps a parameter."""
    return "max_per_sample_grad_norm" if parameter == "C" else parameter.replace("-", "_")


def _protects(args) -> bool:
    """Whether noise or clipping is left; a noise of 0 alone is none, and its flag is taken back."""
    if not args.sigma and args.max_per_sample_grad_norm is None:
        args.sigma, args.dp_mode = None, "batch"
        return False
    return True


def simulate(
    base: Sequence[str],
    parameter: str,
    value: str,
    repeat: int,
    decoys_per_image: int,
    device: torch.device,
) -> tuple[dict, str]:
    """Capture the client `base` with one parameter changed, a control and decoys; write nothing.

    base: of `base_flags`. The other arguments but these are those of `varied`. decoys_per_image:
    decoys of each image for each image of the batch, unless the record says their number.

    Returns the checkpoint, with its truth, and the command that makes such a one. Noise is drawn
    from a seed that the client's own and the number of the batch give, so that a sweep can be
    repeated. Raises InputError for what cannot be captured.
    """
    assert parameter in ("", *SWEEP_PARAMETERS)
    args = varied(base, parameter, value, repeat)
    args.with_control = True  # which a recorded number of decoys needs
    settings = settings_from(args)
    decoys = settings.batch.decoys or max(DECOYS, decoys_per_image * settings.batch.size - 1)
    settings = replace(
        _repeatable(settings, args),
        batch=replace(settings.batch, decoys=decoys),
    )
    settings = replace(settings, record={**settings.record, "decoys": decoys})
    captured = capture(settings, device, Silent(), ALONE)
    flags = [*_command_line(settings.record), *_model_flags(args.model), "--with-control"]
    return captured.checkpoint, shlex.join(["python", "training.py", *flags])


def _repeatable(settings: ClientSettings, args) -> ClientSettings:
    """Return the settings with a seed for what the protection draws, where it draws."""
    if settings.protection is None or settings.protection.mode not in ("per-sample", *RANDOM):
        return settings
    seed = (args.seed * 1000 + args.target_idx) % 2**31
    protection = replace(settings.protection, noise_seed=seed)
    return replace(settings, protection=protection, record={**settings.record, "noise_seed": seed})
