"""A classifier in the shape of a U-Net: an encoder, a decoder with skip connections, and a head.

python training.py --model docs/examples/unet.py:build …
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def block(inputs: int, outputs: int) -> nn.Module:
    """Make two 3×3 convolutions with GroupNorm, which treats every image by itself."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()]
    return nn.Sequential(*layers)


class UNetClassifier(nn.Module):
    """Pools the map that a U-Net would segment by, and classifies it."""

    def __init__(self, num_classes: int, channels: int, width: int = 8):
        """Build it for images of so many channels, of any size that 4 divides."""
        super().__init__()
        # the head is defined first: which layer makes the logits is found by running the network
        self.head = nn.Linear(4 * width, num_classes)
        self.down1, self.down2 = block(channels, width), block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up2, self.up1 = block(6 * width, 2 * width), block(3 * width, width)
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        first = self.down1(x)
        second = self.down2(nn.functional.avg_pool2d(first, 2))
        x = self.bottom(nn.functional.avg_pool2d(second, 2))
        x = self.up2(torch.cat([interpolate(x, scale_factor=2), second], 1))
        x = self.up1(torch.cat([interpolate(x, scale_factor=2), first], 1))
        return self.head(self.pool(x).flatten(1))


def build(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build the network for so many classes and images (C, H, W)."""
    return UNetClassifier(num_classes, image_shape[0])
