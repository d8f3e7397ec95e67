"""Inverts BatchNorm: a known affine map, whose backward pass couples the batch in train mode.

In train mode z̃ = (z − μ)/√(σ² + ε), y = γ z̃ + β, and the signal at the input z is (Ioffe & Szegedy,
2015) ∂L/∂z = γ/√(σ² + ε) (dy − mean(dy) − z̃ mean(dy z̃)), means over the N = B·h·w numbers of a
channel. They are those of the parameters' own gradients: mean(dy) = ∂L/∂β / N and
mean(dy z̃) = ∂L/∂γ / N. So with the batch's μ and σ² sent, ∂L/∂z = K − κ (z − μ) with known K and κ:
linear in z, which is linear in the convolution's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.convolution import Geometry, Term, preconditioner
from inversion.layerwise.least_squares import (
    Equations,
    conjugate_gradients,
    inverse_square,
    known_entries,
)


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


# Outputs from the two spaces of a gradient ---------------------------------------------------

#: Share of the largest singular value that a direction of a gradient must have.
DIRECTION = 3e-6
#: Numbers up to which the equations of all positions are solved together.
TOGETHER = 400


@dataclass(frozen=True)
class Outputs:
    """Holds a convolution's outputs and the signal there, recovered from its gradient."""

    #: (B, O, h, w), z without bias.
    z: Tensor
    #: (B, O, h, w), ∂L/∂z.
    signal: Tensor
    #: Norm of what the equations leave over, relative to their right sides.
    residual: float


def outputs_from_gradient(use: Use, mask: Tensor | None = None) -> Outputs:
    """Recover z and ∂L/∂z behind a coupled convolution whose channels are more than its positions.

    With G (O × I·k·k) the weight gradient, the columns of z − μ lie in W times the row space of G
    and those of ∂L/∂z = K − κ (z − μ) in the column space of G: as many linear equations per
    position as G has directions too few. Known outputs add theirs; where there are few numbers,
    Σ ∂L/∂z̃ z̃ = ∂L/∂γ and a zero sum of z − μ are added for all positions together. mask: in the
    place of the present one.
    """
    bn = use.batchnorm
    assert bn is not None
    assert bn.weight_gradient is not None
    dy = use.arriving * (use.mask if mask is None else mask)
    count, channels, height, width = dy.shape
    positions = count * height * width

    def flat(t: Tensor) -> Tensor:
        return t.permute(1, 0, 2, 3).reshape(channels, positions)

    constant, slope = bn.constants(dy)
    columns, rows = _spaces(use.gradient.reshape(channels, -1), min(positions - 1, channels))
    basis = use.weight.reshape(channels, -1) @ rows.T  # z − μ = basis @ coefficients
    outside = _without(columns, slope[:, None] * basis)
    target = _without(columns, flat(constant))
    size = outside.square().mean().sqrt().clamp_min(1e-300)
    span = basis.square().mean().sqrt().clamp_min(1e-300)
    known = flat(use.known if mask is None else use.known * mask)
    centred = flat(use.output) - bn.mean[:, None]
    if basis.shape[1] * positions <= TOGETHER:
        inverse_std = (bn.var + bn.eps).rsqrt()
        whole = _Together(outside / size, target / size, basis, span, known, centred)
        moment = (flat(dy)[:, :, None] * basis[:, None, :]).reshape(channels, -1)
        coefficients, residual = whole.solve(moment * inverse_std[:, None], bn.weight_gradient)
    else:
        coefficients, residual = _one_by_one(
            outside / size, target / size, basis / span, known, centred / span
        )
    centred = basis @ coefficients

    def back(t: Tensor) -> Tensor:
        return t.reshape(channels, count, height, width).permute(1, 0, 2, 3).contiguous()

    signal = flat(constant) - slope[:, None] * centred
    return Outputs(back(centred + bn.mean[:, None]), back(signal), residual)


