"""Normalised images and colours."""

from torch import Tensor


def denormalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) → [0, 1], clamped, on the CPU. mean, std: (C, 1, 1)."""
    x = x.detach().cpu()
    return (x * std.to(x) + mean.to(x)).clamp(0, 1)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] → (x − mean) / std. mean, std: (C, 1, 1)."""
    return (images.to(mean) - mean) / std
