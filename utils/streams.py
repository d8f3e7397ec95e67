"""Streams of random numbers that share a seed and nothing else."""

import hashlib

import torch
from torch import Generator


def stream(purpose: str, seed: int, device: torch.device | str = "cpu") -> Generator:
    """The random numbers of `seed` for one `purpose`, on `device`; another purpose, other numbers.

    torch's CPU generator takes 64 bits as a seed and reads the lower 32 of them, so the purpose
    must be in those: they are the upper half of the 32-bit numbers, which no plain seed (below
    2³¹, utils/flags.py) has, and in it 31 bits of the SHA-256 of purpose and seed.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return Generator(device).manual_seed(2**31 + int.from_bytes(digest[:4], "big") % 2**31)
