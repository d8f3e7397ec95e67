"""Shows a candidate's gradient as a client's defence would have sent it: in part, or cut."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from models.target import Target


@dataclass(frozen=True)
class View:
    """Holds what a client's defence let through of its gradient."""

    #: Bool masks of what was sent, one per parameter; None for all of it.
    masks: tuple[Tensor, ...] | None
    #: Largest magnitude that an entry could have, as it was cut; None where none was.
    largest: float | None

    def of(self, gradient: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return a candidate's gradient as it would have been sent, differentiable."""
        seen = tuple(gradient)
        if self.masks is not None:
            seen = tuple(g * mask for g, mask in zip(seen, self.masks, strict=True))
        if self.largest is not None:
            seen = tuple(g.clamp(-self.largest, self.largest) for g in seen)
        return seen

    def within(self, parts: Sequence[tuple[slice, ...] | None]) -> "View":
        """Return the same view of gradients of which only a part per parameter is at hand."""
        if self.masks is None:
            return self
        both = zip(self.masks, parts, strict=True)
        masks = tuple(mask if part is None else mask[part] for mask, part in both)
        return replace(self, masks=masks)

    def cotangent(self, seen: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative by the whole `gradient` from `seen`, that by what `of` makes of it.

        It is 0 where nothing was sent, and beyond the cut.
        """
        found = list(seen)
        if self.masks is not None:
            found = [v * mask for v, mask in zip(found, self.masks, strict=True)]
        if self.largest is not None:
            inside = (g.abs() <= self.largest for g in gradient)
            found = [v * mask for v, mask in zip(found, inside, strict=True)]
        return found


def view_of(target: Target, like: Tensor) -> View | None:
    """Return what the target's client let through, on the device of `like`; None for all of it."""
    largest = None if target.protection is None else target.protection.largest
    masks = target.sent
    if masks is None and largest is None:
        return None
    if masks is not None:
        masks = tuple(mask.to(like.device) for mask in masks)
    return View(masks, largest)
