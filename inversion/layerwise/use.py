"""What is known of one convolution that takes the tensor that is sought."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.batchnorm import BatchNorm, per_channel
from inversion.layerwise.convolution import Geometry, Term

#: (0/1 where the tensor that is sought is known already, its values there), (B, I, H, W) each.
Entries = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Use:
    """Holds what is known of one convolution that takes the tensor that is sought."""

    name: str
    geometry: Geometry
    #: (O, I, k, k).
    weight: Tensor
    #: (O, I, k, k), ∂L/∂w.
    gradient: Tensor
    #: (B, O, h, w), the derivative of the loss behind the BatchNorm (or the convolution, where
    #: there is none) if every entry of the next ReLU were on.
    arriving: Tensor
    #: (B, O, h, w) of 0 and 1: the mask of that ReLU; ones where there is none.
    mask: Tensor
    #: Behind the convolution, None without one.
    batchnorm: BatchNorm | None
    #: How exact the gradient is.
    accuracy: Accuracy
    #: (B, O, h, w) of 0 and 1, and z = w∗u without bias where it is known.
    known: Tensor
    output: Tensor
    #: (O,) of 0 and 1: output channels whose gradient counts.
    trusted: Tensor
    #: Name of the ReLU whose mask that is.
    relu: str | None = None

    @property
    def coupled(self) -> bool:
        """Whether the signal at the convolution's output depends on that output."""
        return self.batchnorm is not None and self.batchnorm.coupled

    def signal(self, u: Tensor | None = None) -> Tensor:
        """Return ∂L/∂z, (B, O, h, w); a coupled one needs the input u."""
        return self.signal_at(
            self.geometry.forward(u, self.weight) if self.coupled and u is not None else None
        )

    def signal_at(self, z: Tensor | None) -> Tensor:
        """Return ∂L/∂z, (B, O, h, w), from the output z, which only a coupled one needs."""
        dy = self.arriving * self.mask
        return dy if self.batchnorm is None else self.batchnorm.signal(dy, z)

    @property
    def per_flip(self) -> Tensor:
        """Return what each entry of the mask adds to ∂L/∂z when it is on, (B, O, h, w)."""
        if self.batchnorm is None:
            return self.arriving
        return self.arriving * per_channel(self.batchnorm.scale)

    def term(self, signal: Tensor, output: Tensor | None = None) -> Term:
        """Return its equations with this signal, and with z known where it is or as given."""
        known, value = self.known, self.output
        if output is not None:
            known, value = torch.ones_like(output), output
        gradient = self.gradient * self.trusted.view(-1, 1, 1, 1)
        signal = signal * per_channel(self.trusted)
        return Term(self.geometry, self.weight, gradient, signal, known, value)

    def left_over(self, u: Tensor) -> Tensor:
        """Return what u leaves of the weight gradient, (O, I, k, k), 0 where it is not trusted."""
        left = self.gradient - self.geometry.weight_gradient(u, self.signal(u))
        return left * self.trusted.view(-1, 1, 1, 1)

    def residual(self, u: Tensor) -> float:
        """Return the norm of what u leaves of the weight gradient, relative to its norm."""
        return (self.left_over(u).norm() / self.gradient.norm()).item()

    def outputs_left(self, u: Tensor) -> float:
        """Return the norm of what u leaves of the known outputs, relative to theirs."""
        left = (self.output - self.geometry.forward(u, self.weight)) * self.known
        return (left.norm() / (self.output * self.known).norm()).item()
