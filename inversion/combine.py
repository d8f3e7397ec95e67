"""Minimum-loss combination: chooses for every image of the batch which seed's version to take.

The combination is the one whose batch gradient is nearest to the target's (E2EGI, section "Minimum
Loss Combinatorial Optimization"). Priors are left out of these evaluations, and no graph is built.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inversion.objective import Objective
from inversion.optimise import lowest
from models.gradient import trainable_parameters
from utils.errors import telling_memory
from utils.shard import Shard

#: Up to this many combinations all are compared, where inner products give their losses.
EXHAUSTIVE = 4096
#: Memory that a block of the Gram matrix's product may take in float64, bytes.
BLOCK_BYTES = 2**27


@dataclass(frozen=True)
class Combination:
    """Holds a consensus of several seeds, and what it took to find it."""

    #: (B, C, H, W) images.
    x: Tensor
    #: For every image the index of the seed it came from.
    choice: tuple[int, ...]
    #: Gradient distance of x.
    loss: float
    #: Gradient distance of every seed's images; NaN for images that are not finite.
    seed_losses: tuple[float, ...]
    #: The work that the search took, in gradients of one image.
    image_gradients: int


def combination_method(objective: Objective, num_seeds: int, memory: int) -> tuple[str, str]:
    """Return how `combine` will search, "gram" or "greedy", and why, in words.

    memory: bytes that the per-sample gradients may take.
    """
    parameters = list(trainable_parameters(objective.model).values())
    count = num_seeds * len(objective.y)
    size = (
        count * sum(p.numel() * p.element_size() for p in parameters) // objective.batch_shard.size
    )
    if objective.couples_images:
        return "greedy", "BatchNorm couples the images of a batch"
    if objective.distance_from_products is None:
        return "greedy", "this gradient distance is no function of inner products"
    where = "in all" if objective.batch_shard.size == 1 else "per process"
    stored = f"{count} per-sample gradients of {size / 2**20:,.0f} MiB {where}"
    if size > memory:
        return "greedy", f"{stored} exceed the {memory / 2**20:,.0f} MiB of combine_memory"
    return "gram", stored


class InterruptedSearchError(Exception):
    """Says that the search for a combination was asked to stop."""


def combine(
    objective: Objective,
    x_seeds: Sequence[Tensor],
    *,
    memory: int = 4 * 2**30,
    should_stop: Callable[[], bool] = lambda: False,
) -> Combination:
    """Combine the seeds' images `x_seeds`, S tensors (B, C, H, W), into one batch.

    Where no layer uses the statistics of the batch at hand, the batch gradient is the mean of the
    images' gradients. The Gram matrix of all S·B of them and their products with the target then
    give the loss of every combination without further gradients. Up to EXHAUSTIVE combinations all
    are compared; of more, a descent over changes of one image and of two, from every seed, finds a
    local optimum that need not be the best. Elsewhere, or when the gradients do not fit into
    `memory` bytes, combinations are evaluated one by one: a greedy search with repeated sweeps,
    until no single change improves. Either way the result is never worse than the best seed. Seeds
    may lie on another device than the model; only what is evaluated is moved. Seeds with images
    that are not finite take no part.

    Raises InterruptedSearchError soon after `should_stop()` is true: with many images a greedy
    search takes long.
    """
    usable = [s for s, x in enumerate(x_seeds) if x.isfinite().all()]
    if not usable or len(usable) == len(x_seeds):
        return _combine(objective, x_seeds, memory, should_stop)
    found = _combine(objective, [x_seeds[s] for s in usable], memory, should_stop)
    losses_of = dict(zip(usable, found.seed_losses, strict=True))
    return replace(
        found,
        choice=tuple(usable[s] for s in found.choice),
        seed_losses=tuple(losses_of.get(s, math.nan) for s in range(len(x_seeds))),
    )


def _combine(
    objective: Objective,
    x_seeds: Sequence[Tensor],
    memory: int,
    should_stop: Callable[[], bool],
) -> Combination:
    """Combine seeds that all take part."""
    if len(x_seeds) == 1:
        loss = objective.gradient_distance(x_seeds[0].to(objective.y.device))
        batch_size = len(x_seeds[0])
        return Combination(x_seeds[0], (0,) * batch_size, loss, (loss,), batch_size)
    evaluated = _Evaluated(objective, x_seeds, should_stop)
    unmixed = [(s,) * len(objective.y) for s in range(len(x_seeds))]
    from_products = objective.distance_from_products
    method, stored = combination_method(objective, len(x_seeds), memory)
    if method == "gram" and from_products is not None:
        with telling_memory(lambda: f"{stored}; a --combine-memory below that makes do without"):
            gram, products, target_square = _inner_products(objective, x_seeds, should_stop)
        evaluated.image_gradients += len(products)
        losses = _CombinationLosses(from_products, gram, products, target_square, len(x_seeds))
        seed_losses = losses.of(torch.tensor(unmixed)).tolist()
        best = lowest(seed_losses)
        seed_losses[best] = evaluated.loss_of(unmixed[best])
        choice = _best_combination(losses, unmixed)
        if evaluated.loss_of(choice) > seed_losses[best]:  # only by rounding
            choice = unmixed[best]
    else:
        seed_losses = [evaluated.loss_of(seed) for seed in unmixed]
        choice = _greedy(evaluated, unmixed[lowest(seed_losses)], len(x_seeds))
    return Combination(
        evaluated.batch(choice),
        choice,
        evaluated.loss_of(choice),
        tuple(seed_losses),
        evaluated.image_gradients,
    )


class _Evaluated:
    """Evaluates the gradient distances of combinations, each once, and counts the work."""

    def __init__(
        self, objective: Objective, x_seeds: Sequence[Tensor], should_stop: Callable[[], bool]
    ):
        self.objective, self.x_seeds, self.should_stop = objective, x_seeds, should_stop
        self.image_gradients = 0
        self._losses: dict[tuple[int, ...], float] = {}

    def batch(self, choice: tuple[int, ...]) -> Tensor:
        """Return the images of a combination."""
        return torch.stack([self.x_seeds[s][i] for i, s in enumerate(choice)])

    def loss_of(self, choice: tuple[int, ...]) -> float:
        """Return the gradient distance of a combination; new ones pass through the network.

        Raises InterruptedSearchError when `should_stop()` is true.
        """
        if choice not in self._losses:
            if self.should_stop():
                raise InterruptedSearchError
            x = self.batch(choice).to(self.objective.y.device)
            self._losses[choice] = self.objective.gradient_distance(x)
            self.image_gradients += len(choice)
        return self._losses[choice]


def _greedy(evaluated: _Evaluated, choice: tuple[int, ...], num_seeds: int) -> tuple[int, ...]:
    """Sweep over the images, taking each one's best seed, until a sweep changes nothing."""
    while True:
        before = choice
        for i in range(len(choice)):
            options = [(*choice[:i], s, *choice[i + 1 :]) for s in range(num_seeds)]
            losses = [evaluated.loss_of(option) for option in options]
            if losses[lowest(losses)] < evaluated.loss_of(choice):
                choice = options[lowest(losses)]
        if choice == before:
            return choice


