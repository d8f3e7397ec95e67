"""Several processes that share one computation: splitting and summing.

A `Shard` is what the rest of the code sees; for one process every method is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

#: What torch.distributed says when another process is gone.
LOST_PEER = ("peer", "Broken pipe", "Timed out waiting", "Socket Timeout")


@dataclass(frozen=True)
class Shard:
    """This process's place among `size` processes: rank 0 … size − 1.

    Batches are split into contiguous blocks, the first ones larger by one image where the batch
    does not divide; blocks may be empty. Every method but `split`, `block` and `owns` is a
    collective: all processes call it, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def block(self, count: int, rank: int | None = None) -> slice:
        """The part of `count` items that a process (this one) has."""
        rank = self.rank if rank is None else rank
        share, more = divmod(count, self.size)
        start = rank * share + min(rank, more)
        return slice(start, start + share + (rank < more))

    def split(self, whole: Tensor) -> Tensor:
        """This process's block of the first dimension, a view."""
        return whole[self.block(len(whole))]

    def owns(self, index: int) -> bool:
        """Whether item `index` of items dealt out in turn is this process's."""
        return index % self.size == self.rank

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes; `x` itself is untouched."""
        if self.size == 1:
            return x
        return self.sum_(x.detach().clone(memory_format=torch.contiguous_format))

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over processes in place of the contiguous `x`, which is returned."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, own: Tensor, count: int) -> Tensor:
        """The whole (count, ...) of which every process has its block."""
        if self.size == 1:
            return own
        whole = own.new_zeros(count, *own.shape[1:])
        whole[self.block(count)] = own.detach()
        return self.sum_(whole)

    @property
    def device(self) -> str:
        """Where tensors must lie to be summed, if they may lie anywhere."""
        return "cuda" if self.size > 1 and dist.get_backend() == "nccl" else "cpu"

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process."""
        if self.size == 1:
            return bool(flag)
        return bool(self.sum_(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def objects(self, own) -> list:
        """A small picklable object of every process, in the order of ranks."""
        if self.size == 1:
            return [own]
        found = [None] * self.size
        dist.all_gather_object(found, own)
        return found


def is_lost_peer(error: Exception) -> bool:
    """Whether torch.distributed raised `error` because another process is gone."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST_PEER)


#: The only process.
ALONE = Shard()


class _Sum(torch.autograd.Function):
    """Sum over processes, any number of times differentiable: it is its own derivative."""

    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        return shard.sum(x)

    @staticmethod
    def backward(ctx, cotangent):
        return _Sum.apply(cotangent, ctx.shard), None


def differentiable_sum(x: Tensor, shard: Shard) -> Tensor:
    """`shard.sum` on the graph.

    A cotangent is summed over processes as well. What every process computes alike from the sum
    must therefore enter a derivative divided by the number of processes.
    """
    return x if shard.size == 1 else _Sum.apply(x, shard)


def sum_tensors(tensors: Sequence[Tensor], shard: Shard) -> tuple[Tensor, ...]:
    """Sums over processes of several tensors of one type, in one collective."""
    if shard.size == 1:
        return tuple(tensors)
    flat = shard.sum_(torch.cat([t.detach().flatten() for t in tensors]))
    parts = flat.split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))
