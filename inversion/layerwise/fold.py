"""Takes every position of a tensor for an image of its own, where only 1×1 convolutions take it."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from inversion.layerwise.convolution import Geometry
from inversion.layerwise.mask_repair import Near
from inversion.layerwise.use import Use


def folds(uses: Sequence[Use], shape: Sequence[int]) -> bool:
    """Tell whether the equations of these uses do not tell positions (H, W) from images (B)."""
    alike = all(use.geometry == Geometry((1, 1)) for use in uses)
    return alike and shape[2] * shape[3] > 1


def fold(t: Tensor) -> Tensor:
    """Return a tensor (B, C, h, w) as B·h·w images of one position, (B·h·w, C, 1, 1)."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1], 1, 1)


def unfold(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the tensor of B images and h × w positions that was folded.

    shape: (B, ·, h, w), of which the channels do not count.
    """
    count, _, height, width = shape
    return t.reshape(count, height, width, -1).permute(0, 3, 1, 2).contiguous()


def folded(use: Use) -> Use:
    """Return a use of the folded tensor."""
    return replace(
        use, arriving=fold(use.arriving), mask=fold(use.mask), known=fold(use.known),
        output=fold(use.output),
    )  # fmt: skip


def folded_near(near: Near, shape: Sequence[int]) -> Near:
    """Return what the ReLUs behind were solved for, (B, O, h, w) or flat, folded.

    shape: (B, ·, h, w) of them.
    """
    count, _, height, width = shape
    return {
        name: (fold(raw.reshape(count, -1, height, width)), threshold)
        for name, (raw, threshold) in near.items()
    }
