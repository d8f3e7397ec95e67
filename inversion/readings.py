"""Keeps what evaluations gave on the device, as rows of numbers that one transfer reads.

Whoever reads a number of a GPU waits until the GPU has computed it, and meanwhile gives it nothing
more to do. A row therefore holds all that the loop asks of an evaluation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inversion.objective import NO_LOSSES, Losses
from utils.shard import Shard

#: Place in a row of the number by which images are compared, and of the number of processes that
#: found something that is not finite.
CRITERION, WRONG = 1, -1


@dataclass(frozen=True)
class Evaluation:
    """Holds the numbers of one evaluation of candidate images."""

    losses: Losses[float]
    #: Sum of the derivative's entries, at this process's images.
    slope: float
    #: Number of its entries that are not finite.
    broken: int
    #: Number of processes at which something is not finite.
    wrong: int

    def not_finite(self, entries: int) -> str | None:
        """Name what is not finite and what it is, in words; None where all is finite.

        Of several the one that is computed first counts: the gradient distance, each prior, their
        weighted sum, and last the derivative of it, which has so many `entries`.
        """
        if not self.wrong:
            return None
        values = {
            "the gradient distance": self.losses.gradient,
            **{f"the prior {name}": value for name, value in self.losses.terms.items()},
            "the weighted sum of the losses": self.losses.total,
        }
        for what, value in values.items():
            if value is not None and not math.isfinite(value):
                return f"{what} is {value}"
        if math.isfinite(self.slope):
            return "the derivative of other images is not finite"
        if self.broken == 0:
            return "the sum of the derivative overflows"
        return f"the derivative is not finite in {self.broken:,} of {entries:,} entries"


@dataclass(frozen=True)
class Columns:
    """Says which numbers a row holds of the losses."""

    #: Names of the priors.
    terms: tuple[str, ...]
    #: Whether there is a gradient distance, and a place between two states.
    gradient: bool
    alpha: bool

    @classmethod
    def of(cls, losses: Losses) -> "Columns":
        """Return the columns of such losses."""
        return cls(tuple(losses.terms), losses.gradient is not None, losses.alpha is not None)

    def evaluation(self, row: Sequence[float]) -> Evaluation:
        """Return what `row_of` put into a row."""
        total, criterion, place, *terms, slope, broken, wrong = row
        losses = Losses(
            total,
            criterion if self.gradient else None,
            dict(zip(self.terms, terms, strict=True)),
            place if self.alpha else None,
        )
        return Evaluation(losses, slope, int(broken), int(wrong))

    def best(self, row: Sequence[float]) -> Losses[float]:
        """Return the losses of the best images; NO_LOSSES where none had finite ones."""
        return NO_LOSSES if math.isnan(row[CRITERION]) else self.evaluation(row).losses

    def row(self, losses: Losses[float]) -> list[float]:
        """Return the row of finite losses, or of NO_LOSSES."""
        place = losses.total if losses.alpha is None else losses.alpha
        terms = [losses.terms.get(name, math.nan) for name in self.terms]
        return [losses.total, losses.criterion, place, *terms, 0.0, 0.0, 0.0]


def row_of(losses: Losses[Tensor], derivative: Tensor, shard: Shard) -> Tensor:
    """Return the numbers of an evaluation as one tensor (n,) of type float64, unread.

    derivative: that at this process's images. Every process of `shard` must call it.
    """
    place = losses.total if losses.alpha is None else losses.alpha
    values = torch.stack([losses.total, losses.criterion, place, *losses.terms.values()]).detach()
    broken = derivative.numel() - derivative.isfinite().sum()
    own = torch.cat([values.double(), torch.stack([derivative.sum().double(), broken.double()])])
    wrong = own.isfinite().all().logical_not().double().view(1)
    return torch.cat([own, shard.sum_(wrong)])
