"""Splits a batch over processes and sums what they compute.

The rest of the code sees only a `Shard`; for a single process each of its methods is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Parts of the messages by which torch.distributed reports that another process is gone.
LOST_PEER = ("peer", "Broken pipe", "Timed out waiting", "Socket Timeout")


@dataclass(frozen=True)
class Shard:
    """The place of this process among the processes that share a computation.

    A batch is split into contiguous blocks. If it does not divide evenly, the first blocks have one
    image more; blocks may be empty. Every method except `split`, `block` and `owns` is a
    collective: all processes must call it, in the same order.
    """

    #: Number of this process, 0 to size − 1.
    rank: int = 0
    #: Number of processes.
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Tell whether this is the process that prints and writes."""
        return self.rank == 0

    def block(self, count: int, rank: int | None = None) -> slice:
        """Return which of `count` items process `rank` has; without `rank`, this process."""
        rank = self.rank if rank is None else rank
        share, more = divmod(count, self.size)
        start = rank * share + min(rank, more)
        return slice(start, start + share + (rank < more))

    def split(self, whole: Tensor) -> Tensor:
        """Return this process's block along the first dimension, as a view."""
        return whole[self.block(len(whole))]

    def owns(self, index: int) -> bool:
        """Tell whether this process has item `index` when items are dealt out in turn."""
        return index % self.size == self.rank

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over processes; `x` itself is unchanged."""
        if self.size == 1:
            return x
        return self.sum_(x.detach().clone(memory_format=torch.contiguous_format))

    def sum_(self, x: Tensor) -> Tensor:
        """Replace the contiguous `x` by its sum over processes, and return it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, own: Tensor, count: int) -> Tensor:
        """Return the whole tensor (count, …) from every process's block `own`."""
        if self.size == 1:
            return own
        whole = own.new_zeros(count, *own.shape[1:])
        whole[self.block(count)] = own.detach()
        return self.sum_(whole)

    @property
    def device(self) -> str:
        """Return "cuda" or "cpu": where this group's backend can sum tensors."""
        return "cuda" if self.size > 1 and dist.get_backend() == "nccl" else "cpu"

    def any(self, flag: bool) -> bool:
        """Tell whether `flag` is true on at least one process."""
        if self.size == 1:
            return bool(flag)
        return bool(self.sum_(torch.tensor([float(bool(flag))], device=self.device)).item() > 0)

    def largest(self, value: int) -> int:
        """Return the largest of the processes' numbers, each at least 0 and small."""
        if self.size == 1:
            return value
        largest = torch.tensor([float(value)], device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def objects(self, own: Any) -> list:
        """Return the small picklable object `own` of every process, in the order of ranks."""
        if self.size == 1:
            return [own]
        found = [None] * self.size
        dist.all_gather_object(found, own)
        return found


def is_lost_peer(error: Exception) -> bool:
    """Tell whether torch.distributed raised `error` because another process is gone."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST_PEER)


#: The shard of a run with a single process.
ALONE = Shard()


class _Sum(torch.autograd.Function):
    """Sums over processes. Its backward pass is this sum again, so all derivatives exist."""

    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        return shard.sum(x)

    @staticmethod
    def backward(ctx, cotangent):
        return _Sum.apply(cotangent, ctx.shard), None


def differentiable_sum(x: Tensor, shard: Shard) -> Tensor:
    """Return the differentiable sum of `x` over processes.

    The backward pass sums the cotangents over processes too. A term that every process computes
    identically from the sum must therefore be divided by the number of processes before it is
    differentiated.
    """
    return x if shard.size == 1 else _Sum.apply(x, shard)


def sum_tensors(tensors: Sequence[Tensor], shard: Shard) -> tuple[Tensor, ...]:
    """Return the sums over processes of several tensors of the same dtype, in one collective."""
    if shard.size == 1:
        return tuple(tensors)
    flat = shard.sum_(torch.cat([t.detach().flatten() for t in tensors]))
    parts = flat.split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))
