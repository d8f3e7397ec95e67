"""Chooses and describes the device that the work runs on."""

import resource
import sys

import torch

from utils.errors import InputError


def forbid_tensorfloat32() -> None:
    """Switch TensorFloat-32 off for this process, whatever torch's defaults are.

    It rounds inputs to 10 bits, so that a gradient distance below about 1e-3 would measure the
    rounding.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def choose_device(gpu: int | None, local_rank: int = 0) -> torch.device:
    """Return the device that this process computes on; switch TensorFloat-32 off.

    gpu: the number of a GPU. None: GPU `local_rank`, modulo the number of GPUs, or the CPU if there
    is no GPU.

    Raises InputError, naming `--gpu`, if there is no such GPU.
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
    """Describe the device: the name of the GPU, or the CPU with torch's thread count."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: allocated on the GPU, or resident in this process (CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
