"""What `--sweep` asks for, in types, and its refusals. No torch here."""

import argparse
import math
from dataclasses import dataclass

from models.choices import SWEEP_PARAMETERS
from utils.errors import InputError


@dataclass(frozen=True)
class SweepSettings:
    """Says which clients to simulate, and how often each is attacked."""

    #: What differs between the clients, a name in SWEEP_PARAMETERS.
    parameter: str
    #: Its values, as the client's flag takes them.
    values: tuple[str, ...]
    #: Batches per value, each attacked with a seed of its own.
    repeats: int
    #: Processes that attack at the same time.
    workers: int
    #: Weights of total variation that every client is attacked with; empty for that of --TV.
    tv: tuple[float, ...]
    #: Whether the checkpoints of the simulated clients stay.
    keep: bool

    @property
    def attempts(self) -> int:
        """Attacks per client, the strongest of which is told."""
        return max(1, len(self.tv))


def sweep_from(args: argparse.Namespace) -> SweepSettings | None:
    """Return the sweep that the flags ask for; None without one.

    Raises InputError, naming the flag, for what cannot be swept or contradicts a sweep.
    """
    if not args.sweep:
        _refuse_without(args)
        return None
    if len(args.sweep) > 1:
        raise InputError(
            f"--sweep {args.sweep[1]}: one sweep at a time; leave it or --sweep {args.sweep[0]} out"
        )
    (text,) = args.sweep
    parameter, values = _parsed(text)
    _refuse_company(args, text)
    return SweepSettings(
        parameter, values, args.repeats, args.sweep_workers, _weights(args), args.keep_checkpoints
    )


def _refuse_without(args) -> None:
    """Refuse flags that do nothing without a sweep."""
    for flag, value, default in (
        ("--repeats", args.repeats, 1),
        ("--sweep-workers", args.sweep_workers, 1),
        ("--sweep-TV", args.sweep_TV, None),
        ("--keep-checkpoints", args.keep_checkpoints, False),
    ):
        if value != default:
            shown = flag if value is True else f"{flag} {value}"
            raise InputError(f"{shown}: belongs to --sweep; give it as well")


def _parsed(text: str) -> tuple[str, tuple[str, ...]]:
    """Read PARAM=V1,V2,…"""
    parameter, equals, rest = text.partition("=")
    values = tuple(value.strip() for value in rest.split(","))
    if not equals or not all(values):
        raise InputError(f"--sweep {text}: is written PARAM=V1,V2, such as sigma=0,1e-3,1e-2")
    if parameter not in SWEEP_PARAMETERS:
        raise InputError(
            f"--sweep {text}: unknown parameter; choose from {', '.join(SWEEP_PARAMETERS)}"
        )
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise InputError(f"--sweep {text}: {twice[0]} stands there twice; give every value once")
    return parameter, values


def _refuse_company(args, text: str) -> None:
    """Refuse flags that a sweep decides by itself or cannot follow."""
    for flag, given, why in (
        ("--labels", args.labels is not None, "the batches of a sweep have labels of their own"),
        ("--superparameters-search", args.superparameters_search,
         "looks for settings of one attack, and a sweep has many; search first"),
        ("--no-controls", args.controls is False, "no value can be judged without controls"),
        ("--GInfoR", args.GInfoR, "says something of the images alone"),
    ):  # fmt: skip
        if given:
            raise InputError(f"{flag}: {why}; leave it or --sweep {text} out")
    if args.nproc is not None or args.multiprocessing_distributed or args.world_size > 1:
        raise InputError(
            f"--sweep {text}: every attack runs in one process; give --sweep-workers, not "
            "processes that share a batch"
        )


def _weights(args) -> tuple[float, ...]:
    """Read `--sweep-TV`."""
    text = args.sweep_TV
    if text is None:
        return ()
    if args.attack != "matching":
        raise InputError(f"--sweep-TV {text}: concerns --attack matching; leave it out")
    if args.TV_end is not None and args.TV == 0:
        raise InputError(
            f"--sweep-TV {text}: --TV-end keeps its ratio to --TV, which is 0; give --TV as well"
        )
    try:
        weights = tuple(float(word) for word in text.split(","))
    except ValueError:
        weights = ()
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise InputError(f"--sweep-TV {text}: give weights of 0 or more, such as 1e-4,1e-2")
    if len(set(weights)) < len(weights):
        raise InputError(f"--sweep-TV {text}: give every weight once")
    return weights
