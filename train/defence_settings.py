"""Reads `--defence NAME[:AMOUNT[:AMOUNT2…]]` and says which other flags it stands for; no torch."""

import argparse
import math
from dataclasses import dataclass

from models.choices import DEFENCE_NAMES
from utils.errors import InputError


@dataclass(frozen=True)
class Amount:
    """One number behind a defence's name."""

    #: What messages call it.
    name: str
    low: float
    high: float = math.inf
    #: Whether `low` itself is too low.
    above: bool = False
    #: Whether it is a whole number.
    whole: bool = False
    #: Its value where the command line leaves it out; None where it must be given.
    default: float | None = None


_CLIP = Amount("C", 0, above=True)
_SHARE = Amount("SHARE", 0, 1, above=True)
#: Name of a defence → its amounts, in order. Defaults are those of NVFlare's filters.
AMOUNTS: dict[str, tuple[Amount, ...]] = {
    "none": (),
    "dp-sgd": (_CLIP, Amount("MULTIPLIER", 0)),
    "batch": (_CLIP, Amount("SIGMA", 0)),
    "topk": (_SHARE,),
    "random": (_SHARE,),
    "percentile": (
        Amount("P", 0, 100, default=10.0),
        Amount("GAMMA", 0, above=True, default=0.01),
    ),
    "svt": (
        Amount("FRACTION", 0, 1, above=True, default=0.1),
        Amount("EPSILON", 0, above=True, default=0.1),
        Amount("NOISE_VAR", 0, above=True, default=0.1),
        Amount("GAMMA", 0, above=True, default=1e-5),
        Amount("TAU", 0, default=1e-6),
    ),
    "int8": (),
    "sign": (),
    "groupnorm": (),
    "local-steps": (Amount("T", 1, 2**31 - 1, whole=True),),
    "larger-batch": (Amount("B", 1, 2**31 - 1, whole=True),),
}
#: Defences that are another flag of the client: its name among the parsed flags.
FLAGS = {"groupnorm": "replace_bn", "local-steps": "local_steps", "larger-batch": "batch_size"}
#: Defences that draw random numbers.
RANDOM = ("dp-sgd", "batch", "random", "svt")


@dataclass(frozen=True)
class Defence:
    """One defence with its amounts."""

    #: A name in DEFENCE_NAMES.
    name: str
    #: As many as AMOUNTS has for it.
    amounts: tuple[float, ...]


def usage(name: str) -> str:
    """Return how a defence is written, with what may be left out in brackets."""
    amounts = AMOUNTS[name]
    parts = [f":{a.name}" if a.default is None else f"[:{a.name}" for a in amounts]
    return name + "".join(parts) + "]" * sum(a.default is not None for a in amounts)


def parsed(text: str) -> Defence:
    """Read a defence. Raises InputError, naming the flag, for what is none."""
    name, *words = text.split(":")
    if name not in DEFENCE_NAMES:
        raise InputError(f"--defence {text}: unknown; choose from {', '.join(DEFENCE_NAMES)}")
    wanted = AMOUNTS[name]
    needed = sum(amount.default is None for amount in wanted)
    if not needed <= len(words) <= len(wanted):
        raise InputError(f"--defence {text}: is written {usage(name)}")
    amounts = [_number(text, word, amount) for word, amount in zip(words, wanted, strict=False)]
    rest = [amount.default for amount in wanted[len(words) :] if amount.default is not None]
    return Defence(name, (*amounts, *rest))


def _number(text: str, word: str, amount: Amount) -> float:
    """Read one amount; raises InputError where it is none or out of range."""
    try:
        value: float = int(word) if amount.whole else float(word)
    except ValueError:
        kind = "a whole number" if amount.whole else "a number"
        raise InputError(f"--defence {text}: {amount.name} is '{word}', not {kind}") from None
    fits = amount.low <= value <= amount.high and math.isfinite(value)
    if not fits or (amount.above and value == amount.low):
        least = f"above {amount.low:g}" if amount.above else f"{amount.low:g} or more"
        most = "" if amount.high == math.inf else f", and at most {amount.high:g}"
        raise InputError(f"--defence {text}: {amount.name} must be {least}{most}")
    return value


def with_defence(args: argparse.Namespace, text: str) -> argparse.Namespace:
    """Return the flags with the defence `text` in the place of any other, and what it stands for.

    `groupnorm`, `local-steps:T` and `larger-batch:B` set the flag that they are, whatever it was.

    Raises InputError, naming the flag, where the text is no defence.
    """
    defence = parsed(text)
    changed = argparse.Namespace(**{**vars(args), "defence": text})
    flag = FLAGS.get(defence.name)
    if flag is None:
        return changed
    value = defence.amounts[0] if defence.amounts else defence.name
    setattr(changed, flag, value)
    return changed


def check_company(args: argparse.Namespace, defence: Defence) -> None:
    """Refuse flags that contradict a defence or do nothing beside it."""
    given = f"--defence {args.defence}"
    if args.enable_dp:
        raise InputError(f"{given}: --enable-dp is a defence of its own; give one of the two")
    for flag, value in (("--sigma", args.sigma), ("-C", args.max_per_sample_grad_norm)):
        if value is not None:
            raise InputError(f"{flag} {value:g}: belongs to --enable-dp, and {given} has its own")
    if args.dp_mode != "batch":
        raise InputError(f"--dp-mode {args.dp_mode}: belongs to --enable-dp; leave it out")
    if args.noise_seed is not None and defence.name not in RANDOM:
        raise InputError(f"--noise-seed {args.noise_seed}: {given} draws nothing; leave it out")
    if defence.name != "dp-sgd" and (args.dp_steps != 1 or args.sample_rate != 1):
        flag = "--dp-steps" if args.dp_steps != 1 else "--sample-rate"
        raise InputError(f"{flag}: is for epsilon, and there is none with {given}")
