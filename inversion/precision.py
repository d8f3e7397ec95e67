"""The number formats in which a network's passes are computed, as contexts around them.

TensorFloat-32 rounds the inputs of convolutions and matrix products on NVIDIA GPUs to 10 bits. With
bfloat16 they are computed, and what is kept for the backward passes is stored, in 8 bits (torch's
automatic mixed precision). Sums, norms, the gradient distance and its cotangent stay float32 both
times, and so do images and optimiser.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps

import torch
from torch import Tensor

from inversion.objective import Losses, Objective

PixelGradient = Callable[[Objective, Tensor, float], tuple[Losses[Tensor], Tensor]]


@contextmanager
def tensorfloat32() -> Iterator[None]:
    """Within this context GPUs compute in TensorFloat-32, whatever the process does elsewhere."""
    places = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = True
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


#: name in `inversion.settings.PRECISIONS` → function(type of the device) → context.
PRECISION_CONTEXTS: dict[str, Callable[[str], AbstractContextManager]] = {
    "float32": lambda device: nullcontext(),
    "tf32": lambda device: tensorfloat32(),
    "bf16": lambda device: torch.autocast(device, torch.bfloat16),
}


def in_precision(function: PixelGradient, name: str) -> PixelGradient:
    """Return a pixel gradient whose passes through the network are computed in this format."""
    if name == "float32":  # what networks of another type, float64, compute in as well
        return function

    @wraps(function)
    def rounded(
        objective: Objective, x: Tensor, progress: float = 0.0
    ) -> tuple[Losses[Tensor], Tensor]:
        with PRECISION_CONTEXTS[name](x.device.type):
            return function(objective, x, progress)

    return rounded
