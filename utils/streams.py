"""Makes independent random generators from one seed, one per purpose."""

import hashlib

import torch
from torch import Generator


def stream(purpose: str, seed: int, device: torch.device | str = "cpu") -> Generator:
    """Return a generator on `device` whose numbers depend on `seed` and `purpose`.

    torch's CPU generator accepts a 64-bit seed but reads only its lower 32 bits, so the purpose
    must be in those. The generator's seed is 2³¹ plus 31 bits of the SHA-256 of purpose and seed.
    It therefore differs from every seed a user can give, which is below 2³¹ (utils/flags.py).
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return Generator(device).manual_seed(2**31 + int.from_bytes(digest[:4], "big") % 2**31)
