"""Sets up all equations about the input of coupled convolutions, to first order, as a system.

It is solved in coordinates in which no direction is slow: the gradients' equations and the known
outputs then weigh alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.convolution import stacked_matrices
from inversion.layerwise.least_squares import inverse_square, largest_value
from inversion.layerwise.system import System
from inversion.layerwise.use import Entries, Use

#: Strongest direction of the known outputs, of the batch's means and of the known entries, in
#: shares of the gradients' largest singular value.
KNOWN = 0.2
#: Singular values of the gradients' equations, in the same shares, that the coordinates stretch
#: most, at least: what depends on the outputs to be found is as large.
SMALLEST = 0.02


@dataclass(frozen=True)
class Coordinates:
    """Holds coordinates y with u = R y for every channel, and the weights of the equations."""

    #: (B·H·W, B·H·W), R: the inverse root of the gradients' damped normal equations.
    root: Tensor
    #: Largest singular value of the gradients' equations.
    largest: float
    #: Weights of what every use's outputs leave, and of what the known entries do, not squared.
    outputs: Sequence[float]
    entries: float

    def to_input(self, y: Tensor) -> Tensor:
        """Return u = R y, (B, I, H, W); R is symmetric, so that this is its transpose, too."""
        count, channels, height, width = y.shape
        flat = y.transpose(0, 1).reshape(channels, -1) @ self.root
        return flat.reshape(channels, count, height, width).transpose(0, 1)


def coordinates_of(uses: Sequence[Use], signals: Sequence[Tensor], entries: Entries) -> Coordinates:
    """Return coordinates in which the equations of these uses are solved fast.

    signals: (B, O, h, w) each, ∂L/∂z, about right. entries: as in `refine_coupled`.
    """
    known = entries[0]
    shape = known.shape
    terms = [use.term(signal) for use, signal in zip(uses, signals, strict=True)]
    matrix = stacked_matrices(terms, shape)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    largest = max(values[-1].item(), 1e-300) ** 0.5
    outputs = [KNOWN * largest / _strength(use, known) for use in uses]
    rest = [
        (weight * share) ** 2
        for weight, share in ((w, _share(use, known)) for w, use in zip(outputs, uses, strict=True))
    ]
    entry = KNOWN * largest
    damping = sum(rest) + entry**2 * known.mean().item() + (SMALLEST * largest) ** 2
    inverse = (values.clamp_min(0) + damping).rsqrt()
    return Coordinates(largest * (vectors * inverse) @ vectors.T, largest, outputs, entry)


def _strength(use: Use, like: Tensor) -> float:
    """Return the largest singular value of a use's convolution."""

    def normal(v: Tensor) -> Tensor:
        moved = use.geometry.forward(v.reshape(like.shape), use.weight)
        return use.geometry.backward(moved, use.weight, like.shape).flatten()

    return largest_value(normal, like.flatten()) ** 0.5


def _share(use: Use, like: Tensor) -> float:
    """Return the root mean square of the singular values of what a use knows of its outputs."""
    random = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype)
    moved = use.geometry.forward(random.to(like), use.weight) * use.known
    return (moved.norm() / random.norm()).item()


@dataclass(frozen=True)
class _Part:
    """Holds the linear equations of one use: v → three parts, their transpose, and their target."""

    forward: Callable[[Tensor], list[Tensor]]
    transpose: Callable[[Sequence[Tensor]], Tensor]
    target: list[Tensor]
    #: Weight of what the outputs leave.
    of_outputs: float