def _inner_products(
    objective: Objective, x_seeds: Sequence[Tensor], should_stop: Callable[[], bool]
) -> tuple[Tensor, Tensor, float]:
    """Return the inner products of all per-sample gradients, each divided by B.

    Returns their Gram matrix (S·B, S·B), their products with the target's gradient (S·B,) and its
    squared norm; row s·B + i is image i of seed s. All in float64 on the CPU, summed in blocks of
    parameters. With several processes each computes a part of the rows.
    """
    batch_size, device, shard = len(objective.y), objective.y.device, objective.batch_shard
    target = torch.cat([g.flatten() for g in objective.target_gradient])
    count = len(x_seeds) * batch_size
    own = shard.block(count)
    rows = target.new_empty(own.stop - own.start, target.numel())
    for place, number in enumerate(range(own.start, own.start + _largest_block(shard, count))):
        if should_stop():  # all processes ask equally often
            raise InterruptedSearchError
        if place < len(rows):
            s, i = divmod(number, batch_size)
            whole = objective.image_gradient(x_seeds[s][i : i + 1].to(device), i)
            gradient = objective.seen(whole)
            torch.cat([g.flatten() for g in gradient], out=rows[place])
    rows /= batch_size
    gram = torch.zeros(len(rows), count, dtype=torch.float64, device=device)
    products = torch.zeros(len(rows), dtype=torch.float64, device=device)
    width = max(1, BLOCK_BYTES // (8 * count))
    for start in range(0, target.numel(), width):
        block = rows[:, start : start + width].double()
        gram += block @ shard.gather(block, count).T
        products += block @ target[start : start + width].double()
    gram, products = shard.gather(gram, count), shard.gather(products, count)
    return gram.cpu(), products.cpu(), target.double().square().sum().item()


def _largest_block(shard: Shard, count: int) -> int:
    first = shard.block(count, rank=0)
    return first.stop - first.start


class _CombinationLosses:
    """Computes losses of combinations from inner products; row s·B + i is image i of seed s."""

    def __init__(
        self,
        from_products: Callable[[Tensor, Tensor, float], Tensor],
        gram: Tensor,
        products: Tensor,
        target_square: float,
        num_seeds: int,
    ):
        self._distance = from_products
        self.gram, self.products, self.target_square = gram, products, target_square
        self.num_seeds = num_seeds
        self.batch_size = len(products) // num_seeds

    def rows(self, choice: Tensor) -> Tensor:
        """Return the rows of combinations (..., B)."""
        return choice * self.batch_size + torch.arange(self.batch_size)

    def distance(self, square: Tensor, product: Tensor) -> Tensor:
        """Return the gradient distance from ‖g‖² and ⟨g, g*⟩."""
        return self._distance(square, product, self.target_square)

    def of(self, choices: Tensor) -> Tensor:
        """Return the losses (M,) of combinations (M, B)."""
        rows = self.rows(choices)
        square = self.gram[rows[:, :, None], rows[:, None, :]].sum((1, 2))
        return self.distance(square, self.products[rows].sum(1))

    def after_changes(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses after every single change and after every pair of changes.

        Change s·B + i gives image i to seed s. Returns (S·B,) and (S·B, S·B); where a pair
        changes the same image twice it holds infinity.
        """
        rows, count = self.rows(choice), len(self.products)
        new = torch.arange(count)
        old = rows[new % self.batch_size]
        square = self.gram[rows][:, rows].sum()
        product = self.products[rows].sum()
        from_sum = self.gram[:, rows].sum(1)  # ⟨g_m, g⟩
        along = from_sum[new] - from_sum[old]
        steps = (
            self.gram - self.gram[:, old] - self.gram[old] + self.gram[old][:, old]
        )  # ⟨d_m, d_n⟩ of the changes d_m = g_new − g_old
        shift = self.products[new] - self.products[old]
        own = steps.diagonal()
        single = self.distance(square + 2 * along + own, product + shift)
        one = 2 * along + own
        pairs = self.distance(
            square + one[:, None] + one[None] + 2 * steps, product + shift[:, None] + shift[None]
        )
        same = (new[:, None] - new[None]) % self.batch_size == 0
        return single, pairs.masked_fill(same, torch.inf)


def _best_combination(losses: _CombinationLosses, starts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Find the best combination: compare all if they are few, else descend from every start."""
    if losses.num_seeds**losses.batch_size <= EXHAUSTIVE:
        every = torch.tensor(
            list(itertools.product(range(losses.num_seeds), repeat=losses.batch_size))
        )
        return tuple(every[losses.of(every).argmin()].tolist())
    ends = [_descend(losses, torch.tensor(start)) for start in starts]
    return tuple(ends[losses.of(torch.stack(ends)).argmin()].tolist())


def _descend(losses: _CombinationLosses, choice: Tensor) -> Tensor:
    """Descend steepest over changes of one image, and of two where no single one helps."""
    value = losses.of(choice[None])[0]
    while True:
        single, pairs = losses.after_changes(choice)
        best = single.argmin()
        changes = [best]
        if not single[best] < value:
            first, second = divmod(int(pairs.argmin()), len(single))
            changes = [torch.tensor(first), torch.tensor(second)]
        changed = choice.clone()
        for change in changes:
            changed[change % losses.batch_size] = change // losses.batch_size
        after = losses.of(changed[None])[0]
        if not after < value - 1e-12 * value.abs():
            return choice
        choice, value = changed, after
