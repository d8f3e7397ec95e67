"""Sets up all equations about the input of coupled convolutions, to first order, as a system.

It is solved in coordinates in which no direction is slow: the gradients' equations and the known
outputs then weigh alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.convolution import Geometry, stacked_matrices
from inversion.layerwise.least_squares import fast_in_single, inverse_square, largest_value
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
        return _in_coordinates(self.root, y)


def _in_coordinates(root: Tensor, y: Tensor) -> Tensor:
    count, channels, height, width = y.shape
    flat = y.transpose(0, 1).reshape(channels, -1) @ root
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
    """Holds the linear equations of one use about v, with weights: three parts, all of one type."""

    geometry: Geometry
    #: (O, I, k, k).
    weight: Tensor
    #: (B, I, H, W), the tensor at which they are linearised.
    u: Tensor
    #: (B, O, h, w) ∂L/∂z and (1, O, 1, 1) κ, divided by the norm of the gradient.
    signal: Tensor
    slope: Tensor
    #: (B, O, h, w) of 0 and 1: where z is known.
    known: Tensor
    #: Weight of what the outputs leave, and of what the means do.
    of_outputs: float
    of_mean: float

    def forward(self, v: Tensor) -> list[Tensor]:
        """Return the changes of the gradient, of the known outputs and of the means with v."""
        geometry = self.geometry
        moved = geometry.forward(v, self.weight)
        gradient = geometry.weight_gradient(v, self.signal)
        return [
            gradient - geometry.weight_gradient(self.u, self.slope * moved),
            self.of_outputs * moved * self.known,
            self.of_mean * moved.mean((0, 2, 3)),
        ]

    def transpose(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the transpose of `forward`, (B, I, H, W)."""
        geometry, shape, gradient = self.geometry, self.u.shape, parts[0]
        positions = self.known[:, 0].numel()
        moved = self.of_outputs * parts[1] * self.known
        moved = moved + self.of_mean * per_channel(parts[2]) / positions
        moved = moved - self.slope * geometry.forward(self.u, gradient)
        found = geometry.backward(self.signal, gradient, shape)
        return found + geometry.backward(moved, self.weight, shape)

    def single(self) -> "_Part":
        """Return the same in float32."""
        names = ("weight", "u", "signal", "slope", "known")
        return replace(self, **{name: getattr(self, name).float() for name in names})


@dataclass(frozen=True)
class _Normal:
    """Maps y to N y, all of one type."""

    parts: Sequence[_Part]
    #: (B·H·W, B·H·W), R.
    root: Tensor
    #: (B, I, H, W) of 0 and 1: the entries that are known, and the square of their weight.
    known: Tensor
    entry: float
    #: Weight of ‖u‖².
    damping: float = 0.0

    def __call__(self, y: Tensor) -> Tensor:
        """Return N y, (B, I, H, W)."""
        v = _in_coordinates(self.root, y)
        found = (self.entry * self.known + self.damping) * v
        for part in self.parts:
            found = found + part.transpose(part.forward(v))
        return _in_coordinates(self.root, found)

    def single(self) -> "_Normal":
        """Return the same in float32."""
        parts = [part.single() for part in self.parts]
        return replace(self, parts=parts, root=self.root.float(), known=self.known.float())


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
    normal = _Normal(parts, coordinates.root, known, square)

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
    for use, part in zip(uses, parts, strict=True):
        right = right + part.transpose(_target(use, part))
    return System(
        list(u.shape), normal, coordinates.to_input(right), error, equations_of(uses, entries),
        coordinates.to_input, normal.single() if fast_in_single(u) else None,
    )  # fmt: skip


def damped(system: System, coordinates: Coordinates, share: float) -> System:
    """Return a system with ‖u‖² to be small, too (Levenberg, 1944; Tikhonov).

    share: singular values, in shares of the gradients' largest, that get half the weight.
    """
    square = (share * coordinates.largest) ** 2
    normal, rough = (
        replace(of, damping=of.damping + square) if isinstance(of, _Normal) else None
        for of in (system.normal, system.rough)
    )
    assert normal is not None  # `linearised` made the system
    return replace(system, normal=normal, rough=rough)


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
    bn, slope, of_mean = use.batchnorm, torch.zeros_like(use.trusted), 0.0
    if bn is not None and bn.coupled:  # the client says the mean at coupled outputs alone
        slope = bn.constants(use.arriving * use.mask)[1] * use.trusted
        of_mean = of_outputs * use.known[:, 0].numel() ** 0.5
    of_gradient = inverse_square(use.gradient) ** 0.5
    return _Part(
        use.geometry, use.weight, u, of_gradient * signal * per_channel(use.trusted),
        of_gradient * per_channel(slope), use.known, of_outputs, of_mean,
    )  # fmt: skip


def _target(use: Use, part: _Part) -> list[Tensor]:
    """Return what the three parts of a use's equations are to become by what is added to u."""
    z = use.geometry.forward(part.u, use.weight)
    gradient = inverse_square(use.gradient) ** 0.5 * use.gradient * per_row(use.trusted)
    mean = part.of_mean * z.new_ones(z.shape[1])
    if use.batchnorm is not None:
        mean = part.of_mean * (use.batchnorm.mean - z.mean((0, 2, 3)))
    return [
        gradient - use.geometry.weight_gradient(part.u, part.signal),
        part.of_outputs * (use.output - z) * use.known,
        mean,
    ]