def _spaces(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return bases of the column space (O, r) and the row space (r, n), r ≤ most."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    rank = min(most, int((values > DIRECTION * values[0]).sum()))
    columns = vectors[:, :rank]
    rows, _ = torch.linalg.qr(((columns.T @ matrix) / values[:rank, None]).T)
    return columns, rows.T


def _without(columns: Tensor, t: Tensor) -> Tensor:
    return t - columns @ (columns.T @ t)


def _least_squares(matrix: Tensor, target: Tensor) -> tuple[Tensor, float]:
    found = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
    return found, ((matrix @ found - target).norm() / target.norm()).item()


def _one_by_one(
    outside: Tensor, target: Tensor, basis: Tensor, known: Tensor, centred: Tensor
) -> tuple[Tensor, float]:
    """Solve every position's equations; return coefficients (r, N) and the mean residual."""
    columns, residuals = [], []
    for n in range(target.shape[1]):
        on = known[:, n] > 0
        matrix = torch.cat([outside, basis[on]])
        found, residual = _least_squares(matrix, torch.cat([target[:, n], centred[on, n]]))
        columns.append(found)
        residuals.append(residual)
    return torch.stack(columns, 1), sum(residuals) / len(residuals)


@dataclass(frozen=True)
class _Together:
    """Holds the equations of all positions, to be solved with those that join them."""

    outside: Tensor
    target: Tensor
    basis: Tensor
    span: Tensor
    known: Tensor
    centred: Tensor

    def solve(self, moment: Tensor, moment_target: Tensor) -> tuple[Tensor, float]:
        """Return coefficients (r, N) and the residual; moment (O, N·r) has a target of its own."""
        positions, rank = self.target.shape[1], self.basis.shape[1]
        size = moment.square().mean().sqrt().clamp_min(1e-300)
        zero_sum = torch.eye(rank, dtype=moment.dtype, device=moment.device).repeat(1, positions)
        rows = [torch.block_diag(*[self.outside] * positions), zero_sum, moment / size]
        right = [self.target.T.reshape(-1), moment.new_zeros(rank), moment_target / size]
        if bool(self.known.any()):
            of_positions = [self.known[:, n, None] * self.basis for n in range(positions)]
            rows.append(torch.block_diag(*of_positions) / self.span)
            right.append((self.known * self.centred).T.reshape(-1) / self.span)
        found, residual = _least_squares(torch.cat(rows), torch.cat(right))
        return found.reshape(positions, rank).T, residual


# The offset that outputs of one position leave open -------------------------------------------


def common_offset(u: Tensor, uses: Sequence[Use]) -> Tensor:
    """Fix what Σ ∂L/∂z = 0 leaves open where outputs have one position: the images' common part.

    u: (B, I, H, W), right up to a number per channel and position. With ReLU, u = u − min + e with
    e ≥ 0; the batch's mean at the convolutions behind says W∗(mean(u) + e) = μ: non-negative least
    squares (Lawson & Hanson, 1974).
    """
    from scipy.optimize import nnls

    u = u - u.amin(0, keepdim=True)
    shape, mean = u.shape[1:], u.mean(0, keepdim=True)
    unit = torch.eye(shape.numel(), dtype=u.dtype, device=u.device).reshape(-1, *shape)
    matrices, targets = [], []
    for use in uses:
        assert use.batchnorm is not None
        matrices.append(use.geometry.forward(unit, use.weight).mean((2, 3)).T)
        present = use.geometry.forward(mean, use.weight).mean((2, 3))[0]
        targets.append(use.batchnorm.mean - present)
    matrix, target = torch.cat(matrices).cpu().numpy(), torch.cat(targets).cpu().numpy()
    found, _ = nnls(matrix, target, maxiter=20 * shape.numel())
    return u + torch.from_numpy(found).to(u).reshape(1, *shape)


# All equations together, to second order -------------------------------------------------------


#: Relative change of the tensor at which Gauss–Newton has arrived.
SETTLED = 1e-8
#: How well each round solves its linear equations: as well as the next residual will be, which
#: falls by its square, within limits.
LOOSEST, SHARPENING, TIGHTEST = 1e-2, 0.1, 1e-7


def refine_coupled(
    uses: Sequence[Use],
    u: Tensor,
    entries: tuple[Tensor, Tensor] | None,
    *,
    rounds: int = 8,
    steps: int = 150,
) -> Tensor:
    """Improve u (B, I, H, W) on all equations of its coupled convolutions by Gauss–Newton.

    The gradient ∂L/∂w(u, K − κ (w∗u − μ)) = G is quadratic in u; the known outputs, the batch's
    mean at the outputs and the known entries (0/1 and values, of u's shape) are linear. Each round
    solves the linearised equations by conjugate gradients.
    """
    history = [_worst(uses, u)]
    for _ in range(rounds):
        equations = [_linearised(use, u) for use in uses]
        if entries is not None and bool(entries[0].any()):
            known, value = entries
            whole = known_entries(known, value)
            moved = whole.target - whole.forward(u)
            equations.append(Equations(whole.forward, whole.transpose, moved, whole.weight))
        terms = [use.term(use.signal(u)) for use in uses]
        tolerance = min(LOOSEST, max(TIGHTEST, SHARPENING * history[-1]))
        step = conjugate_gradients(
            equations, torch.zeros_like(u), steps, tolerance, preconditioner(terms, u.shape)
        )
        u = u + step
        history.append(_worst(uses, u))
        if step.norm() < SETTLED * u.norm() or history[-1] > 0.9 * history[-2]:
            break
    return u


def _worst(uses: Sequence[Use], u: Tensor) -> float:
    return max(use.residual(u) for use in uses)


def _linearised(use: Use, u: Tensor) -> Equations:
    """Return the equations of a coupled convolution for what is to be added to u.

    They are one vector (the gradient's, the means', the known outputs'), each part divided by the
    norm of its right side, so that one pass of the convolution serves all three.
    """
    bn, geometry, weight, shape = use.batchnorm, use.geometry, use.weight, u.shape
    assert bn is not None
    trusted = per_channel(use.trusted)
    _, slope = bn.constants(use.arriving * use.mask)
    slope, signal = per_channel(slope) * trusted, use.signal(u) * trusted
    z = geometry.forward(u, weight)
    positions = z.numel() // z.shape[1]
    of_gradient, of_mean, of_outputs = (
        inverse_square(t) ** 0.5 for t in (use.gradient, bn.mean, use.output * use.known)
    )
    sizes = [use.gradient.numel(), len(bn.mean), z.numel()]

    def stacked(gradient: Tensor, mean: Tensor, output: Tensor) -> Tensor:
        parts = (of_gradient * gradient, of_mean * mean, of_outputs * output)
        return torch.cat([part.flatten() for part in parts])

    def forward(v: Tensor) -> Tensor:
        moved = geometry.forward(v, weight)
        gradient = geometry.weight_gradient(v, signal)
        gradient = gradient - geometry.weight_gradient(u, slope * moved)
        return stacked(gradient, moved.mean((0, 2, 3)), moved * use.known)

    def transpose(r: Tensor) -> Tensor:
        gradient, mean, output = r.split(sizes)
        gradient = of_gradient * gradient.reshape(weight.shape)
        moved = of_outputs * output.reshape(z.shape) * use.known
        moved = moved + of_mean * per_channel(mean) / positions
        moved = moved - slope * geometry.forward(u, gradient)
        return geometry.backward(signal, gradient, shape) + geometry.backward(moved, weight, shape)

    target = stacked(use.left_over(u), bn.mean - z.mean((0, 2, 3)), (use.output - z) * use.known)
    return Equations(forward, transpose, target, 1.0)
