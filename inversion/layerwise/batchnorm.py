"""Inverts BatchNorm: a known affine map, whose backward pass couples the batch in train mode.

In train mode z̃ = (z − μ)/√(σ² + ε), y = γ z̃ + β, and the signal at the input z is (Ioffe & Szegedy,
2015) ∂L/∂z = γ/√(σ² + ε) (dy − mean(dy) − z̃ mean(dy z̃)), means over the N = B·h·w numbers of a
channel. They are those of the parameters' own gradients: mean(dy) = ∂L/∂β / N and
mean(dy z̃) = ∂L/∂γ / N. So with the batch's μ and σ² sent, ∂L/∂z = K − κ (z − μ) with known K and κ:
linear in z, which is linear in the convolution's input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def per_channel(values: Tensor) -> Tensor:
    """Return (C,) numbers as (1, C, 1, 1)."""
    return values.view(1, -1, 1, 1)


@dataclass(frozen=True)
class BatchNorm:
    """Holds a BatchNorm layer with the statistics by which it normalises, (C,) each."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    #: ∂L/∂γ and ∂L/∂β in train mode; None where the layer is a mere affine map.
    weight_gradient: Tensor | None = None
    bias_gradient: Tensor | None = None

    @property
    def coupled(self) -> bool:
        """Whether its backward pass couples the batch."""
        return self.weight_gradient is not None

    @property
    def scale(self) -> Tensor:
        """Return γ/√(σ² + ε), (C,)."""
        return self.weight * (self.var + self.eps).rsqrt()

    @property
    def shift(self) -> Tensor:
        """Return β − μ γ/√(σ² + ε), (C,)."""
        return self.bias - self.mean * self.scale

    def input_of(self, y: Tensor) -> Tensor:
        """Return z from y = scale·z + shift, (B, C, h, w); finite where the scale is 0, too."""
        scale = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        return (y - per_channel(self.bias)) / per_channel(scale) + per_channel(self.mean)

    def constants(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return K (B, C, h, w) and κ (C,) of ∂L/∂z = K − κ (z − μ) from ∂L/∂y (B, C, h, w)."""
        assert self.weight_gradient is not None
        assert self.bias_gradient is not None
        count = dy.numel() // dy.shape[1]
        constant = per_channel(self.scale) * (dy - per_channel(self.bias_gradient / count))
        slope = self.scale * (self.var + self.eps).rsqrt() * self.weight_gradient / count
        return constant, slope

    def signal(self, dy: Tensor, z: Tensor | None) -> Tensor:
        """Return ∂L/∂z from ∂L/∂y and, where the batch is coupled, z; (B, C, h, w) each."""
        if not self.coupled:
            return dy * per_channel(self.scale)
        assert z is not None
        constant, slope = self.constants(dy)
        return constant - per_channel(slope) * (z - per_channel(self.mean))

    def output_signal(self, dz: Tensor, z: Tensor) -> Tensor:
        """Return ∂L/∂y from ∂L/∂z and the input z, the inverse of `signal`; (B, C, h, w) each.

        0 in channels that the layer scales by 0, of which nothing is known.
        """
        scale = torch.where(self.scale == 0, torch.full_like(self.scale, torch.inf), self.scale)
        dy = dz / per_channel(scale)
        if not self.coupled:
            return dy
        assert self.weight_gradient is not None
        assert self.bias_gradient is not None
        count = z.numel() // z.shape[1]
        centred = (z - per_channel(self.mean)) * per_channel((self.var + self.eps).rsqrt())
        return (
            dy
            + per_channel(self.bias_gradient / count)
            + centred * per_channel(self.weight_gradient / count)
        )
