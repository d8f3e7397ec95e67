"""Recovers photographs from the output of a network's stem: convolution, BatchNorm, ReLU, pooling.

The method is expectation propagation (Minka, 2001) with one Gaussian per image over its pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from inversion.layerwise import block_tridiagonal
from inversion.layerwise.grid_gaussian import (
    Convolution,
    Grid,
    add_convolution,
    add_differences,
    add_pixels,
    convolution_variance,
    difference_variance,
    differences,
    flatten,
    grid_for,
    pixel_variance,
    unflatten,
    stencil_shape,
)
from inversion.layerwise.moments import (
    Sites,
    between,
    cavity,
    damped,
    matching_sites,
    maximum_moments,
    no_sites,
)
from inversion.layerwise.windows import Pooling, Windows, read_windows

ST = (((0,0,-1.),(0,1,1.)),((0,0,-1.),(1,0,1.)),((0,0,-1.),(1,1,1.)),((0,0,-1.),(1,-1,1.)))
ST2 = ST + (((0,0,1.),(0,1,-2.),(0,2,1.)),((0,0,1.),(1,0,-2.),(2,0,1.)))
OPT = dict(st=ST, sw=(1.,1.,.5,.5,.3,.3), damp=0.6, width=0.01, alpha=0.7, s=(.011,.0045,.0045), rms=(.18,.06,.03), first=.35, sp=1, diag=.5, level=.2, cb=None)
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


def colours(C, like):
    if C != 3: return torch.eye(C, dtype=like.dtype, device=like.device)
    K = like.new_tensor(COLOURS)
    return K / K.norm(dim=1, keepdim=True)


def stem_posterior(pooled, weight, scale, shift, image_shape, *, conv, pool, low, high, error, rounds=8):
    out = [_one(pooled[i:i+1], weight, scale, shift, image_shape, conv, pool, low, high, error, rounds, i) for i in range(len(pooled))]
    return torch.cat([o[0] for o in out]), torch.cat([o[1] for o in out]), [o[2] for o in out]

def _one(pooled, weight, scale, shift, image_shape, conv, pool, low, high, error, rounds, index):
    C, H, W = image_shape
    span = (high - low).expand(C, 1, 1)
    base = F.conv2d(low.expand(1, C, H, W), weight, stride=conv.stride, padding=conv.padding)
    offset = base * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    w = weight * scale.view(-1, 1, 1, 1) * span
    grid = grid_for(image_shape, weight.shape[-1])
    tol = max(2 * error, 2e-6) * pooled.amax((1, 2, 3), keepdim=True)
    win = read_windows(pooled, pool, offset.shape[-2:], tol)
    bound = win.bound - offset
    rms = pooled.square().mean((0, 2, 3)).sqrt()
    overall = pooled.square().mean().sqrt()
    sd = (OPT["width"] * torch.maximum(rms, .1 * overall)).clamp_min(3 * error * pooled.max()).clamp_min(1e-9).view(1, -1, 1, 1)
    nv = (sd * sd).expand_as(bound)
    K = colours(C, w); s = w.new_tensor(OPT["s"])[:C].view(1, -1, 1, 1); r0 = w.new_tensor(OPT["rms"])[:C].view(1, -1, 1, 1)
    zs = no_sites(bound); cnt = torch.bincount(win.group[win.group >= 0], minlength=win.num_groups)
    single = (win.group >= 0) & (cnt[win.group.clamp_min(0)] == 1)
    zs = Sites(torch.where(single, 1 / nv, 0), torch.where(single, bound / nv, 0))
    ps = no_sites(w.new_zeros(1, C, H, W))
    prec = [OPT["first"] / r0.square() * swt * w.new_ones(1, C, *stencil_shape(grid, st)) for st, swt in zip(OPT['st'], OPT['sw'])]
    for it in range(rounds):
        M = block_tridiagonal.zeros(grid.sizes(), 1, w)
        add_convolution(M, grid, w, conv, zs.precision)
        for st, q in zip(OPT['st'], prec): add_differences(M, grid, K, st, q)
        add_pixels(M, grid, ps.precision + OPT["level"])
        fac = block_tridiagonal.factorise(M)
        full = conv2d_input((1, C, H, W), w, zs.shift, stride=conv.stride, padding=conv.padding)
        h = full + ps.shift + OPT["level"] * .45
        x = unflatten(block_tridiagonal.solve(fac, flatten(h)), grid)
        S = block_tridiagonal.selected_inverse(fac)
        vz = convolution_variance(S, grid, w, conv, bound.shape[-2:]); vp = pixel_variance(S, grid)
        if it >= OPT["sp"]:
            prec = [OPT["alpha"] * swt / (s.square() + differences(x, grid, K, st).square() + difference_variance(S, grid, K, st).clamp_min(0)) for st, swt in zip(OPT['st'], OPT['sw'])]
        damp = OPT["damp"]
        mc, vc = cavity(x, vp, ps); m, v = between(mc, vc, 0., 1.)
        ps = damped(ps, matching_sites(m, v, mc, vc, w.new_tensor(1e6)), damp)
        z = F.conv2d(x, w, stride=conv.stride, padding=conv.padding)
        mc, vc = cavity(z, vz, zs); p, m, v = maximum_moments(mc, vc, bound, win.group, win.num_groups, nv)
        zs = damped(zs, matching_sites(m, v, mc, vc, 1 / nv), damp)
        if OPT["cb"]: OPT["cb"](index, it, x, vp, p, win)
    cert = (torch.zeros(win.num_groups, dtype=w.dtype).scatter_reduce(0, win.group[win.group >= 0], p[win.group >= 0], "amax") > .99).sum() / (cnt > 0).sum()
    return (low + span * x.clamp(0, 1)), vp.mean((1, 2, 3)).sqrt(), cert
