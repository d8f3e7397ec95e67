"""Matches activations that say too little of the image, with a preference for smooth images.

Where a pooling has lost pixels, many images have nearly the same activations behind it, and
descent on the pixels finds a rough one. Three things lead to a smooth one: steps on the image's
frequencies, large for low ones as photographs have them; a total variation that wants the edges of
all colours at the same place; and a distance in which directions of the activations that hardly
vary among photographs count as much as those that vary most.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.layerwise.front import Front
from inversion.layerwise.matching import Matched, Problem, Whitening, nearer
from inversion.layerwise.stages import take_steps
from utils.journal import FORGETFUL, Journal

#: Decay rates of Adam's averages.
_BETAS = (0.9, 0.99)
#: Added to each eigenvalue of a covariance of channels, in shares of their mean.
_RIDGE = 0.05
#: Weight, beside the squared relative distance, of the mean square by which pixels leave the box.
_OUTSIDE = 1.0
#: Squared difference of pixels, in [0, 1]², below which the total variation is a square.
_ROUNDED = 1e-7
#: Brightness and two differences of colours, orthonormal; a colour counts twice.
_BRIGHTNESS = (3**-0.5, 3**-0.5, 3**-0.5)
_COLOURS = ((2 * 2**-0.5, -2 * 2**-0.5, 0.0), (2 * 6**-0.5, 2 * 6**-0.5, -4 * 6**-0.5))


@dataclass(frozen=True)
class SmoothMatching:
    """Says how smooth images are matched to activations."""

    #: Steps of Adam.
    steps: int
    #: First rate, which falls to 0 as a cosine: the root mean square of a step, per pixel.
    rate: float
    #: Weight of the total variation of pixels in [0, 1], which falls to 0 as a parabola.
    total_variation: float


@torch.no_grad()
def whitening(front: Front, images: Tensor) -> dict[str, Whitening]:
    """Return how the maps of a front vary among images (M, C, H, W), normalised, by name.

    Over images and positions alike; each eigenvalue of the covariance grows by 0.05 of their mean.
    Activations (B, d), which have no positions to learn from, are left out. The front runs in
    the type of `images`, the rest is float64.
    """
    count: dict[str, int] = {}
    sums: dict[str, Tensor] = {}
    for image in images.split(1):
        for name, value in front(image).items():
            if value.dim() != 4:
                continue
            rows = F.pad(value[0].double().flatten(1).T, (0, 1), value=1.0)  # ones, for the sums
            count[name] = count.get(name, 0) + len(rows)
            sums[name] = rows.T @ rows + sums.get(name, 0.0)
    found = {}
    for name, total in sums.items():
        mean = total[-1, :-1] / count[name]
        values, vectors = torch.linalg.eigh(total[:-1, :-1] / count[name] - mean.outer(mean))
        spread = values.clamp_min(0) + _RIDGE * values.mean().clamp_min(1e-300)
        found[name] = Whitening(mean, (vectors * spread.rsqrt()) @ vectors.T)
    return found


def match_smoothly(
    front: Front,
    targets: Mapping[str, Tensor],
    low: Tensor,
    high: Tensor,
    start: Tensor,
    whitened: Mapping[str, Whitening],
    how: SmoothMatching,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    journal: Journal = FORGETFUL,
) -> Matched:
    """Find smooth images (B, C, H, W) whose tensors `front` are near the `targets`.

    Adam in float32 on the Fourier coefficients of the images, each in units of 1/frequency (as
    Olah, Mordvintsev & Schubert, 2017, for feature visualisation), minimises per image

        Σ over `targets` of ‖W (front(x) − t)‖² / ‖W (t − mean)‖² + weight · TV(x),

    the sum being that of `Problem` with `whitened`. TV is the mean over pixels of √(Σ over colours
    of |∇|²), of brightness and twice two differences of colours. Pixels outside of the box of `low`
    and `high` (C, 1, 1) are penalised, and clamped in the end.

    targets: name → (B, …), names of the front. should_stop: asked between steps; true ends the
    matching with what there is, of every image no worse than its start. journal: where the matching
    is saved on its way, and from where a killed one goes on.

    Raises ValueError for a target that the front does not compute, StateError where what the
    journal recalls does not fit.
    """
    problem = Problem(front, targets)
    distance = Problem(front, targets, whitened).losses
    box = low.to(start.device).float(), high.to(start.device).float()
    sides = (start.shape[-2], start.shape[-1])
    scale = _amplitudes(sides).to(start.device)
    begun = start.detach().clamp(*(bound.to(start) for bound in box)).double()
    coefficients = torch.fft.rfft2(begun.float(), norm="ortho") / scale
    z = torch.view_as_real(coefficients).clone().requires_grad_()
    optimiser = torch.optim.Adam([z], lr=how.rate, betas=_BETAS)

    def image() -> Tensor:
        return torch.fft.irfft2(torch.view_as_complex(z) * scale, s=sides, norm="ortho")

    def take(step: int) -> None:
        progress = step / how.steps
        optimiser.param_groups[0]["lr"] = how.rate * (1 + math.cos(math.pi * progress)) / 2
        x = image()
        outside = (x - x.clamp(*box)).square().flatten(1).mean(1)
        rough = total_variation((x - box[0]) / (box[1] - box[0]))
        total = distance(x) + _OUTSIDE * outside + how.total_variation * (1 - progress) ** 2 * rough
        (z.grad,) = torch.autograd.grad(total.sum(), z)
        optimiser.step()

    whole = take_steps(optimiser, how.steps, take, should_stop, journal, "smooth")
    with torch.no_grad():
        x = image().clamp(*box).double()
        if not whole:  # steps that lead to a better image may first lead away
            x = nearer(problem, begun, x)
        return Matched(x, problem.losses(x).sqrt())


def total_variation(x: Tensor) -> Tensor:
    """Return the total variation of images (B, C, H, W) in [0, 1], per pixel: (B,).

    The root of the summed squared differences to the right and lower neighbours, over brightness
    and twice the differences of colours where there are three channels, and over all channels
    otherwise: so that edges of all colours lie together (Blomgren & Chan, 1998).
    """
    if x.shape[1] == 3:
        mixed = torch.tensor([_BRIGHTNESS, *_COLOURS], dtype=x.dtype, device=x.device)
        x = torch.einsum("ij,njhw->nihw", mixed, x)
    right, lower = F.pad(x.diff(dim=-1), (0, 1)), F.pad(x.diff(dim=-2), (0, 0, 0, 1))
    return ((right.square() + lower.square()).sum(1) + _ROUNDED).sqrt().flatten(1).mean(1)


def _amplitudes(sides: tuple[int, int]) -> Tensor:
    """Return 1/frequency of the coefficients of a real image (H, W // 2 + 1), root mean square 1.

    The mean counts as the lowest frequency.
    """
    rows, columns = torch.fft.fftfreq(sides[0])[:, None], torch.fft.rfftfreq(sides[1])
    amplitudes = 1 / torch.hypot(rows, columns).clamp_min(1 / max(sides))
    return amplitudes / amplitudes.square().mean().sqrt()
