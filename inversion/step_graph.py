"""One iteration of Adam as a CUDA graph: recorded once, then launched as a whole.

A step of a small network is hundreds of short operations, and launching them one by one takes the
host longer than the GPU needs to compute them. A CUDA graph launches all of them at once. What it
recorded are addresses: it computes with the numbers that stand in the same memory at every launch.
So whatever differs between iterations lies in memory on the device, a table with a row per
iteration, and the graph itself counts the row.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.errors import is_out_of_memory, one_line

#: Steps that are computed operation by operation before one is recorded, which leaves the choice of
#: kernels and the memory of libraries outside the graph.
WARM_UPS = 3


class GraphError(RuntimeError):
    """Says why a step cannot be recorded."""


class StepGraph:
    """Takes steps of Adam (Kingma & Ba, 2015) along a direction that is computed on the device.

    Images and moments of the optimiser are changed in place; `optimiser` stays what another run
    can go on from. Its own step is not recorded, since it takes step size and number of the step
    from the host.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        most: int,
    ):
        """Prepare for an optimiser over one tensor of images.

        evaluate(progress): returns a row of numbers to be read later, anything, and the direction;
        progress is a scalar tensor. most: steps between two calls of `prepare`.
        """
        (self._group,) = optimiser.param_groups
        (self._x,) = self._group["params"]
        self._state, self._evaluate = optimiser.state[self._x], evaluate
        if not self._state:
            moment = torch.zeros_like(self._x, memory_format=torch.preserve_format)
            self._state |= {"step": torch.tensor(0.0), "exp_avg": moment}
            self._state["exp_avg_sq"] = moment.clone()
        #: Row per iteration: progress, − step size / (1 − β₁ᵗ), √(1 − β₂ᵗ).
        self._table = torch.zeros(most, 3, dtype=torch.float64, device=self._x.device)
        #: Which row comes next.
        self._next = torch.zeros(1, dtype=torch.int64, device=self._x.device)
        #: The rows that `evaluate` returned; made once it is known how long they are.
        self._rows: Tensor | None = None
        self._taken = 0
        self._replay: Callable[[], None] | None = None

    def prepare(self, course: Sequence[tuple[float, float]]) -> None:
        """Write down (progress, step size) of the steps that come next, in one transfer."""
        first, second = self._group["betas"]
        done = int(self._state["step"].item())
        table = [
            (progress, -rate / (1 - first**number), (1 - second**number) ** 0.5)
            for number, (progress, rate) in enumerate(course, done + 1)
        ]
        self._table[: len(table)].copy_(torch.tensor(table, dtype=torch.float64))
        self._next.zero_()
        self._state["step"] += len(table)
        self._group["lr"] = course[-1][1]

    def step(self) -> None:
        """Take one step.

        Raises GraphError where it cannot be recorded.
        """
        if self._replay is None and self._taken < WARM_UPS:
            beside(self._step, self._x.device)
        else:
            self._replay = self._replay or recorded(self._step)
            self._replay()
        self._taken += 1

    def rows(self, count: int) -> Sequence[Tensor]:
        """Return the rows of the first `count` steps since `prepare`."""
        assert self._rows is not None
        return self._rows[:count].unbind()

    def _step(self) -> None:
        numbers = self._table.index_select(0, self._next)[0]
        row, _, direction = self._evaluate(numbers[0])
        if self._rows is None:
            self._rows = row.new_zeros(len(self._table), len(row))
        first, second = self._group["betas"]
        size, root = numbers[1:].to(direction.dtype).unbind()
        with torch.no_grad():
            mean, square = self._state["exp_avg"], self._state["exp_avg_sq"]
            mean.lerp_(direction, 1 - first)
            square.mul_(second).addcmul_(direction, direction, value=1 - second)
            self._x.addcdiv_(mean * size, (square.sqrt() / root).add_(self._group["eps"]))
            self._rows.index_copy_(0, self._next, row[None])
            self._next.add_(1)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream beside a GPU's own: memory that was freed serves its stream alone."""
    return torch.cuda.Stream(device)


def beside(function: Callable[[], None], device: torch.device) -> None:
    """Call a function on a stream of its own, as a graph's is, and let what follows wait for it.

    Raises GraphError where the device has no streams.
    """
    if device.type != "cuda":
        raise GraphError(f"the images are on the {device.type}, not on a GPU")
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream(device).wait_stream(stream)


def recorded(function: Callable[[], None]) -> Callable[[], None]:
    """Record what a function does on the GPU, without doing it; return what does it.

    Raises GraphError where the function asks for a number of the GPU, or otherwise waits for it.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        # the end of a recording that went wrong complains too, and less clearly
        first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        if is_out_of_memory(first):
            raise first from None
        raise GraphError(one_line(first)) from error
    return graph.replay
