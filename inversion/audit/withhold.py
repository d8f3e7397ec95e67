"""Withholds parts of what a client sends or says from the attacker of a run (`--without`).

This file imports nothing heavy: the command line is refused by what stands here.
"""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from inversion.settings import LABEL_METHODS
from utils.errors import InputError

if TYPE_CHECKING:
    from models.gradient import Update
    from models.target import GroundTruth, Target

#: What can be withheld, and what the attacker does without it.
WITHHELD = {
    "bn": "the uploaded BatchNorm statistics: none are used",
    "labels": "the labels: they are reconstructed from the gradient",
    "normalisation": "mean and standard deviation of the normalisation: 0.5 each is assumed",
    "protection": "the client's report of clipping and noise: none is assumed",
}
#: Mean and standard deviation of every channel that an attacker assumes who knows neither: the
#: network is then taken to be fed with numbers from -1 to 1.
ASSUMED = 0.5


def withheld_parts(text: str) -> tuple[str, ...]:
    """Return the names in WITHHELD that `text` lists with commas, each once (a flag type)."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WITHHELD:
            raise argparse.ArgumentTypeError(
                f"'{name[:40]}' cannot be withheld; choose from {', '.join(WITHHELD)}"
            )
    return tuple(name for name in WITHHELD if name in names)


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Raise InputError for a flag of run.py that needs what `--without` withholds."""
    without = args.without or ()
    if "labels" in without and args.labels is not None:
        raise InputError(
            f"--labels {args.labels[:80]}: --without labels withholds them; give one of them"
        )
    if "bn" not in without:
        return
    needing = {
        "--exact-bn": args.exact_bn,
        "--bn-coupling forced": args.bn_coupling == "forced",
        f"--label-method {args.label_method}": args.label_method in LABEL_METHODS
        and LABEL_METHODS[args.label_method].needs_uploaded_bn,
    }
    for flag, given in needing.items():
        if given:
            raise InputError(
                f"{flag}: needs the BatchNorm statistics that --without bn withholds; leave one "
                "of both out"
            )


def withhold(target: "Target", parts: tuple[str, ...]) -> tuple["Target", dict[str, str]]:
    """Return what an attacker sees without these parts, and in words what was taken away.

    parts: names in WITHHELD. Labels are no part of a target; who calls sees to them.

    Raises InputError for a part that is not there, or that the attacker would assume rightly.
    """
    words = {}
    if "bn" in parts:
        if target.bn_mean is None:
            raise InputError("holds no BatchNorm statistics to withhold; leave bn out of --without")
        words["bn"] = f"mean and variance at {len(target.bn_mean)} layers were sent"
        target = replace(target, bn_mean=None, bn_var=None)
    if "labels" in parts:
        words["labels"] = ""
    if "normalisation" in parts:
        assumed = target.mean.new_full(target.mean.shape, ASSUMED)
        if target.mean.equal(assumed) and target.std.equal(assumed):
            raise InputError(
                f"was normalised by mean and standard deviation {ASSUMED:g}, which the attacker "
                "would assume; leave normalisation out of --without"
            )
        words["normalisation"] = f"the client's is {normalisation_in_words(target)}"
        target = replace(target, mean=assumed, std=assumed)
    if "protection" in parts:
        if target.protection is None:
            raise InputError("reports no protection to withhold; leave protection out of --without")
        words["protection"] = f"the client reported {target.protection.description}"
        target = replace(target, protection=None)
    return target, words


def withhold_from_control(truth: "GroundTruth", parts: tuple[str, ...]) -> "GroundTruth":
    """Return the truth with a control that was sent as little as the attack is given."""
    if truth.control is None or "bn" not in parts:
        return truth
    control: Update = replace(truth.control, bn_mean=None, bn_var=None)
    return replace(truth, control=control)


def normalisation_in_words(target: "Target") -> str:
    """Name mean and standard deviation of every channel."""
    mean, std = (
        ", ".join(f"{value:.4g}" for value in numbers.flatten().tolist())
        for numbers in (target.mean, target.std)
    )
    return f"mean {mean}; standard deviation {std}"
