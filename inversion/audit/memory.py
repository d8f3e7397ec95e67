"""Plans how many images matching takes at a time, by counted bytes, before it takes them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from inversion.chunks import coupled
from inversion.counting import chunk_bytes, evaluation_bytes, measured_bytes
from inversion.objective import Objective
from inversion.pixel_gradient import PIXEL_GRADIENTS
from inversion.settings import AUTO, PRIOR_ONLY, AttackSettings
from utils.errors import InputError, is_out_of_memory
from utils.memory import free_memory, gibibytes
from utils.shard import Shard

#: Copies of the batch that the loop keeps: start, iterate, best iterate, derivative, its sign, two
#: moments of Adam, and noise; and with L-BFGS its history of 20 pairs.
LOOP_COPIES, LBFGS_COPIES = 8, 40
#: What a process on the CPU takes of its tensors' bytes at most: the C library's heap keeps gaps.
#: Measured were 1.2 to 1.4, up to 1.65 without closed forms, and 2.1 where 84 MiB were counted of a
#: small network (benchmarks/memory.py).
HEAP = 1.7


@dataclass(frozen=True)
class MemoryPlan:
    """Says how many images each process takes at a time, and what memory that takes."""

    #: Images of the largest part of the batch that a process has.
    images: int
    #: Images whose graph is kept at the same time; None for all.
    chunk_size: int | None
    #: Bytes that matching is expected to take at its most, on each process: weights, what was sent,
    #: images, and the tensors of one evaluation; on the CPU with the heap's gaps.
    expected: int
    #: Bytes that they may take; None where nothing limits them.
    limit: int | None
    #: Where the limit comes from, in words.
    limited_by: str = ""

    @property
    def line(self) -> str:
        """What was picked, and what is expected, in words."""
        picked = f"the whole batch of {self.images} at once"
        if self.chunk_size is not None:
            count = -(-self.images // self.chunk_size)
            picked = f"{self.images} images in {count} chunks of at most {self.chunk_size}"
        limit = "" if self.limit is None else f", of {_shown(self.limit)} {self.limited_by}"
        return f"memory: {picked}; expected to take {_shown(self.expected)}{limit}"

    @property
    def entry(self) -> dict:
        """The entry `memory` of result.json."""
        return {
            "images": self.images,
            "chunk_size": self.chunk_size,
            "expected_bytes": self.expected,
            "limit_bytes": self.limit,
        }


def _shown(number: int) -> str:
    return gibibytes(number) if number >= 2**30 else f"{number / 2**20:,.0f} MiB"


def memory_plan(
    settings: AttackSettings,
    objective: Objective,
    image_shape: tuple[int, ...],
    processes: Shard,
    *,
    heap: float | None = None,
) -> MemoryPlan | None:
    """Plan the memory of matching as the settings ask; None where they do not ask.

    objective: without chunks, on the device to work on. heap: what the process takes of its
    tensors' bytes; None for HEAP on the CPU and 1 on a GPU. All processes call it, and get the
    same.
    Raises InputError where what is asked for cannot be done, with the smallest that can.
    """
    if settings.chunk_size is None and settings.matching_memory is None:
        return None
    if settings.method == "layerwise":
        return None
    images = objective.batch_shard.block(len(objective.y), rank=0).stop
    need = _Need(settings, objective, image_shape, images, heap)
    limit, limited_by = _limit(settings, objective, processes)
    fixed = settings.chunk_size if isinstance(settings.chunk_size, int) else None
    why = _whole_batch_only(settings, objective)
    if settings.pixel_gradient == PRIOR_ONLY and why is not None:
        return _plan_of_control(need, limit, limited_by, why, objective)
    if fixed is not None:
        if why is not None:
            raise InputError(f"--chunk-size {fixed}: images cannot be taken in chunks: {why}")
        chunk = fixed if fixed < images else None
        plan = MemoryPlan(images, chunk, need.of(chunk), limit, limited_by)
        if limit is not None and plan.expected > limit:
            raise InputError(
                f"--chunk-size {fixed}: takes {_shown(plan.expected)}, more than the "
                f"{_shown(limit)} {limited_by}; {_smallest(need, why)}"
            )
        return plan
    whole = need.of(None)
    assert limit is not None  # auto has one
    if whole <= limit:
        return MemoryPlan(images, None, whole, limit, limited_by)
    if why is not None:
        raise InputError(
            f"{_flag(settings)}: the whole batch takes {_shown(whole)}, more than the "
            f"{_shown(limit)} {limited_by}, and cannot be taken in chunks: {why}"
        )
    chunk = _largest(need.of, limit, images)
    if chunk is None:
        raise InputError(
            f"{_flag(settings)}: {_smallest(need, why)}, more than the {_shown(limit)} "
            f"{limited_by}; take smaller images, or a machine with more memory"
        )
    return MemoryPlan(images, chunk, need.of(chunk), limit, limited_by)


def _flag(settings: AttackSettings) -> str:
    """Name the flag that asks for the plan."""
    if settings.matching_memory is None:
        return f"--chunk-size {settings.chunk_size}"
    return f"--max-memory {settings.matching_memory / 2**20:.3g}MiB"


def _whole_batch_only(settings: AttackSettings, objective: Objective) -> str | None:
    """Return why the images must be taken all at once, with the remedy; None where they need not.

    A control of priors alone that no BatchNorm sees computes no graph of the network.
    """
    if settings.pixel_gradient not in ("exact", PRIOR_ONLY):
        return f"--pixel-gradient {settings.pixel_gradient} keeps the graph of all; leave it out"
    if settings.pixel_gradient == PRIOR_ONLY and not objective.target_moments:
        return None
    why = coupled(objective)
    if why is None:
        return None
    return (
        f"{why}; give --bn-coupling forced, for which the client must upload its statistics, more "
        "processes by --nproc, or capture in eval mode or with --replace-bn groupnorm"
    )


def _smallest(need: "_Need", why: str | None) -> str:
    if why is not None:
        return f"the whole batch takes {_shown(need.of(None))}"
    return f"needs at least {_shown(need.of(1))} for chunks of one image"


def _plan_of_control(
    need: "_Need", limit: int | None, limited_by: str, why: str, objective: Objective
) -> MemoryPlan:
    """Plan a control that cannot be taken in chunks: whole, where that fits."""
    whole = need.of(None)
    if limit is None:
        limit, limited_by = _free(objective, 1), "that are free"
    if whole > limit:
        raise InputError(
            f"it takes {_shown(whole)}, more than the {_shown(limit)} {limited_by}: {why}"
        )
    return MemoryPlan(need.images, None, whole, limit, limited_by)


def _limit(
    settings: AttackSettings, objective: Objective, processes: Shard
) -> tuple[int | None, str]:
    """Return the bytes that matching may take on each process, and where that comes from."""
    if settings.matching_memory is not None:
        return settings.matching_memory, "of --max-memory"
    if settings.chunk_size != AUTO:
        return None, ""
    return min(processes.objects(_free(objective, processes.size))), "that are free"


def _free(objective: Objective, processes: int) -> int:
    """Return the bytes that are free for one of these processes, with what it holds already."""
    device = objective.target_gradient[0].device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + held_bytes(objective)
    free = free_memory()
    if free is None:
        raise InputError(
            "--chunk-size auto: this system does not say how much memory is free; give --max-memory"
        )
    return free // processes + held_bytes(objective)


def held_bytes(objective: Objective) -> int:
    """Return the bytes of the weights and of what the client sent."""
    model = objective.model
    held = [*model.parameters(), *model.buffers(), *objective.target_gradient]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


class _Need:
    """Counts what matching needs with chunks of a size, each size once."""

    def __init__(
        self,
        settings: AttackSettings,
        objective: Objective,
        image_shape: tuple[int, ...],
        images: int,
        heap: float | None,
    ):
        self.settings, self.objective = settings, objective
        self.image_shape, self.images = image_shape, images
        like = objective.target_gradient[0]
        image = torch.Size(image_shape).numel() * like.element_size()
        copies = LOOP_COPIES + (LBFGS_COPIES if settings.loop.optimiser == "LBFGS" else 0)
        seeds = 0 if settings.offload_seeds else 2 * (settings.num_seeds - 1)
        if heap is None:
            heap = HEAP if like.device.type == "cpu" else 1.0
        self._heap = heap
        self._held = held_bytes(objective) + (copies + seeds) * image * len(objective.y)
        self._found: dict[int | None, int] = {}
        self._counts = True

    def of(self, chunk_size: int | None) -> int:
        """Return the bytes with so many images at a time; None for all."""
        if chunk_size not in self._found:
            self._found[chunk_size] = self._held + int(self._heap * self._evaluation(chunk_size))
        return self._found[chunk_size]

    def _evaluation(self, chunk_size: int | None) -> int:
        function = PIXEL_GRADIENTS[self.settings.pixel_gradient]
        if self._counts:
            try:
                if chunk_size is None:
                    return evaluation_bytes(function, self.objective, self.image_shape, self.images)
                return chunk_bytes(self.objective, self.image_shape, chunk_size)
            except Exception as error:  # a user's network may do anything that shapes do not allow
                if is_out_of_memory(error):
                    raise
                self._counts = False
        return measured_bytes(function, self.objective, self.image_shape, chunk_size or self.images)


def _largest(need: Callable[[int], int], limit: int, images: int) -> int | None:
    """Return the most images at a time that need at most `limit` bytes; None where one does not.

    Of chunk sizes with equally many chunks the smallest is taken. need: grows with its argument,
    nearly along a line.
    """
    if need(1) > limit:
        return None
    low, high = 1, images  # `low` fits, and all images at once do not
    while high - low > 1:
        middle = 2
        if low > 1 or high < images:
            slope = (need(low) - need(1)) / (low - 1) if low > 1 else need(2) - need(1)
            middle = low + int((limit - need(low)) / max(1, slope)) if slope else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        if need(middle) <= limit:
            low = middle
        else:
            high = middle
    return -(-images // -(-images // low))
