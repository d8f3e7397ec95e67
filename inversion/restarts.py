"""Restarts: random starts, their noise, and the exchange of runs between processes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from inversion.objective import Losses
from inversion.optimise import Reconstruction
from utils.shard import Shard
from utils.streams import stream


def initial_images(
    seed: int, batch_size: int, image_shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """The random start of a seed: (B, C, H, W), N(0, 1) in normalised units, on the CPU.

    It depends on the seed and the shape alone, so it is the same on every device.
    """
    generator = Generator().manual_seed(seed)
    return torch.randn(batch_size, *image_shape, generator=generator).to(dtype)


def noise_generator(seed: int, device: torch.device) -> Generator:
    """The source of a seed's Langevin noise, on `device`: another stream than its start, and than
    the noise of a client with the same seed."""
    return stream("Langevin noise", seed, device)


def exchange(
    runs: Sequence[Reconstruction | None], x_seeds: Sequence[Tensor], seeds: Shard
) -> list[Reconstruction]:
    """All seeds' runs on every process, each of which has run its own of them in turn.

    runs: one a seed, None where another process ran it. One that nobody started, after an
    interruption, is its start `x_seeds[index]` with NaN losses. Optimisers' states stay where
    they are.
    """
    owned = [i for i, run in enumerate(runs) if run is not None and seeds.owns(i)]
    mine = {i: replace(runs[i], x=None, optimiser_state=None) for i in owned}
    found = {i: run for part in seeds.objects(mine) for i, run in part.items()}
    whole = []
    for index, (run, x_init) in enumerate(zip(runs, x_seeds, strict=True)):
        if index not in found:
            whole.append(Reconstruction(x_init, Losses(math.nan, math.nan, {}), 0, "interrupted"))
            continue
        x = run.x if seeds.owns(index) else torch.zeros_like(x_init)
        x = seeds.sum(x.to(seeds.device)).to(x_init.device)  # one seed at a time
        whole.append(run if seeds.owns(index) else replace(found[index], x=x))
    return whole