def linearised(
    uses: Sequence[Use],
    u: Tensor,
    signals: Sequence[Tensor],
    entries: Entries,
    coordinates: Coordinates,
) -> System:
    """Return the equations of all uses for what is to be added to u (B, I, H, W), to first order.

    With ∂L/∂z = K − κ (w∗u − μ) the gradient is quadratic in u, and its derivative along v is
    ∂L/∂w(v, ∂L/∂z) − ∂L/∂w(u, κ w∗v). The known outputs, the batch's means at the outputs and the
    known entries are linear. signals: ∂L/∂z at u; with u = 0, the equations are those of the
    signals that are given, which then do not depend on u.
    """
    parts = [
        _part(use, u, signal, weight)
        for use, signal, weight in zip(uses, signals, coordinates.outputs, strict=True)
    ]
    known, value = entries
    square = coordinates.entries**2

    def normal(y: Tensor) -> Tensor:
        v = coordinates.to_input(y)
        found = square * known * v
        for part in parts:
            found = found + part.transpose(part.forward(v))
        return coordinates.to_input(found)

    def error(rows: Tensor, values: Sequence[Tensor]) -> Tensor:
        found, left = torch.zeros_like(u), list(values)
        sizes = [use.gradient[:, 0].numel() for use in uses]
        for use, part, row in zip(uses, parts, rows.split(sizes), strict=True):
            outputs, kernel = use.weight.shape[0], use.geometry.kernel
            of_gradient = row.reshape(outputs, *kernel, -1).permute(0, 3, 1, 2)
            of_gradient = of_gradient * per_row(use.trusted)
            of_outputs = torch.zeros_like(use.output)
            if bool(use.known.any()):
                of_outputs = part.of_outputs * left.pop(0)
            found = found + part.transpose([of_gradient, of_outputs, torch.zeros_like(use.trusted)])
        return coordinates.to_input(found)

    right = square * known * (value - u)
    for part in parts:
        right = right + part.transpose(part.target)
    return System(
        list(u.shape), normal, coordinates.to_input(right), error, equations_of(uses, entries),
        coordinates.to_input,
    )  # fmt: skip


def damped(system: System, coordinates: Coordinates, share: float) -> System:
    """Return a system with ‖u‖² to be small, too (Levenberg, 1944; Tikhonov).

    share: singular values, in shares of the gradients' largest, that get half the weight.
    """
    square = (share * coordinates.largest) ** 2

    def normal(y: Tensor) -> Tensor:
        return system.normal(y) + square * coordinates.to_input(coordinates.to_input(y))

    return replace(system, normal=normal)


def equations_of(uses: Sequence[Use], entries: Entries) -> int:
    """Return the number of equations: gradients, known outputs, means and known entries."""
    return int(entries[0].sum()) + sum(
        use.gradient.numel() + int(use.known.sum()) + use.coupled * len(use.weight) for use in uses
    )


def per_row(values: Tensor) -> Tensor:
    """Return (O,) numbers as (O, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _part(use: Use, u: Tensor, signal: Tensor, of_outputs: float) -> _Part:
    """Return the equations of one use for what is to be added to u: gradient, outputs, means."""
    bn, geometry, weight, shape = use.batchnorm, use.geometry, use.weight, u.shape
    signal = signal * per_channel(use.trusted)
    z = geometry.forward(u, weight)
    positions = z.numel() // z.shape[1]
    slope, mean, of_mean = torch.zeros_like(use.trusted), torch.zeros_like(use.trusted), 0.0
    if bn is not None and bn.coupled:  # the client says the mean at coupled outputs alone
        slope = bn.constants(use.arriving * use.mask)[1] * use.trusted
        mean, of_mean = bn.mean, of_outputs * positions**0.5
    of_gradient, slope = inverse_square(use.gradient) ** 0.5, per_channel(slope)

    def forward(v: Tensor) -> list[Tensor]:
        moved = geometry.forward(v, weight)
        gradient = geometry.weight_gradient(v, signal)
        gradient = gradient - geometry.weight_gradient(u, slope * moved)
        return [
            of_gradient * gradient,
            of_outputs * moved * use.known,
            of_mean * moved.mean((0, 2, 3)),
        ]

    def transpose(parts: Sequence[Tensor]) -> Tensor:
        gradient = of_gradient * parts[0]
        moved = of_outputs * parts[1] * use.known + of_mean * per_channel(parts[2]) / positions
        moved = moved - slope * geometry.forward(u, gradient)
        return geometry.backward(signal, gradient, shape) + geometry.backward(moved, weight, shape)

    left = use.gradient * per_row(use.trusted) - geometry.weight_gradient(u, signal)
    target = [
        of_gradient * left,
        of_outputs * (use.output - z) * use.known,
        of_mean * (mean - z.mean((0, 2, 3))),
    ]
    return _Part(forward, transpose, target, of_outputs)
