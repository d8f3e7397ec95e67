"""Solves all equations about the input of coupled convolutions together, to second order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inversion.layerwise.batchnorm import per_channel
from inversion.layerwise.convolution import preconditioner
from inversion.layerwise.least_squares import (
    Equations,
    conjugate_gradients,
    inverse_square,
    known_entries,
)
from inversion.layerwise.use import Use

#: Rounds of Gauss–Newton, and steps of conjugate gradients in each, at most.
ROUNDS, STEPS = 8, 150
#: Relative change of the tensor at which Gauss–Newton has arrived.
SETTLED = 1e-8
#: How well each round solves its linear equations: as well as the next residual will be, which
#: falls by its square, within limits.
LOOSEST, SHARPENING, TIGHTEST = 1e-2, 0.1, 1e-7


def refine_coupled(
    uses: Sequence[Use],
    u: Tensor,
    entries: tuple[Tensor, Tensor],
) -> Tensor:
    """Improve u (B, I, H, W) on all equations of its coupled convolutions by Gauss–Newton.

    The gradient ∂L/∂w(u, K − κ (w∗u − μ)) = G is quadratic in u; the known outputs, the batch's
    mean at the outputs and the known entries (0/1 and values, of u's shape) are linear. Each round
    solves the linearised equations by conjugate gradients.
    """
    history = [_worst(uses, u)]
    for _ in range(ROUNDS):
        equations = [_linearised(use, u) for use in uses]
        if bool(entries[0].any()):
            whole = known_entries(*entries)
            moved = whole.target - whole.forward(u)
            equations.append(Equations(whole.forward, whole.transpose, moved, whole.weight))
        terms = [use.term(use.signal(u)) for use in uses]
        tolerance = min(LOOSEST, max(TIGHTEST, SHARPENING * history[-1]))
        step = conjugate_gradients(
            equations, torch.zeros_like(u), STEPS, tolerance, preconditioner(terms, u.shape)
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
    trusted = per_channel(use.trusted)
    zeros = weight.new_zeros(len(weight))
    mean, slope = zeros, zeros  # the client says the mean at coupled outputs alone
    if bn is not None and use.coupled:
        mean, slope = bn.mean, bn.constants(use.arriving * use.mask)[1]
    slope, signal = per_channel(slope) * trusted, use.signal(u) * trusted
    z = geometry.forward(u, weight)
    positions = z.numel() // z.shape[1]
    of_gradient, of_mean, of_outputs = (
        inverse_square(t) ** 0.5 for t in (use.gradient, mean, use.output * use.known)
    )
    sizes = [use.gradient.numel(), len(mean), z.numel()]

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

    target = stacked(use.left_over(u), mean - z.mean((0, 2, 3)), (use.output - z) * use.known)
    return Equations(forward, transpose, target, 1.0)
