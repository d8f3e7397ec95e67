"""Batch normalisation with its first and second derivatives in closed form.

With x̂ = (z − μ) s, s = (σ² + ε)^-½ and N values per channel, BatchNorm is y = γ x̂ + β, and its
first derivative is ∂L/∂z = γ s (gy − m₁ − m₂ x̂) with gy = ∂L/∂y. By batch statistics m₁ = mean(gy)
and m₂ = mean(gy x̂) (Ioffe & Szegedy, 2015); by fixed ones both are 0; by forced ones
(models/forced.py) they are constants, the client's (∂L/∂β)/N and (∂L/∂γ)/N. torch composes its
second derivative of some sixty operations. Here it is nine, each with a kernel that torch has for
the first derivative.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten.native_batch_norm
_backward = torch.ops.aten.native_batch_norm_backward
#: What `_backward` is asked for: the derivatives by scale and shift, or by the input too.
_SUMS, _ALL = [False, True, True], [True, True, True]


@dataclass(frozen=True)
class Statistics:
    """Says by what a layer normalises, and how its first derivative looks."""

    eps: float
    #: Mean and variance, (C,) each; None for those of the batch.
    fixed: tuple[Tensor, Tensor] | None = None
    #: Constants m₁ and m₂ of the first derivative, (C,) each, where statistics are forced.
    forced: tuple[Tensor, Tensor] | None = None
    #: Whether the batch's moments are wanted where the layer normalises by fixed ones.
    moments: bool = False


@dataclass
class Pass:
    """Says which derivative is being taken."""

    #: Whether it is the loss's derivative, of which the gradient is made; forced statistics change
    #: that one alone. Afterwards it is the objective's.
    of_loss: bool = True


def normalise(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, how: Statistics, taken: Pass
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return γ x̂ + β, and mean and biased variance of the batch, (C,) each.

    z: (B, C, ...). weight, bias: γ and β, (C,) each; None for 1 and 0. The first result has
    derivatives by all three, and those have derivatives by `z`, not by γ.
    The moments are differentiable once, and None where nothing asks for them. taken: which
    derivative a backward pass takes, asked at that time.
    """
    return _Normalise.apply(z.contiguous(), weight, bias, how, taken)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight, bias, how: Statistics, taken: Pass):
        ctx.set_materialize_grads(False)
        batch: tuple[Tensor, ...] = ()
        if how.fixed is None or how.moments:
            mean, unbiased = z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1])
            y = _forward(z, weight, bias, mean, unbiased, True, 1.0, how.eps)[0]
            count = z.numel() // z.shape[1]
            # the variance of one value is 0, not 0/0
            var = unbiased * ((count - 1) / count) if count > 1 else torch.zeros_like(mean)
            batch = (mean, var)
        if how.fixed is not None:
            y = _forward(z, weight, bias, *how.fixed, False, 0.0, how.eps)[0]
        ctx.how, ctx.taken, ctx.has = how, taken, (weight is not None, bias is not None)
        ctx.save_for_backward(z, weight, *(how.fixed or batch), *batch)
        return (y, *(batch or (None, None)))

    @staticmethod
    def backward(ctx: Any, gy, d_mean, d_var):
        z, weight, mean, var, *batch = ctx.saved_tensors
        d_z = d_weight = d_bias = None
        if gy is not None:
            forced = ctx.how.forced if ctx.taken.of_loss else None
            how = replace(ctx.how, forced=forced)
            d_z, d_weight, d_bias = _Derivative.apply(gy, z, weight, mean, var, how)
        if d_mean is not None or d_var is not None:
            count = z.numel() // z.shape[1]
            zero = torch.zeros_like(mean)
            slope = zero if d_var is None else d_var * (2 / count)
            shift = (zero if d_mean is None else d_mean / count) - slope * batch[0]
            by_moments = _affine(z, slope, shift)
            d_z = by_moments if d_z is None else d_z + by_moments
        has_weight, has_bias = ctx.has
        return d_z, d_weight if has_weight else None, d_bias if has_bias else None, None, None


class _Derivative(torch.autograd.Function):
    """The first derivative, by the input, scale and shift; its own derivative is in closed form."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, z: Tensor, weight, mean, var, how: Statistics):
        ctx.set_materialize_grads(False)
        gy = gy.contiguous()
        d_z, d_weight, d_bias = _first(gy, z, weight, mean, var, how)
        ctx.how = how
        ctx.save_for_backward(gy, z, weight, mean, var, d_weight, d_bias)
        return d_z, d_weight, d_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h, v_weight, v_bias):
        gy, z, weight, mean, var, d_weight, d_bias = ctx.saved_tensors
        how = ctx.how
        zero = torch.zeros_like(mean)
        v_weight = zero if v_weight is None else v_weight
        v_bias = zero if v_bias is None else v_bias
        # ⟨V, ·⟩ for scale and shift: Σ gy (v_γ x̂ + v_β)
        by_gy = _forward(z, v_weight, v_bias, mean, var, False, 0.0, how.eps)[0]
        scale = (var + how.eps).rsqrt()
        h = torch.zeros_like(gy) if h is None else h.contiguous()
        product = scale if weight is None else weight * scale
        if how.fixed is not None:
            by_gy += _affine(h, product)
            by_z = _affine(gy, v_weight * scale)
            if how.forced is not None:
                by_z -= _affine(h, product * how.forced[1] * scale)
            return by_gy, by_z, None, None, None, None
        count = z.numel() // z.shape[1]
        own, h_normed, h_sum = _backward(h, z, weight, None, None, mean, scale, True, how.eps, _ALL)
        by_gy += own
        h_gy = _backward(h, gy, None, None, None, zero, torch.ones_like(mean), True, 0.0, _SUMS)[1]
        m1, m2 = d_bias / count, d_weight / count
        q1, q2 = h_sum / count, h_normed / count
        # ⟨h, ∂L/∂z⟩ depends on z by x̂ and by s; c is its derivative by x̂
        inner = product * (h_gy / count - m1 * q1 - m2 * q2)
        of_gy, of_h = v_weight - product * q2, product * m2
        c_mean, c_normed = of_gy * m1 - of_h * q1, of_gy * m2 - of_h * q2
        by_z = _affine(gy, scale * of_gy, -scale * c_mean)
        by_z -= _affine(h, scale * of_h)
        by_z -= _forward(z, scale * (c_normed + inner), None, mean, var, False, 0.0, how.eps)[0]
        return by_gy, by_z, None, None, None, None


def _first(gy: Tensor, z: Tensor, weight, mean: Tensor, var: Tensor, how: Statistics):
    """Return ∂L/∂z, ∂L/∂γ and ∂L/∂β."""
    scale = (var + how.eps).rsqrt()
    ones = torch.ones_like(mean) if weight is None else weight
    d_z, d_weight, d_bias = _backward(
        gy, z, ones, mean, var, mean, scale, how.fixed is None, how.eps, _ALL
    )
    if how.forced is not None:
        product = ones * scale
        m1, m2 = how.forced
        d_z -= _forward(z, product * m2, product * m1, mean, var, False, 0.0, how.eps)[0]
    return d_z, d_weight, d_bias


def _affine(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return scale · x + shift, per channel."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return _forward(x, scale, shift, zero, one, False, 0.0, 0.0)[0]
