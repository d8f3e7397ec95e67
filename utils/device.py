"""The device that the work runs on."""

import resource
import sys

import torch

from utils.errors import InputError


def forbid_tensorfloat32() -> None:
    """Switch TensorFloat-32 off for this process.

    It rounds inputs to 10 bits, and a gradient match below about 1e-3 would measure that rounding.
    """
    torch.backends.cudnn.allow_tf32 = False


def choose_device(gpu: int | None, local_rank: int = 0) -> torch.device:
    """Return the device of `--gpu`: that GPU, else number `local_rank` (in turn), else the CPU.

    TensorFloat-32 is switched off.
    """
    forbid_tensorfloat32()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None and count == 0:
        raise InputError(f"--gpu {gpu}: no CUDA device here; leave --gpu out to run on the CPU")
    if gpu is not None and not 0 <= gpu < count:
        raise InputError(f"--gpu {gpu}: this machine has GPUs 0 to {count - 1}")
    if count == 0:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % count if gpu is None else gpu)
    torch.cuda.set_device(device)  # where collectives look
    return device


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU with torch's thread count."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
