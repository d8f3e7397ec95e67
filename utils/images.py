"""Converts between normalised images and images in [0, 1]."""

from torch import Tensor


def denormalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return normalised images (B, C, H, W) as x · std + mean, clamped to [0, 1], on the CPU.

    mean, std: (C, 1, 1).
    """
    x = x.detach().cpu()
    return (x * std.to(x) + mean.to(x)).clamp(0, 1)


def eight_bit(images: Tensor) -> Tensor:
    """Return images in [0, 1] of any shape as uint8, rounded to the nearest of 256 values."""
    return (images * 255).round().byte()


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (images − mean) / std for images (B, C, H, W) in [0, 1]. mean, std: (C, 1, 1)."""
    return (images.to(mean) - mean) / std
