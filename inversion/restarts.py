"""Restarts: the same attack from several random starts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from inversion.optimise import Loop, Reconstruction, reconstruct


def initial_images(
    seed: int, batch_size: int, image_shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """The random start of a seed: (B, C, H, W), N(0, 1) in normalised units, on the CPU.

    It depends on the seed and the shape alone, so it is the same on every device.
    """
    generator = Generator().manual_seed(seed)
    return torch.randn(batch_size, *image_shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Restarts:
    """Outcome of several seeds: one Reconstruction each, and the index of the chosen one."""

    runs: tuple[Reconstruction, ...]
    chosen: int

    @property
    def best(self) -> Reconstruction:
        """The chosen reconstruction."""
        return self.runs[self.chosen]


def best(
    pixel_gradient: Callable,
    x_seeds: Sequence[Tensor],
    loop: Loop,
    *,
    generators: Sequence[Generator],
    on_step: Callable[[int, int, object, float], bool | None],
) -> Restarts:
    """Run every start on its own and choose the one with the lowest gradient loss.

    x_seeds: S starts (B, C, H, W), or (S, B, C, H, W). generators: one a seed, for the Langevin
    noise. on_step(index, step, losses, rate): as in `reconstruct`, with the index of the seed;
    a true answer ends this seed and all later ones.
    """
    runs = []
    for index, (x_init, generator) in enumerate(zip(x_seeds, generators, strict=True)):

        def report(step, losses, rate, index=index):
            return on_step(index, step, losses, rate)

        run = reconstruct(pixel_gradient, x_init, loop, generator=generator, on_step=report)
        runs.append(run)
        if run.stopped == "interrupted":
            break

    def gradient_loss(index):
        loss = runs[index].losses.gradient
        return math.inf if math.isnan(loss) else loss

    return Restarts(tuple(runs), min(range(len(runs)), key=gradient_loss))


#: How several seeds become one reconstruction: name → strategy.
STRATEGIES = {"best": best}
