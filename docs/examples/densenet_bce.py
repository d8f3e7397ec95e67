"""A small DenseNet for grey images with one output per finding, as for chest radiographs.

python training.py --model docs/examples/densenet_bce.py:build --loss bce --channels 1 …
"""

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Adds the outputs of one 3×3 convolution to its inputs, as further channels."""

    def __init__(self, channels: int, growth: int):
        """Build it for so many channels; `growth` are added."""
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.convolution = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels + growth, H, W)."""
        return torch.cat([x, self.convolution(torch.relu(self.norm(x)))], 1)


def build(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build the network for so many findings and images (C, H, W)."""
    channels, growth = 16, 8
    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], channels, 3, padding=1)]
    for block in range(3):
        for _ in range(2):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        if block < 2:  # a transition: half the channels, half the sides
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))
